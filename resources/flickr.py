"""The Flickr client: radial photo searches, complete and unique, within Flickr's quota.

What a photo record means, and which are kept, is decided in graft_pipeline/photos.py.
"""

import functools
import hashlib
import itertools
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from graft_pipeline.errors import GraftError, InputError, ServiceError, SettingsError
from graft_pipeline.settings import Settings
from resources.http import (
    TRANSIENT_STATUSES,
    USER_AGENT,
    BodyTooLargeError,
    Redaction,
    Retries,
    TransientError,
    host_of,
    is_http_url,
    parse_retry_after,
    read_body,
)

logger = logging.getLogger(__name__)

#: Largest page of a geo query (flickr.photos.search).
PAGE_SIZE = 250
#: Flickr repeats itself after the first 4,000 results of a query.
RESULT_LIMIT = 4000
#: A query that announces more than this is split by upload time; `total` is an estimate, hence the distance.
SPLIT_ABOVE = 3500
#: How often an empty page is asked for again when there should be photos on it.
EMPTY_PAGE_REPEATS = 2
#: Largest answer that is read, bytes; a page of 250 photos is about 250 kB.
MAX_BYTES = 1 << 24
#: Radius of a search must stay below, kilometres.
MAX_RADIUS_KM = 32.0
#: What graft_pipeline.photos reads of a record.
EXTRAS = "license,date_upload,date_taken,last_update,geo,tags,media,o_dims,url_s,url_n,url_w,url_m,url_z,url_c,url_l"

#: Values of the argument `safe_search`: photos up to this level are found.
_SAFETY_LEVELS = {"safe": 1, "moderate": 2, "restricted": 3}

#: https://www.flickr.com/services/api/flickr.photos.search.html, "Error Codes"; 0 and 10 are outages as well.
_TRANSIENT_CODES = frozenset({0, 10, 105, 106})
_KEY_CODES = frozenset({95, 96, 97, 98, 99, 100})
_CLIENT_CODES = frozenset({111, 112, 114, 115, 116})

_CONTROLS = dict.fromkeys(range(32), " ")

#: Loggers that may repeat a request's key or signature, at DEBUG or with an error page.
_TALKATIVE_LOGGERS = (
    "flickrapi.auth.OAuthFlickrInterface",
    "flickrapi.core",
    "oauthlib.oauth1.rfc5849",
    "oauthlib.oauth1.rfc5849.endpoints.base",
    "oauthlib.oauth1.rfc5849.signature",
    "requests_oauthlib.oauth1_auth",
    "urllib3.connectionpool",
    "urllib3.util.retry",
)


@functools.cache
def _api_class() -> type:
    """The class of flickrapi, but for its repr, which shows the key."""
    import flickrapi

    class Api(flickrapi.FlickrAPI):
        def __repr__(self) -> str:
            return f"<FlickrAPI at {self.REST_URL}>"

        __str__ = __repr__

    return Api


@functools.cache
def _bucket_class() -> type:
    """The class of pyrate-limiter's shared pace, but for calls in the future: they are of a clock that was wrong."""
    from pyrate_limiter import RateItem, SQLiteBucket

    class Bucket(SQLiteBucket):
        def put(self, item: RateItem) -> bool:
            # Kept, they would hold up all runs until the clock is there.
            latest = self.now() + max(rate.interval for rate in self.rates)
            with self.lock, self.conn:
                self.conn.execute(f"DELETE FROM {self.table} WHERE item_timestamp > ?", (latest,))
            return super().put(item)

    return Bucket


def shared_pacing_file(key: str) -> Path:
    """The file in which all runs of a deployment keep the pace of a key.

    Args:
        key: API key; the file is named by a hash of it, so that the key itself shows nowhere.

    Returns:
        A file in DAGSTER_HOME, which all runs of a deployment share, or else in the user's state folder.
    """
    import platformdirs

    home = os.environ.get("DAGSTER_HOME")
    folder = Path(home).expanduser() if home else platformdirs.user_state_path("graft-pipeline")
    return folder / f"flickr-pace-{hashlib.sha256(key.encode()).hexdigest()[:16]}.sqlite"


class FlickrClient:
    """flickrapi, made complete: paced, retried, classified, split by time, unique.

    Nothing is opened before the first search. One object may serve many threads.

    Args:
        key: API key.
        secret: its secret.
        url: REST endpoint.
        calls_per_hour: quota of the key; calls are spread evenly, not spent in bursts.
        timeout_s: limit of one connect, and of each wait for bytes.
        pacing_file: SQLite file that holds the pace, shared by all processes that use the key, and kept over
            restarts. None: this object's own calls only.
        licenses: licence ids that are asked for, comma separated; empty: all.
        safe_search: least safe photos that are asked for: `safe`, `moderate` or `restricted`.
        retries: attempts and waits per call.

    Attributes:
        filters: parameters of every search that come from `licenses` and `safe_search`.
        calls: HTTP calls made so far, retries included.
        downloaded_bytes: bytes of their answers.
        unreachable_results: results that Flickr announced and does not hand out: within single seconds beyond its
            ceiling, and on pages that stay empty.
    """

    def __init__(
        self,
        key: str,
        secret: str,
        *,
        url: str = "https://api.flickr.com/services/rest/",
        calls_per_hour: int = 3600,
        timeout_s: float = 30.0,
        pacing_file: Path | None = None,
        licenses: str = "",
        safe_search: Literal["safe", "moderate", "restricted"] = "safe",
        retries: Retries | None = None,
    ) -> None:
        if not key or not secret:
            raise SettingsError(
                "Flickr needs a key and its secret: set GRAFT_FLICKR_KEY and GRAFT_FLICKR_SECRET."
            )
        if not is_http_url(url):
            raise SettingsError(f"Flickr's address {url!r} is no http(s) URL: correct GRAFT_FLICKR_URL.")
        self._key, self._secret = key, secret
        self._url = url
        self._calls_per_hour = calls_per_hour
        self._timeout_s = timeout_s
        self._pacing_file = pacing_file
        self.filters = {"safe_search": str(_SAFETY_LEVELS[safe_search])}
        if licenses:
            self.filters["license"] = licenses
        self._retries = retries or Retries(attempts=6)
        self._redaction = Redaction([key, secret])
        self._lock = threading.Lock()
        self._opened: tuple[Any, Any] | None = None
        self.calls = 0
        self.downloaded_bytes = 0
        self.unreachable_results = 0

    @classmethod
    def from_settings(cls, settings: Settings, *, retries: Retries | None = None) -> "FlickrClient":
        """The client of a deployment; outside the planet all runs share the pace of their key.

        Args:
            settings: names key, secret, URL, quota, pacing file, filters and timeout.
            retries: as above.

        Raises:
            SettingsError: if key or secret is not set.
        """
        if settings.flickr_key is None or settings.flickr_secret is None:
            raise SettingsError(
                "Flickr needs a key and its secret: set GRAFT_FLICKR_KEY and GRAFT_FLICKR_SECRET "
                "(https://www.flickr.com/services/apps/create), or GRAFT_WORLD=planet to run without."
            )
        key, pacing_file = settings.flickr_key.get_secret_value(), settings.flickr_pacing_file
        if pacing_file is None and not settings.is_planet:
            pacing_file = shared_pacing_file(key)
        return cls(
            key,
            settings.flickr_secret.get_secret_value(),
            url=settings.flickr_url,
            calls_per_hour=settings.flickr_calls_per_hour,
            timeout_s=settings.flickr_timeout_s,
            pacing_file=pacing_file,
            licenses=settings.flickr_licenses,
            safe_search=settings.flickr_safe_search,
            retries=retries,
        )

    def __repr__(self) -> str:
        return f"FlickrClient(url={self._url!r}, calls={self.calls})"

    def __enter__(self) -> "FlickrClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close connections and the pacing file; the object opens them again if it is used again."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None:
            api, limiter = opened
            api.flickr_oauth.session.close()
            limiter.close()
            for name in _TALKATIVE_LOGGERS:
                logging.getLogger(name).removeFilter(self._redaction)

    def search(
        self,
        lon_deg: float,
        lat_deg: float,
        radius_km: float,
        uploaded_from: datetime,
        uploaded_to: datetime,
    ) -> Iterator[dict[str, Any]]:
        """Every geotagged photo around a point that was uploaded in a time window.

        All geotag accuracies are asked for: what is too coarse is to become a row with a reason.

        Args:
            lon_deg: longitude of the centre, EPSG:4326.
            lat_deg: latitude of the centre, EPSG:4326.
            radius_km: radius, below 32 km.
            uploaded_from: start of the window, inclusive, with time zone.
            uploaded_to: end of the window, exclusive, with time zone.

        Yields:
            Flickr's records as parsed from JSON, unique by `id`; by upload time within each page.

        Raises:
            InputError: if an argument is out of range, or Flickr calls the query illogical.
            SettingsError: if Flickr refuses the key.
            ServiceError: if Flickr cannot be reached, or keeps failing.
        """
        start_s, end_s = _whole_seconds(uploaded_from, uploaded_to)
        if not (-180 <= lon_deg <= 180 and -90 <= lat_deg <= 90 and 0 < radius_km < MAX_RADIUS_KM):
            raise InputError(
                f"Cannot search {radius_km} km around ({lon_deg}, {lat_deg}): give degrees of EPSG:4326, "
                f"and a radius above 0 and below {MAX_RADIUS_KM:g} km."
            )
        where = {
            "lat": f"{lat_deg:.7f}",
            "lon": f"{lon_deg:.7f}",
            "radius": f"{radius_km:.4f}",
            "radius_units": "km",
        }
        seen: set[str] = set()
        windows = [(start_s, end_s)] if start_s < end_s else []
        while windows:
            start_s, end_s = windows.pop()
            rows, total = self._first_page(where, start_s, end_s)
            if total > SPLIT_ABOVE and end_s - start_s > 1:
                middle_s = (start_s + end_s) // 2
                windows += [(middle_s, end_s), (start_s, middle_s)]
                continue
            if total > RESULT_LIMIT:
                self.unreachable_results += total - RESULT_LIMIT
                logger.warning(
                    "Flickr announces %d photos uploaded in second %d around (%.5f, %.5f) and hands out %d",
                    total, start_s, lon_deg, lat_deg, RESULT_LIMIT,
                )  # fmt: skip
            pages = math.ceil(min(total, RESULT_LIMIT) / PAGE_SIZE)
            of_window: set[str] = set()
            empty_page = 0
            for page in itertools.count(2):
                # The total is an estimate: after a full page, unless it repeats others, there may be more than it says.
                is_full = len(rows) >= PAGE_SIZE and any(row["id"] not in of_window for row in rows)
                for row in rows:
                    of_window.add(row["id"])
                    if row["id"] not in seen:
                        seen.add(row["id"])
                        yield row
                if rows and empty_page:
                    # Photos after none: those of the empty page are missing, and will be found in smaller windows.
                    if end_s - start_s > 1:
                        middle_s = (start_s + end_s) // 2
                        windows += [(middle_s, end_s), (start_s, middle_s)]
                    else:
                        self._note_missing(PAGE_SIZE, start_s, f"page {empty_page} stays empty")
                    break
                # An empty page may be a hiccup, or the end where the total is too large: pages that follow tell.
                if page > pages and not is_full:
                    if empty_page and total - len(of_window) > PAGE_SIZE:
                        missing = total - len(of_window)
                        self._note_missing(missing, start_s, f"pages from {empty_page} on stay empty")
                    break
                if page > RESULT_LIMIT // PAGE_SIZE:
                    if total <= SPLIT_ABOVE and end_s - start_s > 1:
                        middle_s = (start_s + end_s) // 2
                        windows += [(middle_s, end_s), (start_s, middle_s)]
                    break
                rows, _ = self._page(where, start_s, end_s, page)
                if page <= pages and not empty_page:
                    for _ in range(EMPTY_PAGE_REPEATS):
                        if rows:
                            break
                        rows, _ = self._page(where, start_s, end_s, page)
                    empty_page = 0 if rows else page

    def _first_page(
        self, where: dict[str, str], start_s: int, end_s: int
    ) -> tuple[list[dict[str, Any]], int]:
        """As `_page`; one that is empty though there are photos is asked for again."""

        def attempt() -> tuple[list[dict[str, Any]], int]:
            rows, total = self._page(where, start_s, end_s, 1)
            if total and not rows:
                raise TransientError("empty", f"{total} photos announced, none handed out", is_quick=True)
            return rows, total

        try:
            return self._retries.call(attempt)
        except TransientError:
            rows, total = self._page(where, start_s, end_s, 1)
        if rows or total <= PAGE_SIZE:
            if not rows and total:
                # Flickr counts photos that it then leaves out; these few do not hold up all others.
                self._note_missing(total, start_s, "the first page stays empty")
            return rows, total
        raise ServiceError(
            f"Flickr ({host_of(self._url)}) announces {total} photos and hands out none. "
            "Run again later: what was found is kept."
        )

    def _note_missing(self, count: int, start_s: int, why: str) -> None:
        self.unreachable_results += count
        logger.warning(
            "Flickr keeps back up to %d photos uploaded from second %d on: %s", count, start_s, why
        )

    def _page(
        self, where: dict[str, str], start_s: int, end_s: int, page: int
    ) -> tuple[list[dict[str, Any]], int]:
        """One page of a search: its records with an id, and how many the whole search has."""
        answer = self._call(
            **where,
            **self.filters,
            min_upload_date=str(start_s),
            # Flickr's bound is inclusive, our windows are half-open.
            max_upload_date=str(end_s - 1),
            has_geo="1",
            # "Defaults to the maximum if not specified": 1 is the coarsest, and means all.
            accuracy="1",
            media="photos",
            content_type="1",
            sort="date-posted-asc",
            extras=EXTRAS,
            per_page=str(PAGE_SIZE),
            page=str(page),
        )
        records = answer["photo"]
        rows = [{**record, "id": str(record["id"])} for record in records if _has_id(record)]
        if len(rows) < len(records):
            logger.warning("Flickr sent %d records without an id", len(records) - len(rows))
        try:
            total = int(answer.get("total") or 0)
        except (TypeError, ValueError):
            total = len(rows)
        return rows, max(total, len(rows))

    def _call(self, **parameters: str) -> dict[str, Any]:
        """The `photos` object of flickr.photos.search, after retries."""
        try:
            return self._retries.call(functools.partial(self._attempt, parameters))
        except TransientError as error:
            host = host_of(self._url)
            if error.is_unreachable:
                message = (
                    f"Flickr cannot be reached at {host}: {error}. "
                    "Check the network, the proxy (HTTPS_PROXY) and GRAFT_FLICKR_URL, then run again."
                )
            else:
                message = (
                    f"Flickr ({host}) keeps failing: {error}. Run again later: what was found is kept. "
                    "If this is a quota (429), lower GRAFT_FLICKR_CALLS_PER_HOUR."
                )
        raise ServiceError(message)

    def _attempt(self, parameters: dict[str, str]) -> dict[str, Any]:
        """One signed call. Flickr rejects a repeated nonce, so retries happen above flickrapi."""
        import flickrapi
        import requests

        api = self._paced_api()
        try:
            answer = api.photos.search(**parameters)
        except flickrapi.FlickrError as error:
            failure = self._classified(error)
        except (
            requests.exceptions.InvalidURL,
            requests.exceptions.MissingSchema,
            requests.exceptions.InvalidSchema,
        ):
            failure = SettingsError(
                f"Flickr's address {self._url!r} cannot be used: correct GRAFT_FLICKR_URL."
            )
        except requests.exceptions.Timeout:
            failure = TransientError(
                "timeout", f"no answer within {self._timeout_s:g} s", is_unreachable=True
            )
        except requests.exceptions.ConnectionError as error:
            failure = TransientError("connection", _cause(error), is_unreachable=True)
        except requests.exceptions.RequestException as error:
            failure = TransientError("connection", f"the answer broke off ({type(error).__name__})")
        except (ValueError, AttributeError, KeyError, RecursionError):
            # flickrapi parses JSON without checks: HTML, a cut text, a list, a failure without a code, a nest.
            failure = TransientError(
                "unreadable", "the answer is no JSON of Flickr's; is a proxy in between?"
            )
        else:
            photos = answer.get("photos")
            if isinstance(photos, dict) and isinstance(photos.get("photo"), list):
                return photos
            failure = TransientError("unreadable", "the answer holds no list of photos")
        # Outside the except block: no traceback of a library that might show a header is chained.
        raise failure

    def _classified(self, error: Exception) -> Exception:
        """What a stat=fail answer means."""
        text = self._redaction.redact(str(error))
        try:
            code = int(error.code)
        except (TypeError, ValueError):
            return TransientError("refused", text)
        if code in _TRANSIENT_CODES:
            return TransientError("unavailable", text)
        if code in _KEY_CODES:
            return _refused(text)
        if code in _CLIENT_CODES:
            return ServiceError(f"Flickr no longer understands this client ({text}): update graft-pipeline.")
        return InputError(
            f"Flickr cannot answer this search ({text}): check search locations, radius and dates."
        )

    def _check_status(self, response: Any, **_: Any) -> None:
        """Response hook: sees status and headers, which flickrapi drops, before the body is read or logged."""
        status = response.status_code
        if status == 200:
            self._read_body(response)
            return
        response.close()
        what = f"HTTP {status}"
        if status in TRANSIENT_STATUSES:
            retry_after_s = parse_retry_after(response.headers.get("retry-after"))
            raise TransientError("unavailable", what, retry_after_s=retry_after_s)
        if 300 <= status < 400:
            target = host_of(response.headers.get("location", ""))
            raise TransientError("redirected", f"{what}, redirected to {target}; is a proxy in between?")
        if status in (401, 403):
            raise _refused(what)
        raise ServiceError(f"Flickr ({host_of(self._url)}) answers {what}: check GRAFT_FLICKR_URL.")

    def _read_body(self, response: Any) -> None:
        """Read a body within limits; requests has none, and would wait for a dripping server for ever."""
        try:
            content = read_body(response.raw, MAX_BYTES, 3 * self._timeout_s, time.monotonic())
        except BodyTooLargeError as error:
            raise TransientError("unreadable", f"the answer is too large ({error})") from None
        except TimeoutError as error:
            raise TransientError("timeout", str(error), is_unreachable=True) from None
        except ConnectionError as error:
            raise TransientError("connection", f"the answer broke off ({error})") from None
        with self._lock:
            self.downloaded_bytes += len(content)
        # Where requests keeps a body that was read. An odd character of one title must not cost the page: bytes that
        # are no UTF-8, or controls that JSON allows in no text.
        response._content = content.decode("utf-8-sig", "replace").translate(_CONTROLS).encode()
        response._content_consumed = True
        response.raw.release_conn()

    def _paced_api(self) -> Any:
        """The flickrapi object, once the pace allows one more call."""
        with self._lock:
            if self._opened is None:
                self._opened = self._open()
            api, limiter = self._opened
        try:
            limiter.try_acquire("flickr")
        except sqlite3.Error as error:
            raise self._pacing_error(error) from error
        with self._lock:
            self.calls += 1
        return api

    def _open(self) -> tuple[Any, Any]:
        import requests
        from pyrate_limiter import Duration, Limiter, Rate, StateBucket

        # Evenly spread: a burst at the start of an hour would lock every other user of the key out.
        per_hour = self._calls_per_hour
        rate = (
            Rate(per_hour // 3600, Duration.SECOND)
            if per_hour >= 3600
            else Rate(1, math.ceil(3.6e6 / per_hour))
        )
        try:
            if self._pacing_file is None:
                limiter = Limiter(StateBucket([rate]), buffer_ms=1)
            else:
                self._pacing_file.parent.mkdir(parents=True, exist_ok=True)
                bucket = _bucket_class().init_from_file(
                    [rate], db_path=str(self._pacing_file), use_file_lock=True
                )
                limiter = Limiter(bucket, buffer_ms=1)
        except (OSError, sqlite3.Error) as error:
            raise self._pacing_error(error) from error
        for name in _TALKATIVE_LOGGERS:
            logging.getLogger(name).addFilter(self._redaction)
        api = _api_class()(
            self._key, self._secret, format="parsed-json", store_token=False, timeout=self._timeout_s
        )
        api.REST_URL = self._url
        # flickrapi shares one session between all its objects; ours is this object's own.
        session = requests.Session()
        session.headers["User-Agent"] = USER_AGENT
        session.hooks["response"].append(self._check_status)
        api.flickr_oauth.session = session
        return api, limiter

    def _pacing_error(self, error: Exception) -> GraftError:
        return SettingsError(
            f"The pace of Flickr calls cannot be kept in {self._pacing_file} ({error}): "
            "make its folder writable, set GRAFT_FLICKR_PACING_FILE to another place on a local disk, "
            "or delete the file if it is damaged."
        )


def _whole_seconds(start: datetime, end: datetime) -> tuple[int, int]:
    """A half-open window of whole Unix seconds that holds the given one."""
    if start.tzinfo is None or end.tzinfo is None:
        raise InputError("Upload times need a time zone: pass datetimes in UTC.")
    return math.floor(start.timestamp()), math.ceil(end.timestamp())


def _has_id(record: Any) -> bool:
    return isinstance(record, dict) and record.get("id") not in (None, "")


def _refused(what: str) -> SettingsError:
    return SettingsError(
        f"Flickr refused the key ({what}): check GRAFT_FLICKR_KEY and GRAFT_FLICKR_SECRET "
        "at https://www.flickr.com/services/apps."
    )


def _cause(error: BaseException) -> str:
    """The innermost reason of a connection error, without memory addresses."""
    reason: Any = error
    while reason.args and isinstance(reason.args[0], BaseException):
        reason = reason.args[0]
    reason = getattr(reason, "reason", reason)
    text = str(reason)
    return text.split(": ", 1)[-1] if " at 0x" in text else text

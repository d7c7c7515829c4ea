"""The STAC client: lists scenes through an API's item search, cuts chips out of cloud-optimised GeoTIFFs by ranges.

Which scene serves which chip is decided in graft_pipeline/scenes.py; how rasters are reprojected, in rasters.py.
"""

import functools
import importlib.util
import io
import json
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

import numpy as np
from numpy.typing import NDArray

from graft_pipeline.errors import GraftError, InputError, ServiceError, SettingsError
from graft_pipeline.geometry import Grid
from graft_pipeline.imagery import Sensor
from graft_pipeline.settings import Settings
from resources.http import (
    USER_AGENT,
    Answer,
    Breaker,
    HttpPool,
    Pace,
    Retries,
    TransientError,
    host_of,
    is_http_url,
    is_private_host,
)
from resources.imagery import (
    TRANSPORT_ERRORS,
    RequestError,
    checked_window,
    chip_or_item_error,
    scene_record,
    status_failure,
    transport_failure,
    widened,
)
from resources.rasters import MAX_BLOCK_BYTES, block_bytes, cut

logger = logging.getLogger(__name__)

#: Items of a page: the catalogues' items of Sentinel-2 are tens of kilobytes, of which we ask for a few fields.
PAGE_SIZE = 250
#: Bytes that are fetched first: a cloud-optimised GeoTIFF of a scene keeps all of its directories in them.
HEADER_BYTES = 1 << 15
#: Items and headers that are kept, about 32 MB: neighbouring chips share scenes.
_KEPT = 1024
#: A token is renewed so long before it expires.
_TOKEN_MARGIN_S = 120.0
MAX_REDIRECTS = 3
_REDIRECTS = frozenset({301, 302, 307, 308})
#: First processing baseline whose values are shifted (Sentinel-2 products, ESA).
_SHIFTED_BASELINE = 4.0
#: Assets of Sentinel-2 that hold no reflectance, and are not shifted.
_UNSHIFTED = frozenset({"aot", "wvp", "scl", "visual", "cloud", "snow"})
#: Properties that say which baseline an item has, and whether its catalogue took the shift back.
_BASELINE = ("s2:processing_baseline", "earthsearch:boa_offset_applied")

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class _Header:
    """Size of a remote file, and its first bytes."""

    size: int
    content: bytes = field(repr=False)


class Stac:
    """A STAC API as graft_pipeline needs it: paced, retried, classified; every byte range checked.

    Items are searched with pystac-client. GeoTIFFs are read by ranges through our own transport, not GDAL's: it
    counts and paces requests, and a failed one is tried again instead of staying in a cache. Links that answers name
    may lead into private networks only if the API itself is in one.

    Args:
        url: landing page of the API.
        concurrency: requests at the same time.
        requests_per_second: pace.
        timeout_s: limit of one connect, and of each wait for bytes.
        retries: attempts and waits per request.

    Attributes:
        concurrency: as given; for the caller's thread pool.
        requests: HTTP requests so far, retries included.
        downloaded_bytes: bytes of their answers.
    """

    def __init__(
        self,
        *,
        url: str,
        concurrency: int = 16,
        requests_per_second: int = 100,
        timeout_s: float = 60.0,
        retries: Retries | None = None,
    ) -> None:
        if not is_http_url(url):
            raise SettingsError(f"The STAC API's address {url!r} is no http(s) URL: correct GRAFT_STAC_URL.")
        if importlib.util.find_spec("pystac_client") is None:
            raise SettingsError("GRAFT_IMAGERY=stac needs pystac-client: pip install 'graft-pipeline[stac]'.")
        self.concurrency = concurrency
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._pace = Pace("stac", concurrency=concurrency, requests_per_second=requests_per_second)
        self._retries = retries or Retries()
        self._breaker = Breaker("STAC", url, limit=max(20, 2 * concurrency))
        self._lock = threading.Lock()
        self._items: OrderedDict[tuple[str, str], dict[str, Any]] = OrderedDict()
        self._headers: OrderedDict[str, _Header] = OrderedDict()
        self._tokens: dict[str, tuple[str, float]] = {}
        #: Hosts that gave ranges of files.
        self._giving: set[str] = set()

    @classmethod
    def from_settings(cls, settings: Settings, *, retries: Retries | None = None) -> "Stac":
        """The client of a deployment.

        Args:
            settings: names URL, limits and timeout.
            retries: attempts and waits per request.
        """
        return cls(
            url=settings.stac_url,
            concurrency=settings.stac_concurrency,
            requests_per_second=settings.stac_requests_per_second,
            timeout_s=settings.stac_timeout_s,
            retries=retries,
        )

    @functools.cached_property
    def _pool(self) -> HttpPool:
        return HttpPool(
            connections=self.concurrency,
            timeout_s=self._timeout_s,
            public_only=not is_private_host(self._url),
        )

    def __repr__(self) -> str:
        return f"Stac(url={self._url!r}, requests={self.requests})"

    @property
    def requests(self) -> int:
        """HTTP requests so far."""
        return self._pool.requests

    @property
    def downloaded_bytes(self) -> int:
        """Bytes of the answers so far."""
        return self._pool.downloaded_bytes

    def list_scenes(
        self,
        sensor: Sensor,
        bounds: tuple[float, float, float, float],
        start: datetime | None = None,
        end: datetime | None = None,
    ) -> list[dict[str, Any]]:
        """Every item of a sensor's collection that touches a box, was acquired in time and is clear enough.

        Args:
            sensor: names the collection and its cloud rule.
            bounds: (west, south, east, north), degrees of EPSG:4326. Scenes up to 0.01 degrees outside may be
                listed as well.
            start: first acquisition time; the sensor's `listed_from` unless given.
            end: acquired before this time; unlimited unless given.

        Returns:
            Scenes as `scenes.scene_rows` takes them, unique by id. Items that lack an asset of the sensor's bands,
            its grid or a time are left out there.

        Raises:
            InputError: if the collection does not exist, or the query is refused.
            SettingsError: if the API refuses credentials, or is none.
            ServiceError: if it cannot be reached, or keeps failing.
        """
        first, last = checked_window(sensor, start, end)
        box = widened(bounds)
        with self._listing(sensor):
            client = self._client
            query: dict[str, Any] = {
                "collections": [sensor.collection],
                "bbox": list(box),
                # Intervals of whole seconds that include their end: what is too much is left out below.
                "datetime": [first, None if last is None else last + timedelta(seconds=1)],
                "limit": PAGE_SIZE,
            }
            if sensor.scene_limit_pct is not None and client.conforms_to("QUERY"):
                query["query"] = {str(sensor.cloud_property): {"lt": sensor.scene_limit_pct}}
            if client.conforms_to("FIELDS"):
                query["fields"] = _fields(sensor)
            scenes: dict[str, dict[str, Any]] = {}
            for item in client.search(**query).items_as_dicts():
                scene = _scene(item, sensor)
                if _is_wanted(scene, sensor, first, last):
                    scenes.setdefault(scene["id"], scene)
            if not scenes:
                # A collection that does not exist has no items either; asked for by name it is not found.
                self._ask(f"{self._url}/collections/{quote(sensor.collection, safe='')}")
        return list(scenes.values())

    def get_chip(self, sensor: Sensor, scene_id: str, grid: Grid) -> NDArray[Any]:
        """The pixels of one scene on a grid, from the ranges of its files that lie below it.

        Args:
            sensor: names the assets.
            scene_id: id of an item of its collection.
            grid: where; its CRS must be projected, metres.

        Returns:
            (grid.height_px, grid.width_px, bands) array of the sensor's requested bands in the source's own
            dtype, the widest of them if they differ; 0 where the scene has no data.

        Raises:
            ItemError: if this chip cannot be had. Permanent: `scene_missing`, `bad_request`. To be tried
                again: `invalid_pixels`, `truncated`, `timeout`, `connection`, `unavailable`, `rate_limited`,
                `forbidden` (a file, where others were not).
            SettingsError: if access is refused.
            ServiceError: if a host cannot be reached, or chip after chip fails.
        """

        def attempt() -> NDArray[Any]:
            item = self._item(sensor, scene_id)
            return _shifted(self._cut(item, sensor, grid), item, sensor)

        return chip_or_item_error(scene_id, attempt, self._retries, self._breaker, self._unreachable)

    # --- the API ---

    @contextmanager
    def _listing(self, sensor: Sensor) -> Iterator[None]:
        """Errors of a search, in a user's words."""
        from pystac import STACError, STACTypeError
        from pystac_client.errors import ClientTypeError
        from pystac_client.exceptions import APIError
        from pystac_client.warnings import DoesNotConformTo

        unfit = (STACError, STACTypeError, ClientTypeError, APIError, DoesNotConformTo, KeyError)
        what = f"The STAC API ({host_of(self._url)})"
        try:
            yield
        except TransientError as error:
            if error.is_unreachable:
                raise self._unreachable(error) from None
            raise ServiceError(
                f"{what} keeps failing to list {sensor.collection}: {error}. Run again later: finished work is kept."
            ) from None
        except RequestError as error:
            raise InputError(
                f"{what} cannot list {sensor.collection} ({error}): check GRAFT_STAC_URL, the sensor's collection, "
                "its cloud property and the region."
            ) from None
        except unfit as error:
            raise SettingsError(
                f"{what} is no STAC API with item search ({type(error).__name__}: {error}): check GRAFT_STAC_URL."
            ) from None

    @functools.cached_property
    def _client(self) -> Any:
        """pystac-client's catalogue, over our transport."""
        import pystac_client
        from pystac_client.stac_api_io import StacApiIO

        ask = self._ask

        class PooledIO(StacApiIO):
            """What pystac-client sends its requests through."""

            def request(
                self,
                href: str,
                method: str | None = None,
                headers: dict[str, str] | None = None,
                parameters: dict[str, Any] | None = None,
            ) -> str:
                import requests

                verb = (method or "GET").upper()
                content = {"json": parameters} if verb == "POST" else {"params": parameters or {}}
                prepared = requests.Request(verb, href, headers=headers, **content).prepare()
                return json.dumps(
                    ask(str(prepared.url), method=verb, body=prepared.body, headers=dict(prepared.headers))
                )

        return pystac_client.Client.open(self._url, stac_io=PooledIO())

    def _item(self, sensor: Sensor, scene_id: str) -> dict[str, Any]:
        def load() -> dict[str, Any]:
            collection, item = quote(sensor.collection, safe=""), quote(scene_id, safe="")
            return _needed(self._ask(f"{self._url}/collections/{collection}/items/{item}"))

        return self._kept(self._items, (sensor.collection, scene_id), load)

    def _ask(self, url: str, **request: Any) -> Any:
        """JSON of an address, retried."""

        def attempt() -> Any:
            answer = self._request(url, **request)
            if answer.status != 200:
                raise self._failure(answer)
            try:
                found = json.loads(answer.body)
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                raise TransientError("unreadable", "the answer is no JSON object; is a proxy in between?")
            return found

        return self._retries.call(attempt)

    # --- files ---

    def _cut(self, item: Mapping[str, Any], sensor: Sensor, grid: Grid) -> NDArray[Any]:
        import rasterio
        from rasterio.errors import RasterioError

        failures: list[Exception] = []
        hrefs: dict[str, str] = {}
        parts: list[tuple[Any, int]] = []
        for band in sensor.requested_bands:
            key, number = _asset_of(band)
            hrefs[key] = _href(item, key)
            parts.append((key, number))
        try:
            # GDAL looks for files beside the one that it opens, unless told not to.
            with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"), ExitStack() as stack:
                opened: dict[str, Any] = {}
                for key, href in hrefs.items():
                    opener = self._opener(href, sensor, failures)
                    opened[key] = stack.enter_context(
                        rasterio.open("/scene.tif", driver="GTiff", opener=opener)
                    )
                    if (size := block_bytes(opened[key])) > MAX_BLOCK_BYTES:
                        raise RequestError(f"asset {key!r} has blocks of {size} bytes", 400)
                for key, number in parts:
                    if number > opened[key].count:
                        raise RequestError(f"asset {key!r} has {opened[key].count} bands, not {number}", 400)
                chip = cut([(opened[key], number) for key, number in parts], grid)
        except (RasterioError, UnicodeDecodeError) as error:
            if not failures:
                # Ranges came as asked for, but not with a GeoTIFF's content: the first may be to blame.
                with self._lock:
                    for href in hrefs.values():
                        self._headers.pop(href, None)
                raise TransientError("truncated", f"the GeoTIFF cannot be read: {error}") from None
            chip = None
        if failures:
            raise failures[0]
        if sensor.display_range is None and chip.dtype != np.uint8:
            raise RequestError(f"bands of type {chip.dtype}: set the sensor's display_range", 400)
        return chip

    def _opener(self, href: str, sensor: Sensor, failures: list[Exception]) -> Callable[..., io.RawIOBase]:
        """What rasterio opens an asset with; failures are noted, as GDAL lets no exception through."""

        def guarded(start: int, end: int) -> bytes:
            try:
                return self._range(href, sensor, start, end)
            except (TransientError, RequestError, GraftError) as error:
                failures.append(error)
                return b""

        try:
            header = self._kept(self._headers, href, lambda: self._head(href, sensor))
        except (TransientError, RequestError, GraftError) as error:
            failures.append(error)
            header = _Header(0, b"")
        return lambda *_, **__: _RangeFile(header, guarded)

    def _head(self, href: str, sensor: Sensor) -> _Header:
        answer = self._ranged(href, sensor, 0, HEADER_BYTES)
        return _Header(_size(answer), answer.body)

    def _range(self, href: str, sensor: Sensor, start: int, end: int) -> bytes:
        return self._ranged(href, sensor, start, end).body

    def _ranged(self, href: str, sensor: Sensor, start: int, end: int) -> Answer:
        """Bytes start (included) to end (excluded, or the file's) of a file, retried and checked."""
        refusals, host = 0, host_of(href)

        def attempt() -> Answer:
            nonlocal refusals
            headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            token = self._token(sensor)
            signed = f"{href}{'&' if urlsplit(href).query else '?'}{token}" if token else href
            answer = self._request(signed, headers=headers)
            if answer.status in (401, 403):
                refusals += 1
                message = f"HTTP {answer.status}: {answer.reason}"
                if token and refusals == 1:
                    # It may have expired by the service's clock, or was never good.
                    self._forget_token(token)
                    raise TransientError("forbidden", message, is_quick=True)
                if not self._giving:
                    raise self._refused(message)
                # Some stores say so of a file that is not there.
                raise TransientError("forbidden", message, is_exhausted=True)
            if answer.status != 206:
                raise self._failure(answer)
            found = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
            if found is None or int(found[1]) != start or int(found[2]) + 1 != min(end, int(found[3])):
                got = answer.headers.get("content-range")
                raise TransientError("invalid_pixels", f"range {got!r} instead of {start}-{end - 1}")
            if len(answer.body) != int(found[2]) + 1 - start:
                raise TransientError("truncated", f"{len(answer.body)} bytes of the range {start}-{end - 1}")
            self._giving.add(host)
            return answer

        try:
            return self._retries.call(attempt)
        except TransientError as error:
            if error.is_unreachable and self._giving and host not in self._giving:
                # The network is there: it is this link that leads nowhere.
                raise TransientError("connection", f"{host}: {error}", is_exhausted=True) from None
            raise

    def _token(self, sensor: Sensor) -> str | None:
        """What is appended to links of the sensor's collection, if anything."""
        if sensor.token_url is None:
            return None
        address = f"{sensor.token_url.rstrip('/')}/{quote(sensor.collection, safe='')}"
        with self._lock:
            token, expires_s = self._tokens.get(address, ("", 0.0))
        if time.time() > expires_s - _TOKEN_MARGIN_S:
            try:
                found = self._ask(address)
                token = str(found["token"])
                expires_s = datetime.fromisoformat(str(found["msft:expiry"])).timestamp()
            except (RequestError, KeyError, ValueError) as error:
                raise SettingsError(
                    f"{host_of(address)} gives no token for {sensor.collection} ({error}): correct the sensor's "
                    "token_url."
                ) from None
            with self._lock:
                self._tokens[address] = token, expires_s
        return token

    def _forget_token(self, token: str) -> None:
        with self._lock:
            self._tokens = {address: kept for address, kept in self._tokens.items() if kept[0] != token}

    # --- both ---

    def _request(self, url: str, **request: Any) -> Answer:
        """One request within the limits, and those that it is redirected to."""
        headers = {"User-Agent": USER_AGENT, **(request.pop("headers", None) or {})}
        method = request.pop("method", "GET")
        for _ in range(MAX_REDIRECTS + 1):
            if not is_http_url(url):
                # Without what it is signed with.
                raise RequestError(f"{url.partition('?')[0]!r} is no http(s) link", 400)
            with self._pace.slot():
                try:
                    answer = self._pool.request(method, url, headers=headers, **request)
                except TRANSPORT_ERRORS as error:
                    raise transport_failure(error) from None
            target = answer.headers.get("location")
            if answer.status not in _REDIRECTS or not target:
                return answer
            try:
                url = urljoin(url, target)
            except ValueError:
                break
        raise RequestError(f"HTTP {answer.status}: redirected for ever, or nowhere", answer.status)

    def _failure(self, answer: Answer) -> Exception:
        if 200 <= answer.status < 300:
            kind = "a whole file" if answer.status == 200 else f"HTTP {answer.status}"
            return TransientError("invalid_pixels", f"{kind} instead of a range")
        message = f"HTTP {answer.status}: {answer.reason}"
        return status_failure(answer.status, message, answer.retry_after_s, self._refused)

    def _refused(self, message: str) -> SettingsError:
        return SettingsError(
            f"The STAC API or its files refuse access ({message}): check the sensor's token_url, and that the "
            "collection is open to you."
        )

    def _unreachable(self, error: TransientError) -> ServiceError:
        return ServiceError(
            f"The STAC API ({host_of(self._url)}) or its files cannot be reached: {error}. Check the network, the "
            "proxy (HTTPS_PROXY) and GRAFT_STAC_URL, then run again: finished work is kept."
        )

    def _kept(self, store: "OrderedDict[Key, Value]", key: Key, load: Callable[[], Value]) -> Value:
        """A value that was loaded before, or is now."""
        with self._lock:
            if key in store:
                store.move_to_end(key)
                return store[key]
        value = load()
        with self._lock:
            store[key] = value
            while len(store) > _KEPT:
                store.popitem(last=False)
        return value


class _RangeFile(io.RawIOBase):
    """A remote file as rasterio reads it: the header's bytes at once, others range by range."""

    def __init__(self, header: _Header, fetch: Callable[[int, int], bytes]) -> None:
        super().__init__()
        self._header = header
        self._fetch = fetch
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._header.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        start, known = self._position, self._header.content
        end = self._header.size if size is None or size < 0 else min(start + size, self._header.size)
        if start >= end:
            return b""
        content = known[start:end]
        if end > len(known):
            content += self._fetch(max(start, len(known)), end)
        self._position += len(content)
        return content


def _size(answer: Answer) -> int:
    found = _CONTENT_RANGE.fullmatch(answer.headers["content-range"])
    assert found is not None
    return int(found[3])


def _asset_of(band: str) -> tuple[str, int]:
    """Asset key and band number of a sensor's band, such as `image:2`."""
    key, _, number = band.rpartition(":")
    return (key, int(number)) if key and number.isdigit() else (band, 1)


def _needed(item: Mapping[str, Any]) -> dict[str, Any]:
    """What a chip needs of an item; whole ones of Sentinel-2 are a hundred kilobytes."""
    properties, assets = item.get("properties") or {}, item.get("assets") or {}
    return {
        "properties": {name: properties.get(name) for name in _BASELINE},
        "links": [link for link in item.get("links") or [] if link.get("rel") == "self" and link.get("href")],
        "assets": {key: {"href": asset.get("href")} for key, asset in assets.items()},
    }


def _href(item: Mapping[str, Any], key: str) -> str:
    asset = item["assets"].get(key)
    if asset is None or not isinstance(asset["href"], str):
        raise RequestError(f"the item has no asset {key!r}", 400)
    links = [link["href"] for link in item["links"]]
    return urljoin(links[0], asset["href"]) if links else str(asset["href"])


def _fields(sensor: Sensor) -> dict[str, list[str]]:
    """What is read of an item, for APIs that leave out the rest."""
    keys = dict.fromkeys(_asset_of(band)[0] for band in sensor.requested_bands)
    properties = ["datetime", "start_datetime", *_PROJECTION, *filter(None, [sensor.cloud_property])]
    return {
        "include": [
            *("id", "geometry", "bbox", "collection", "type", "stac_version"),
            *(f"properties.{name}" for name in properties),
            *(f"assets.{key}" for key in keys),
        ],
        "exclude": ["links"],
    }


#: Fields of STAC's projection extension, of its versions 1 (epsg) and 2 (code).
_PROJECTION = ("proj:code", "proj:epsg", "proj:shape", "proj:transform", "proj:bbox")


def _scene(item: Mapping[str, Any], sensor: Sensor) -> dict[str, Any]:
    """An item as a scene's record; what it lacks is left empty, so that no row is made of it."""
    properties, assets = item.get("properties") or {}, item.get("assets") or {}
    keys = [_asset_of(band)[0] for band in sensor.requested_bands]
    complete = all(key in assets for key in keys)
    # Assets of several resolutions state their own grids: that of the first band is the scene's.
    projection = {**properties, **(assets.get(keys[0]) or {})}
    code = projection.get("proj:code") or f"EPSG:{projection.get('proj:epsg')}"
    affine, size = _grid_of(projection)
    cloud = properties.get(sensor.cloud_property or "")
    return scene_record(
        str(item.get("id") or ""),
        _time(properties.get("datetime") or properties.get("start_datetime")),
        sensor.requested_bands if complete else (),
        str(code),
        affine,
        size,
        item.get("geometry"),
        {sensor.cloud_property: cloud} if sensor.cloud_property and _is_number(cloud) else {},
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _grid_of(
    projection: Mapping[str, Any],
) -> tuple[tuple[float, float, float, float, float, float], tuple[int, int]]:
    """Transform and (width, height) by the projection extension; zeros where it does not say."""
    nothing = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0), (0, 0)
    try:
        height, width = (int(side) for side in projection["proj:shape"])
        if projection.get("proj:transform"):
            a, b, c, d, e, f, *_ = (float(number) for number in projection["proj:transform"])
            return (a, b, c, d, e, f), (width, height)
        x_min, y_min, x_max, y_max = (float(edge) for edge in projection["proj:bbox"])
        return ((x_max - x_min) / width, 0.0, x_min, 0.0, (y_min - y_max) / height, y_max), (width, height)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return nothing


def _time(text: Any) -> datetime | None:
    try:
        time = datetime.fromisoformat(str(text))
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _is_wanted(scene: Mapping[str, Any], sensor: Sensor, first: datetime, last: datetime | None) -> bool:
    """Whether a listed scene is in time and clear enough, whatever the API made of the query."""
    if sensor.scene_limit_pct is not None:
        cloud = scene["properties"].get(sensor.cloud_property)
        if cloud is None or float(cloud) >= sensor.scene_limit_pct:
            return False
    if scene["startTime"] is None:
        return True
    acquired = datetime.fromisoformat(scene["startTime"])
    return first <= acquired and (last is None or acquired < last)


def _shifted(chip: NDArray[Any], item: Mapping[str, Any], sensor: Sensor) -> NDArray[Any]:
    """A chip's values on the scale of Sentinel-2's older processing baselines.

    Only valid values are shifted, and none becomes 0, which means no data; values that are not finite stay. Earth
    Search says in `earthsearch:boa_offset_applied` that it did this already.
    """
    baseline, is_done = (item["properties"][name] for name in _BASELINE)
    if not sensor.offset or is_done:
        return chip
    try:
        is_shifted = float(baseline or 0.0) >= _SHIFTED_BASELINE
    except (TypeError, ValueError):
        is_shifted = False
    if not is_shifted:
        return chip
    reflectance = [
        name != sensor.mask_band and _asset_of(name)[0].lower() not in _UNSHIFTED
        for name in sensor.requested_bands
    ]
    values = chip[..., reflectance]
    is_valid = (values != 0) & np.isfinite(values)
    moved = np.maximum(np.where(is_valid, values, 0).astype(np.int64) + sensor.offset, 1)
    chip[..., reflectance] = np.where(is_valid, moved, values).astype(chip.dtype)
    return chip

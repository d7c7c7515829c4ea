"""The subset of Flickr's REST API and of its static image hosts that production uses, over the planet's photos.

Sources: flickr.com/services/api (photos.search, test.echo, misc.urls). Which photos exist and what they show is
photographers.py and ground.py; only `format=json` is answered.
"""

import json
import math
import re
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qs, unquote

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from resources.planet.noise import hashes, salt, uniforms
from resources.planet.photographers import distance_km
from resources.planet.world import World

#: This key is refused, so that tests can meet Flickr's answer.
INVALID_KEY = "invalid"
#: No query yields more different photos than this; later pages repeat earlier ones.
RESULT_CEILING = 4000
MAX_PER_PAGE, MAX_PER_PAGE_GEO, DEFAULT_PER_PAGE = 500, 250, 100
MAX_RADIUS_KM = 32.0
#: A square degree holds 33,000 photos, and making them takes seconds.
MAX_BBOX_DEG2 = 4.0
#: Share of photos that are not safe; half of them are restricted. Every key may see them here: the real site
#: shows them to users who have signed in only.
UNSAFE_SHARE = 0.01
#: The planet's own code for a place that is none; Flickr's is not documented.
BAD_PLACE = 999

_DATES = ("min_upload_date", "max_upload_date", "min_taken_date", "max_taken_date")
_SORTS = ("date-posted-asc", "date-posted-desc", "date-taken-asc", "date-taken-desc")
_IMAGE_NAME = re.compile(r"(\d+)_([0-9a-f]+)(?:_([a-z]))?\.jpg")
#: Suffix of the file name by the letter of the `url_*` extra (flickr.com/services/api/misc.urls.html).
_SUFFIXES = {"t": "_t", "s": "_m", "n": "_n", "m": "", "z": "_z", "c": "_c", "l": "_b"}
_LETTERS = {suffix.removeprefix("_"): letter for letter, suffix in _SUFFIXES.items()}


class FlickrError(Exception):
    """A `stat: fail` answer; Flickr sends it with HTTP 200.

    Attributes:
        code: Flickr's error code.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Search:
    """The parsed parameters of `flickr.photos.search` that decide which photos match, and their order.

    Attributes:
        circle: (lon, lat, radius_km), or None.
        bbox: (west, south, east, north), or None. One of both is given.
        uploaded: inclusive bounds, Unix seconds.
        taken: inclusive bounds, owner's clock as Unix seconds.
        accuracy: least geotag accuracy.
        content_types: Flickr's content types that match: 1 photos, 2 screenshots, 3 other.
        media: `photos`, `videos` or `all`.
        licenses: licence ids that match; empty: all.
        safe_search: highest safety level that matches: 1 safe, 2 moderate, 3 restricted.
        tags: tags of which any (or all) must be there; empty: no rule.
        all_tags: whether all tags must be there.
        text: words that title or tags must hold; empty: no rule.
        sort: one of `_SORTS`, or "" for the distance from a circle's centre.
    """

    circle: tuple[float, float, float] | None = None
    bbox: tuple[float, float, float, float] | None = None
    uploaded: tuple[float, float] = (-math.inf, math.inf)
    taken: tuple[float, float] = (-math.inf, math.inf)
    accuracy: int = 16
    content_types: frozenset[int] = frozenset({1, 2, 3})
    media: str = "all"
    licenses: frozenset[str] = frozenset()
    safe_search: int = 1
    tags: frozenset[str] = frozenset()
    all_tags: bool = False
    text: str = ""
    sort: str = "date-posted-desc"


class FlickrApi:
    """Handlers of the Flickr routes; they may run in any number of threads.

    Args:
        world: takes the photos.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._nonces = _Nonces()
        # A search is asked for page by page.
        self._found = lru_cache(maxsize=64)(self._find)

    def call(self, request: Request) -> Response:
        """`/services/rest/`: methods with a `method` parameter, GET or POST form."""
        fields = {
            **parse_qs(request.url.query, keep_blank_values=True),
            **parse_qs(request.state.body.decode("utf-8", "replace"), keep_blank_values=True),
        }
        parameters = {name: values[-1] for name, values in fields.items()}
        oauth = _oauth(request.headers.get("authorization", ""))
        nonce = oauth.get("oauth_nonce") or parameters.get("oauth_nonce")
        if nonce and not self._nonces.is_new(nonce):
            # Strict as OAuth asks: a request that is sent again has to be signed again.
            return PlainTextResponse("oauth_problem=nonce_used", 401)
        key = (
            oauth.get("oauth_consumer_key")
            or parameters.get("oauth_consumer_key")
            or parameters.get("api_key")
        )
        try:
            answer = {**self._answer(parameters, key), "stat": "ok"}
        except FlickrError as failure:
            answer = {"stat": "fail", "code": failure.code, "message": str(failure)}
        if parameters.get("nojsoncallback") == "1":
            return JSONResponse(answer)
        return Response(f"jsonFlickrApi({json.dumps(answer)})", media_type="text/javascript")

    def _answer(self, parameters: Mapping[str, str], key: str | None) -> dict[str, Any]:
        wanted = parameters.get("format", "rest")
        if wanted != "json":
            raise FlickrError(111, f'Format "{wanted}" not found')
        if not key or key == INVALID_KEY:
            raise FlickrError(100, "Invalid API Key (Key has invalid format)")
        method = parameters.get("method", "")
        if method == "flickr.test.echo":
            return {name: {"_content": value} for name, value in parameters.items()}
        if method != "flickr.photos.search":
            raise FlickrError(112, f'Method "{method}" not found')
        return {"photos": self._search(parameters)}

    def _search(self, parameters: Mapping[str, str]) -> dict[str, Any]:
        search = parse_search(parameters, self._world.now)
        per_page = _number(parameters, "per_page", DEFAULT_PER_PAGE, 1, MAX_PER_PAGE)
        per_page = min(per_page, MAX_PER_PAGE_GEO)
        page = _number(parameters, "page", 1, 1, 1_000_000)
        count, found = self._found(search)
        pages = math.ceil(count / per_page)
        rows = found[:0]
        if page <= pages:
            # Beyond the ceiling the site starts over.
            start = (page - 1) % math.ceil(RESULT_CEILING / per_page) * per_page
            rows = found[start : start + per_page]
        extras = {name for name in re.split(r"[,\s]+", parameters.get("extras", "")) if name}
        total: int | str = count
        # The real site answers now with a number, now with a string.
        if hashes(salt("total"), count, page)[0] & np.uint64(1):
            total = str(total)
        return {
            "page": page,
            "pages": pages,
            "perpage": per_page,
            "total": total,
            "photo": [photo_json(self._world, photo, extras) for photo in rows],
        }

    def _find(self, search: Search) -> tuple[int, np.ndarray]:
        """How many photos match, and in the order asked for those below the ceiling: `photographers.PHOTO_DTYPE`."""
        if search.circle is not None:
            photos = self._world.photos_near(*search.circle)
        else:
            assert search.bbox is not None
            photos = self._world.photos_in(*search.bbox)
        photos = photos[_matches(photos, search)]
        if search.sort:
            what, _, direction = search.sort.removeprefix("date-").partition("-")
            order = photos["uploaded_at" if what == "posted" else "taken_at_local"]
            order = order if direction == "asc" else -order
        else:
            assert search.circle is not None
            order = distance_km(*search.circle[:2], photos["lon_deg"], photos["lat_deg"])
        # A row takes a kilobyte, and searches are kept: what is never shown is not.
        return len(photos), photos[np.lexsort((photos["photo_id"], order))[:RESULT_CEILING]]

    def image(self, request: Request) -> Response:
        """`/static/{server}/{id}_{secret}_{letter}.jpg`: the files behind `url_*`, good and bad."""
        match = _IMAGE_NAME.fullmatch(request.path_params["name"])
        photo = self._world.photo(match[1]) if match else None
        if match is None or photo is None:
            return PlainTextResponse("Not Found", 404)
        size = _LETTERS.get(match[3] or "")
        is_named = (request.path_params["server"], match[2]) == (str(photo["server"]), str(photo["secret"]))
        found = self._world.photo_file(match[1], size) if size and is_named else None
        if found is None:
            return PlainTextResponse("Not Found", 404)
        return Response(found[0], media_type=found[1])


def _matches(photos: np.ndarray, search: Search) -> np.ndarray:
    """(N,) bool: which rows a search accepts, its place aside."""
    matches = (photos["uploaded_at"] >= search.uploaded[0]) & (photos["uploaded_at"] <= search.uploaded[1])
    matches &= (photos["taken_at_local"] >= search.taken[0]) & (photos["taken_at_local"] <= search.taken[1])
    matches &= photos["accuracy"] >= search.accuracy
    if 1 not in search.content_types or search.media == "videos":
        # The planet's people take photos, nothing else.
        matches[:] = False
    if search.licenses:
        matches &= np.isin(photos["license"], sorted(search.licenses))
    matches &= safety_levels(photos) <= search.safe_search
    for index in np.flatnonzero(matches) if search.tags or search.text else ():
        tags = set(str(photos["tags"][index]).lower().split())
        words = {*tags, *str(photos["title"][index]).lower().split()}
        has_tags = search.tags <= tags if search.all_tags else not search.tags or bool(search.tags & tags)
        matches[index] = has_tags and set(search.text.split()) <= words
    return matches


def safety_levels(photos: np.ndarray) -> np.ndarray:
    """What moderators made of photos: nearly all are safe.

    Args:
        photos: (N,) rows of `photographers.PHOTO_DTYPE`.

    Returns:
        (N,) int: 1 safe, 2 moderate, 3 restricted.
    """
    draw = uniforms(salt("safety"), photos["photo_id"].astype(np.int64))
    return 1 + (draw < UNSAFE_SHARE).astype(np.int64) + (draw < UNSAFE_SHARE / 2)


class _Nonces:
    """The OAuth nonces of late, each accepted once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._order: deque[str] = deque()

    def is_new(self, nonce: str) -> bool:
        with self._lock:
            if nonce in self._seen:
                return False
            self._seen.add(nonce)
            self._order.append(nonce)
            if len(self._order) > 100_000:
                self._seen.discard(self._order.popleft())
            return True


def _oauth(header: str) -> dict[str, str]:
    """The parameters of an `Authorization: OAuth ...` header."""
    scheme, _, rest = header.partition(" ")
    if scheme.lower() != "oauth":
        return {}
    return {name: unquote(value) for name, value in re.findall(r'(\w+)="([^"]*)"', rest)}


def parse_search(parameters: Mapping[str, str], now: datetime) -> Search:
    """Read the parameters of `flickr.photos.search`.

    Args:
        parameters: as sent; unknown ones are ignored, as Flickr does.
        now: the planet's present.

    Returns:
        The search.

    Raises:
        FlickrError: 3 without any restriction, 18 for contradictions, 999 for a place that is none.
    """
    circle, bbox = _circle(parameters), _bbox(parameters)
    agents = [name for name in (*_DATES, "tags", "text", "user_id", "machine_tags") if parameters.get(name)]
    if circle is None and bbox is None:
        if not agents:
            raise FlickrError(
                3, "Parameterless searches have been disabled. Please use flickr.photos.getRecent instead."
            )
        raise FlickrError(BAD_PLACE, "The planet searches by place only: give bbox, or lat, lon and radius.")
    uploaded = _date(parameters, "min_upload_date", -math.inf), _date(parameters, "max_upload_date", math.inf)
    taken = _date(parameters, "min_taken_date", -math.inf), _date(parameters, "max_taken_date", math.inf)
    if uploaded[0] > uploaded[1] or taken[0] > taken[1]:
        raise FlickrError(18, "Illogical arguments: a minimum date is later than its maximum.")
    if parameters.get("has_geo") == "0":
        raise FlickrError(18, "Illogical arguments: a place, and photos without one.")
    if not agents:
        # Geo queries without a limiting agent return the last twelve hours only.
        uploaded = (now - timedelta(hours=12)).timestamp(), math.inf
    sort = parameters.get("sort") or ("" if circle else "date-posted-desc")
    content = _number(parameters, "content_type", 7, 1, 7)
    kinds = {1: {1}, 2: {2}, 3: {3}, 4: {1, 2}, 5: {2, 3}, 6: {1, 3}, 7: {1, 2, 3}}[content]
    words = parameters.get("license", "")
    return Search(
        circle=circle,
        bbox=bbox,
        uploaded=uploaded,
        taken=taken,
        accuracy=_number(parameters, "accuracy", 16, 1, 16),
        content_types=frozenset(kinds),
        media=parameters.get("media") or "all",
        licenses=frozenset(word for word in re.split(r"[,\s]+", words) if word),
        safe_search=_number(parameters, "safe_search", 1, 1, 3),
        tags=frozenset(tag.strip().lower() for tag in parameters.get("tags", "").split(",") if tag.strip()),
        all_tags=parameters.get("tag_mode") == "all",
        text=parameters.get("text", "").lower(),
        # Orders that the planet has no notion of (relevance, interestingness) become its default.
        sort=sort if sort in _SORTS or not sort else "date-posted-desc",
    )


def _number(parameters: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    """An integer parameter; what is no number or out of range is corrected, as Flickr does."""
    try:
        return min(max(int(parameters.get(name) or default), low), high)
    except ValueError:
        return default


def _floats(text: str, count: int) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise FlickrError(BAD_PLACE, f"Not a valid place: {text[:80]!r}.")
    return numbers


def _circle(parameters: Mapping[str, str]) -> tuple[float, float, float] | None:
    if not parameters.get("lat") and not parameters.get("lon"):
        return None
    lat, lon, radius = _floats(
        f"{parameters.get('lat')},{parameters.get('lon')},{parameters.get('radius') or 5}", 3
    )
    if parameters.get("radius_units") == "mi":
        radius *= 1.609344
    if not (-90 <= lat <= 90 and -180 <= lon <= 180 and 0 < radius <= MAX_RADIUS_KM):
        raise FlickrError(BAD_PLACE, f"Not a valid place, or a radius over {MAX_RADIUS_KM:.0f} km.")
    return lon, lat, radius


def _bbox(parameters: Mapping[str, str]) -> tuple[float, float, float, float] | None:
    text = parameters.get("bbox")
    if not text:
        return None
    west, south, east, north = _floats(text, 4)
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise FlickrError(BAD_PLACE, "Not a valid bounding box.")
    if (east - west) * (north - south) > MAX_BBOX_DEG2:
        raise FlickrError(BAD_PLACE, f"The planet searches at most {MAX_BBOX_DEG2:.0f} square degrees.")
    return west, south, east, north


def _date(parameters: Mapping[str, str], name: str, default: float) -> float:
    """A Unix time, or `YYYY-MM-DD[ hh:mm:ss]`, as Unix seconds."""
    text = parameters.get(name, "").strip()
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    except ValueError as error:
        raise FlickrError(18, f"Illogical arguments: {name} is no date.") from error


def photo_json(world: World, photo: np.void, extras: set[str]) -> dict[str, Any]:
    """One record of a search's answer.

    Flickr's own types vary from photo to photo (numbers come as strings now and then); so do these, by photo.

    Args:
        world: knows the sizes.
        photo: a row of `photographers.PHOTO_DTYPE`.
        extras: what is asked for beyond the basic fields.

    Returns:
        The record, as JSON types.
    """
    photo_id, secret, server = str(photo["photo_id"]), str(photo["secret"]), str(photo["server"])
    habit = int(hashes(salt("types"), int(photo_id))[0])

    def number(value: float, bit: int) -> float | str:
        return str(value) if habit >> bit & 1 else value

    record: dict[str, Any] = {
        "id": photo_id,
        "owner": str(photo["owner"]),
        "secret": secret,
        "server": server,
        "farm": 66,
        "title": str(photo["title"]),
        "ispublic": 1,
        "isfriend": 0,
        "isfamily": 0,
    }
    if "license" in extras:
        record["license"] = str(photo["license"])
    if "description" in extras:
        record["description"] = {"_content": ""}
    if "date_upload" in extras:
        record["dateupload"] = str(photo["uploaded_at"])
    if "last_update" in extras:
        record["lastupdate"] = str(photo["uploaded_at"])
    if "date_taken" in extras:
        taken = datetime.fromtimestamp(int(photo["taken_at_local"]), UTC)
        record["datetaken"] = taken.strftime("%Y-%m-%d %H:%M:%S")
        record["datetakengranularity"] = number(int(photo["taken_granularity"]), 0)
        record["datetakenunknown"] = number(int(photo["taken_unknown"]), 1)
    if "owner_name" in extras:
        record["ownername"] = str(photo["owner_name"])
    if "tags" in extras:
        record["tags"] = str(photo["tags"])
    if "machine_tags" in extras:
        record["machine_tags"] = ""
    if "views" in extras:
        record["views"] = str(photo["views"])
    if "media" in extras:
        record |= {"media": "photo", "media_status": "ready"}
    if "geo" in extras:
        # Numbers and strings of one value: both are read back to the same float.
        record["latitude"] = number(float(photo["lat_deg"]), 2)
        record["longitude"] = number(float(photo["lon_deg"]), 2)
        record["accuracy"] = number(int(photo["accuracy"]), 3)
        record["context"] = 0
        record |= {"place_id": "", "woeid": "", "geo_is_public": 1, "geo_is_contact": 0}
        record |= {"geo_is_friend": 0, "geo_is_family": 0}
    sizes = world.photo_sizes(photo)
    if "o_dims" in extras and sizes:
        long_px, short_px = int(photo["original_px"]), round(int(photo["original_px"]) * 3 / 4)
        first, second = (short_px, long_px) if photo["is_portrait"] else (long_px, short_px)
        record |= {"o_width": str(first), "o_height": str(second)}
    for letter, suffix in _SUFFIXES.items():
        if f"url_{letter}" in extras and letter in sizes:
            width, height = sizes[letter]
            record[f"url_{letter}"] = (
                f"https://live.staticflickr.com/{server}/{photo_id}_{secret}{suffix}.jpg"
            )
            record[f"height_{letter}"] = number(height, 4)
            record[f"width_{letter}"] = number(width, 4)
    return record

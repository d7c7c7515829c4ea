"""The search page as an ASGI application: routes, errors in words, limits and security headers.

What answers is in the modules beside this one, what the browser runs in static/; cli_encoders.py starts the server.
"""

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from graft_pipeline.concept_maps import THRESHOLD
from graft_pipeline.errors import GraftError, InputError
from graft_pipeline.imagery import Sensor
from graft_pipeline.regions import Region
from graft_pipeline.search import SearchIndex
from graft_pipeline.web import parameters
from graft_pipeline.web.current import Current, OutdatedError
from graft_pipeline.web.scoring import MAX_POINTS, EncodeText, density, hits_geojson, listed
from graft_pipeline.web.tiles import Tiles, UnknownError

if TYPE_CHECKING:
    from upath import UPath

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: (z, x, y) in, PNG out; InputError for a tile that does not exist.
DrawTile = Callable[[int, int, int], bytes]

STATIC = Path(__file__).parent / "static"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
#: Longest request line's query that is read; a browser's own requests are a tenth of it.
_MAX_QUERY_CHARS = 2000
_BASEMAP_PATH = "basemap/{z}/{x}/{y}.png"


@dataclass(frozen=True)
class Basemap:
    """What the map lies on.

    Attributes:
        url: XYZ template with {z}, {x} and {y}; None: `draw` if given, else a plain background.
        attribution: of whoever made it, plain text.
        draw: draws tiles here.
        zooms: least and greatest zoom level that there are tiles of.
    """

    url: str | None = None
    attribution: str = ""
    draw: DrawTile | None = None
    zooms: tuple[int, int] = (0, 19)

    @property
    def template(self) -> str | None:
        """What the page loads tiles from."""
        return self.url or (_BASEMAP_PATH if self.draw is not None else None)

    @property
    def origin(self) -> str | None:
        """The one other host that the page may load images from."""
        if self.url is None:
            return None
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"


def create_app(
    *,
    root: "UPath",
    index: SearchIndex,
    sensor: Sensor,
    encode_text: EncodeText,
    grid_deg: float,
    basemap: Basemap | None = None,
    shows_copies: bool = False,
    host: str = "127.0.0.1",
    max_points: int = MAX_POINTS,
) -> App:
    """The search page of one sensor.

    Args:
        root: storage root.
        index: the sensor's search index; when it changes in the storage, it is opened anew.
        sensor: the sensor.
        encode_text: the text tower that belongs to the index.
        grid_deg: side of regions, degrees.
        basemap: what the map lies on; None: a plain background with the regions' borders.
        shows_copies: whether small copies of photos are shown; see `Tiles`.
        host: address that the server listens on. On loopback no other host's name is answered, so that no page of
            the web can read the answers by a name that it points here.
        max_points: tiles that the map draws one by one; more are counted in cells.

    Returns:
        An ASGI application; it answers GET only and changes nothing.
    """
    pages = _Pages(root, index, sensor, encode_text, grid_deg, basemap or Basemap(), shows_copies, max_points)
    hosts = [*LOOPBACK] if host in LOOPBACK else ["*"]
    app = Starlette(
        routes=[
            Route("/", pages.page),
            Route("/health", pages.health),
            Route("/api/about", pages.about),
            Route("/api/regions", pages.regions),
            Route("/api/search", pages.search),
            Route("/api/density", pages.density),
            Route("/api/hits.geojson", pages.hits),
            Route("/api/tile/{region}/{tile_id}", pages.tile),
            Route("/api/tile/{region}/{tile_id}/{name}.jpg", pages.chip),
            Route("/api/photo/{region}/{photo_id}.jpg", pages.photo),
            Route("/basemap/{z:int}/{x:int}/{y:int}.png", pages.basemap),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
            Middleware(_Bounds),
            Middleware(GZipMiddleware, minimum_size=2000),
        ],
        exception_handlers={
            UnknownError: _refusal(404),
            InputError: _refusal(400),
            OutdatedError: _refusal(503),
            GraftError: _refusal(500),
            HTTPException: _http_error,
            Exception: _unexpected,
        },
    )
    # Around everything, so that no answer is without them.
    return _Headers(app, _security_headers(pages.base))


class _Pages:
    """Handlers of the routes; starlette runs them in threads."""

    def __init__(
        self,
        root: "UPath",
        index: SearchIndex,
        sensor: Sensor,
        encode_text: EncodeText,
        grid_deg: float,
        basemap: Basemap,
        shows_copies: bool,
        max_points: int,
    ) -> None:
        self.base = basemap
        self._sensor, self._grid_deg, self._max_points = sensor, grid_deg, max_points
        self._current = Current(root, index, encode_text)
        self._tiles = Tiles(root, sensor, shows_copies=shows_copies)

    def page(self, request: Request) -> Response:
        """The page itself."""
        content = (STATIC / "index.html").read_bytes()
        return Response(content, media_type="text/html", headers={"Cache-Control": "no-cache"})

    def health(self, request: Request) -> Response:
        """Whether it answers, and over how many tiles."""
        tiles = self._current.get().index.rows
        return JSONResponse({"status": "ok", "sensor": self._sensor.name, "tiles": tiles})

    def about(self, request: Request) -> Response:
        """What the page needs to know of this deployment."""
        sensor, base, opened = self._sensor, self.base, self._current.get()
        return JSONResponse(
            {
                "sensor": sensor.name,
                "gsd_m": sensor.gsd_m,
                "footprint_m": sensor.crop_px * sensor.gsd_m,
                "tiles": opened.index.rows,
                "stale": len(opened.stale()),
                "threshold": THRESHOLD,
                "shows_copies": self._tiles.shows_copies,
                "max_words_chars": parameters.MAX_WORDS_CHARS,
                "basemap": base.template
                and {"url": base.template, "attribution": base.attribution, "zooms": base.zooms},
            }
        )

    def regions(self, request: Request) -> Response:
        """The index's regions: borders, and how many tiles each has."""
        return JSONResponse(
            [
                {
                    "region": key,
                    "bounds": Region.parse(key, self._grid_deg).bounds,
                    "tiles": part.rows,
                    "tile_bounds": part.bounds if part.rows else None,
                }
                for key, part in self._current.get().index.manifest.parts.items()
            ]
        )

    def search(self, request: Request) -> Response:
        """The tiles nearest to the words, best first."""
        query = parameters.parse_query(request.query_params)
        top = parameters.parse_top(request.query_params)
        return JSONResponse({"results": listed(self._current.get().scorer.nearest(query, top))})

    def density(self, request: Request) -> Response:
        """What every tile scores, for the map."""
        query = parameters.parse_query(request.query_params)
        view = parameters.parse_box(request.query_params, "view")
        return JSONResponse(density(self._current.get().scorer.scored(query), view, self._max_points))

    def hits(self, request: Request) -> Response:
        """The tiles from a contrast on, as a GeoJSON file."""
        query = parameters.parse_query(request.query_params)
        threshold = parameters.parse_contrast(request.query_params, THRESHOLD)
        made = hits_geojson(query, self._current.get().scorer.scored(query), threshold, self._sensor)
        stem = re.sub(r"[^a-z0-9]+", "-", query.words.lower()).strip("-")[:60] or "hits"
        return JSONResponse(
            made,
            media_type="application/geo+json",
            headers={"Content-Disposition": f'attachment; filename="{self._sensor.name}-{stem}.geojson"'},
        )

    def tile(self, request: Request) -> Response:
        """One tile and its photos."""
        path = request.path_params
        return JSONResponse(self._tiles.tile(path["region"], path["tile_id"]))

    def chip(self, request: Request) -> Response:
        """A tile's chip (`chip.jpg`), or the footprint in its middle (`crop.jpg`)."""
        path = request.path_params
        if path["name"] not in ("chip", "crop"):
            raise UnknownError(f"A tile has no {path['name'][:40]!r}: ask for chip.jpg or crop.jpg.")
        made = self._tiles.chip_jpeg(path["region"], path["tile_id"], is_cropped=path["name"] == "crop")
        return _picture(made, "image/jpeg")

    def photo(self, request: Request) -> Response:
        """A small copy of a photo, where copies are shown."""
        path = request.path_params
        return _picture(self._tiles.photo_jpeg(path["region"], path["photo_id"]), "image/jpeg", is_kept=False)

    def basemap(self, request: Request) -> Response:
        """A tile of the base map that is drawn here."""
        if self.base.draw is None:
            raise UnknownError("No base map is drawn here: set GRAFT_BASEMAP_URL to one that may be used.")
        path = request.path_params
        return _picture(self.base.draw(path["z"], path["x"], path["y"]), "image/png")


def _picture(content: bytes, media_type: str, *, is_kept: bool = True) -> Response:
    # Copies of photos are asked for anew each time: a photo may have been purged.
    cache = "private, max-age=3600" if is_kept else "no-store"
    return Response(content, media_type=media_type, headers={"Cache-Control": cache})


def _security_headers(basemap: Basemap) -> dict[str, str]:
    images = " ".join(filter(None, ("'self'", "data:", basemap.origin)))
    policy = {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": images,
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'self'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        # Providers of base maps want to know who asks; nobody else learns more than the address of this server.
        "Referrer-Policy": "strict-origin-when-cross-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    }


class _Headers:
    """Adds headers to every answer, those to errors too."""

    def __init__(self, app: App, headers: Mapping[str, str]) -> None:
        self._app = app
        self._headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self._headers]
            await send(message)

        await self._app(scope, receive, send_with_headers)


class _Bounds:
    """Refuses queries of a length that no page of ours asks for."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "http" and len(scope["query_string"]) > _MAX_QUERY_CHARS:
            answer = _error(414, f"The address is too long: shorten it to {_MAX_QUERY_CHARS} characters.")
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


def _refusal(status: int) -> Callable[[Request, Exception], Response]:
    def answer(request: Request, error: Exception) -> Response:
        if status == 500:
            # Such messages name files of this machine.
            logger.error("%s: %s", request.url.path, error)
            return _error(status, "The server cannot read what this needs: its log says why, and what to do.")
        return _error(status, str(error))

    return answer


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, f"{error.detail}: see the addresses in docs/how-to/search.md.")


def _unexpected(request: Request, error: Exception) -> Response:
    return _error(500, "The server failed on this request: its log says why.")

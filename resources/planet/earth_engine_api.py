"""The subset of Earth Engine's REST API that production uses, over the planet's catalogue and pixels.

Sources: developers.google.com/earth-engine/reference/rest (assets.listAssets, assets.getPixels, PixelGrid).
Expressions (computePixels, value:compute) are not answered.
"""

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs

import numpy as np
from pyproj.exceptions import ProjError

# Here, not where it is used: threads that load rasterio together parse codes before it has found PROJ's data.
from rasterio.crs import CRS
from rasterio.errors import CRSError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graft_pipeline import geotiff
from graft_pipeline.geometry import transformer
from resources.planet.asset_query import QueryError, apply_mask, parse_filter, parse_mask
from resources.planet.catalog import Band, Catalog, Scene
from resources.planet.pixels import PixelGrid, read_pixels, wgs84_twin
from resources.planet.world import World

#: A project of this name lets tests meet Google's refusal.
FORBIDDEN_PROJECT = "forbidden"
MAX_PIXEL_BYTES = 50_331_648
MAX_SIDE_PX = 32_768
#: Largest page by view (REST reference of listAssets).
MAX_PAGE = {"FULL": 1000, "BASIC": 10_000}
#: Ground that one listing may cover, square degrees of its bounding box.
MAX_LISTING_DEG2 = 100.0

_PUBLIC = "projects/earthengine-public/assets/"
_STATUS = {
    HTTPStatus.BAD_REQUEST: "INVALID_ARGUMENT",
    HTTPStatus.FORBIDDEN: "PERMISSION_DENIED",
    HTTPStatus.NOT_FOUND: "NOT_FOUND",
    HTTPStatus.TOO_MANY_REQUESTS: "RESOURCE_EXHAUSTED",
    HTTPStatus.INTERNAL_SERVER_ERROR: "INTERNAL",
    HTTPStatus.SERVICE_UNAVAILABLE: "UNAVAILABLE",
}
_MEDIA = {
    "GEO_TIFF": "image/tiff",
    "NPY": "application/octet-stream",
    "PNG": "image/png",
    "JPEG": "image/jpeg",
}


class ApiError(Exception):
    """An answer with a `google.rpc.Status` body."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def error_response(status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """A `google.rpc.Status` error as every Google API sends it."""
    body = {"error": {"code": int(status), "message": message, "status": _STATUS[status]}}
    return JSONResponse(body, status_code=status, headers=headers)


class EarthEngineApi:
    """Handlers of the Earth Engine routes; they may run in any number of threads.

    Args:
        world: draws the pixels.
        catalog: knows the scenes.
    """

    def __init__(self, world: World, catalog: Catalog) -> None:
        self._world = world
        self._catalog = catalog
        # A listing is asked for page by page.
        self._listing = lru_cache(maxsize=16)(self._list)

    def discovery(self, request: Request) -> Response:
        """`GET /$discovery/rest`: what the client builds its methods from."""
        return JSONResponse(discovery_document(str(request.base_url)))

    def call(self, request: Request) -> Response:
        """Everything below `/v1/`."""
        name = request.path_params["name"]
        try:
            self._check_project(request, name)
            resource, _, verb = name.partition(":")
            if request.headers.get("x-http-method-override") == "GET":
                method, asked = "GET", request.state.body.decode("utf-8", "replace")
            else:
                method, asked = request.method, request.url.query
            query = parse_qs(asked, keep_blank_values=True)
            if method == "GET" and verb == "listAssets":
                answer = self._list_assets(
                    _asset_id(resource), {key: values[-1] for key, values in query.items()}
                )
            elif method == "POST" and verb == "getPixels":
                return self._get_pixels(_asset_id(resource), request.state.body)
            elif method == "GET" and not verb and resource.endswith("/algorithms"):
                # Never empty: the client takes an empty list for a failed load and asks again without end.
                answer = {"algorithms": [{"name": "algorithms/Noop", "returnType": "Object"}]}
            elif method == "GET" and not verb:
                answer = self._asset(_asset_id(resource))
            else:
                raise ApiError(
                    HTTPStatus.NOT_FOUND, f"The planet does not answer {request.method} /v1/{name}."
                )
        except ApiError as error:
            return error_response(error.status, str(error))
        except QueryError as error:
            return error_response(HTTPStatus.BAD_REQUEST, str(error))
        return JSONResponse(answer)

    def _check_project(self, request: Request, name: str) -> None:
        in_path = f"{name}/".startswith(f"projects/{FORBIDDEN_PROJECT}/")
        if in_path or request.headers.get("x-goog-user-project") == FORBIDDEN_PROJECT:
            raise ApiError(
                HTTPStatus.FORBIDDEN,
                f"Caller does not have required permission to use project {FORBIDDEN_PROJECT}. Grant the "
                "caller the roles/serviceusage.serviceUsageConsumer role, or a custom role with the "
                "serviceusage.services.use permission, by visiting https://console.developers.google.com/"
                f"iam-admin/iam/project?project={FORBIDDEN_PROJECT} and then retry. Propagation of the new "
                "permission may take a few minutes.",
            )

    def _asset(self, asset_id: str) -> dict[str, Any]:
        if asset_id in self._catalog.collections:
            return {"type": "IMAGE_COLLECTION", "name": _asset_name(asset_id), "id": asset_id}
        return self._scene(asset_id).asset()

    def _scene(self, asset_id: str) -> Scene:
        scene = self._catalog.find(asset_id)
        if scene is None:
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"Image asset '{asset_id}' not found (does not exist or caller does not have access).",
            )
        return scene

    def _list_assets(self, collection: str, query: Mapping[str, str]) -> dict[str, Any]:
        if collection not in self._catalog.collections:
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"ImageCollection asset '{collection}' not found "
                "(does not exist or caller does not have access).",
            )
        view = query.get("view") or "FULL"
        if view not in MAX_PAGE:
            raise ApiError(HTTPStatus.BAD_REQUEST, f"Invalid value for view: {view!r}.")
        try:
            size = int(query.get("pageSize") or 0)
        except ValueError as error:
            raise ApiError(HTTPStatus.BAD_REQUEST, "Invalid value for pageSize.") from error
        if size < 0:
            raise ApiError(HTTPStatus.BAD_REQUEST, "Page size must not be negative.")
        size = min(size or MAX_PAGE[view], MAX_PAGE[view])
        scenes = self._listing(collection, query.get("filter", ""))
        start = _offset(query.get("pageToken", ""))
        page = scenes[start : start + size]
        if view == "BASIC":
            assets = [
                {"type": "IMAGE", "name": _asset_name(item.scene_id), "id": item.scene_id} for item in page
            ]
        else:
            assets = [item.asset() for item in page]
        answer: dict[str, Any] = {"assets": assets} if assets else {}
        if start + size < len(scenes):
            answer["nextPageToken"] = base64.urlsafe_b64encode(f"planet:{start + size}".encode()).decode()
        return apply_mask(answer, parse_mask(query.get("fields", "")))

    def _list(self, collection: str, filter_text: str) -> list[Scene]:
        wanted = parse_filter(filter_text)
        if wanted.region is None:
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                "The planet lists a collection over a region only: add intersects(...).",
            )
        west, south, east, north = wanted.region.bounds
        if (east - west) * (north - south) > MAX_LISTING_DEG2:
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"Query covers more than {MAX_LISTING_DEG2:.0f} square degrees: split its region.",
            )
        return [scene for scene in self._catalog.touching(collection, wanted.region) if wanted.accepts(scene)]

    def _get_pixels(self, asset_id: str, body: bytes) -> Response:
        try:
            wanted = json.loads(body or b"{}")
        except (ValueError, RecursionError) as error:
            raise ApiError(HTTPStatus.BAD_REQUEST, "Invalid JSON payload received.") from error
        if not isinstance(wanted, dict):
            raise ApiError(HTTPStatus.BAD_REQUEST, "Invalid JSON payload received.")
        scene = self._scene(asset_id)
        bands = _bands(scene, wanted.get("bandIds"))
        grid = _grid(scene, wanted)
        file_format = wanted.get("fileFormat") or "PNG"
        if file_format == "AUTO_JPEG_PNG":
            file_format = "PNG"
        if not isinstance(file_format, str) or file_format not in _MEDIA:
            raise ApiError(HTTPStatus.BAD_REQUEST, f"Invalid value for fileFormat: {file_format!r}.")
        _check_size(grid, bands)
        try:
            _crs(grid.crs)
            transformer(wgs84_twin(grid.crs), wgs84_twin(scene.crs))
        except (CRSError, ProjError) as error:
            # The latter where nothing leads from one to the other: plans of a site, other planets.
            raise ApiError(
                HTTPStatus.BAD_REQUEST, f"The CRS of a map projection could not be parsed: {grid.crs!r}."
            ) from error
        pixels = read_pixels(self._world, scene, bands, grid)
        pixels = _visualised(pixels, wanted.get("visualizationOptions"))
        content = _encoded(file_format, pixels, [band.name for band in bands], grid)
        return Response(content, media_type=_MEDIA[file_format])


def _asset_id(name: str) -> str:
    return name.removeprefix(_PUBLIC)


def _asset_name(asset_id: str) -> str:
    return asset_id if asset_id.startswith("projects/") else _PUBLIC + asset_id


def _offset(token: str) -> int:
    if not token:
        return 0
    try:
        prefix, _, number = base64.urlsafe_b64decode(token).decode().partition(":")
        if prefix != "planet" or not number.isdigit():
            raise ValueError(token)
        return int(number)
    except (ValueError, binascii.Error) as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, "Invalid page token.") from error


def _bands(scene: Scene, names: Any) -> list[Band]:
    known = {band.name: band for band in scene.bands}
    if not names:
        return list(scene.bands)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ApiError(HTTPStatus.BAD_REQUEST, "Invalid value for bandIds.")
    for name in names:
        if name not in known:
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"Band pattern '{name}' did not match any bands. Available bands: [{', '.join(known)}]",
            )
    if len(set(names)) != len(names):
        raise ApiError(HTTPStatus.BAD_REQUEST, "Duplicate band in bandIds.")
    return [known[name] for name in names]


def _grid(scene: Scene, wanted: Mapping[str, Any]) -> PixelGrid:
    """The grid asked for; without one the scene's own."""
    native = scene.bands[0]
    if "grid" not in wanted:
        if "region" in wanted:
            raise ApiError(
                HTTPStatus.BAD_REQUEST, "The planet cuts pixels by grid only: replace region by grid."
            )
        own = (native.gsd_m, 0.0, scene.x0_m, 0.0, -native.gsd_m, scene.y0_m)
        return PixelGrid(scene.crs, own, native.width_px, native.height_px)
    try:
        grid = wanted["grid"]
        affine = grid["affineTransform"]
        # Zero-valued fields may be left out.
        numbers = [
            float(affine.get(key, 0))
            for key in ("scaleX", "shearX", "translateX", "shearY", "scaleY", "translateY")
        ]
        crs = grid.get("crsCode") or grid.get("crsWkt") or scene.crs
        width, height = int(grid["dimensions"]["width"]), int(grid["dimensions"]["height"])
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ApiError(
            HTTPStatus.BAD_REQUEST, "Invalid grid: give dimensions, affineTransform and crsCode."
        ) from error
    if not all(np.isfinite(numbers)) or numbers[0] * numbers[4] == numbers[1] * numbers[3]:
        raise ApiError(HTTPStatus.BAD_REQUEST, "Invalid grid: affineTransform is not invertible.")
    if width < 1 or height < 1:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"Pixel grid dimensions ({width}x{height}) must be positive.")
    a, b, c, d, e, f = numbers
    return PixelGrid(str(crs), (a, b, c, d, e, f), width, height)


def _check_size(grid: PixelGrid, bands: list[Band]) -> None:
    width, height = grid.width_px, grid.height_px
    if max(width, height) > MAX_SIDE_PX:
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            f"Pixel grid dimensions ({width}x{height}) must be less than or equal to {MAX_SIDE_PX}.",
        )
    size = width * height * sum(np.dtype(band.dtype).itemsize for band in bands)
    if size > MAX_PIXEL_BYTES:
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            f"Total request size ({size} bytes) must be less than or equal to {MAX_PIXEL_BYTES} bytes.",
        )


def _visualised(pixels: list[np.ndarray], options: Any) -> list[np.ndarray]:
    """Bands stretched from `ranges` to 8 bits; unchanged when no ranges are given."""
    try:
        if not options or not options.get("ranges"):
            return pixels
        ranges = [(float(item.get("min", 0)), float(item["max"])) for item in options["ranges"]]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, "Invalid visualizationOptions.ranges.") from error
    if len(ranges) == 1:
        ranges *= len(pixels)
    if len(ranges) != len(pixels) or not all(-math.inf < low < high < math.inf for low, high in ranges):
        raise ApiError(
            HTTPStatus.BAD_REQUEST, "visualizationOptions.ranges must be one range, or one per band."
        )
    return [
        np.clip((band.astype(np.float64) - low) * (255.0 / (high - low)) + 0.5, 0, 255).astype(np.uint8)
        for band, (low, high) in zip(pixels, ranges, strict=True)
    ]


def _encoded(file_format: str, pixels: list[np.ndarray], names: list[str], grid: PixelGrid) -> bytes:
    if file_format == "GEO_TIFF":
        return _geotiff(pixels, grid)
    if file_format == "NPY":
        table = np.empty(
            pixels[0].shape, [(name, band.dtype) for name, band in zip(names, pixels, strict=True)]
        )
        for name, band in zip(names, pixels, strict=True):
            table[name] = band
        buffer = io.BytesIO()
        np.save(buffer, table)
        return buffer.getvalue()
    from PIL import Image

    if len(pixels) not in (1, 3) or any(band.dtype != np.uint8 for band in pixels):
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            f"{file_format} needs one or three 8-bit bands: set bandIds and visualizationOptions.ranges.",
        )
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.stack(pixels, axis=-1))
    buffer = io.BytesIO()
    image.save(buffer, file_format, **({"compress_level": 1} if file_format == "PNG" else {"quality": 90}))
    return buffer.getvalue()


def _geotiff(pixels: list[np.ndarray], grid: PixelGrid) -> bytes:
    """An uncompressed GeoTIFF: encoding costs a millisecond a chip, and loopback has bandwidth to spare."""
    dtype = np.result_type(*pixels)
    values = np.empty((grid.height_px, grid.width_px, len(pixels)), dtype.newbyteorder("<"))
    for number, band in enumerate(pixels):
        values[..., number] = band
    header = geotiff.header(grid.crs, grid.affine, values.shape, dtype.name, values.nbytes)
    return b"".join((header, values))


@lru_cache(maxsize=256)
def _crs(code: str) -> CRS:
    return CRS.from_user_input(code)


def discovery_document(root_url: str) -> dict[str, Any]:
    """The least that the client needs to build its methods: paths and parameters of four calls.

    Args:
        root_url: where the planet answers.

    Returns:
        A discovery document (developers.google.com/discovery/v1/reference/apis).
    """
    path = {"type": "string", "location": "path", "required": True}
    query = {"type": "string", "location": "query"}

    def method(call: str, verb: str, url: str, response: str, /, **parameters: Any) -> dict[str, Any]:
        return {
            "id": f"earthengine.projects.{call}",
            "httpMethod": verb,
            "path": url,
            "parameters": parameters,
            "parameterOrder": [key for key, value in parameters.items() if value is path],
            "response": {"$ref": response},
        }

    assets = {
        "get": method("assets.get", "GET", "v1/{+name}", "Any", name=path),
        "listAssets": method(
            "assets.listAssets",
            "GET",
            "v1/{+parent}:listAssets",
            # The client pages only when this schema has nextPageToken.
            "Page",
            parent=path,
            pageSize={"type": "integer", "format": "int32", "location": "query"},
            pageToken=query,
            filter=query,
            view=query,
        ),
        "getPixels": {
            **method("assets.getPixels", "POST", "v1/{+name}:getPixels", "Any", name=path),
            "request": {"$ref": "Any"},
        },
    }
    algorithms = {"list": method("algorithms.list", "GET", "v1/{+parent}/algorithms", "Any", parent=path)}
    return {
        "kind": "discovery#restDescription",
        "id": "earthengine:v1",
        "name": "earthengine",
        "version": "v1",
        "protocol": "rest",
        "rootUrl": root_url,
        "servicePath": "",
        "batchPath": "batch",
        "parameters": {
            "alt": query,
            "fields": query,
            "key": query,
            "prettyPrint": {"type": "boolean", "location": "query"},
            "quotaUser": query,
        },
        "schemas": {
            "Any": {"id": "Any", "type": "object", "properties": {}},
            "Page": {"id": "Page", "type": "object", "properties": {"nextPageToken": {"type": "string"}}},
        },
        "resources": {
            "projects": {
                "resources": {"algorithms": {"methods": algorithms}, "assets": {"methods": assets}},
            }
        },
    }

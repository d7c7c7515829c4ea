"""The Earth Engine client: lists scenes once per region, fetches chips by scene id, one request each.

Which scene serves which chip is decided in graft_pipeline/scenes.py; how chips are stored, in chips.py.
"""

import functools
import io
import logging
import threading
import tokenize
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from graft_pipeline.errors import GraftError, InputError, ServiceError, SettingsError
from graft_pipeline.geometry import Grid
from graft_pipeline.imagery import Sensor
from graft_pipeline.settings import Settings
from resources.http import (
    Breaker,
    HttpPool,
    Pace,
    Retries,
    TransientError,
    host_of,
    is_http_url,
    parse_retry_after,
)
from resources.imagery import (
    TRANSPORT_ERRORS,
    RequestError,
    checked_window,
    chip_or_item_error,
    status_failure,
    transport_failure,
    widened,
)
from resources.rasters import MAX_BLOCK_BYTES, block_bytes

logger = logging.getLogger(__name__)

#: Largest page of listAssets with properties (REST reference, EarthEngineAssetView FULL).
PAGE_SIZE = 1000

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Target:
    """What one initialisation of the ee library is for; equal targets share it."""

    url: str
    project: str
    key_file: Path | None
    is_anonymous: bool
    credentials: Any = field(repr=False)
    timeout_s: float
    connections: int


class EarthEngine:
    """Earth Engine as graft_pipeline needs it: bounded, classified, and every chip verified.

    The ee library keeps one state for the whole process. It is initialised on the first call, and again when
    an object of another project or address calls; calls of the two then take turns.

    Args:
        project: Cloud project that is registered for Earth Engine.
        url: address of the API.
        credentials: google-auth credentials; None: of the key file, else of the environment.
        key_file: JSON key of a service account.
        is_anonymous: send no credentials at all.
        concurrency: requests at the same time (Earth Engine allows a project 40).
        requests_per_second: pace (Earth Engine allows a project 100).
        timeout_s: limit of one connect, and of each wait for bytes.
        retries: attempts and waits per request.

    Attributes:
        concurrency: as given; for the caller's thread pool.
        requests: HTTP requests that this object's calls made so far, retries and initialisation included.
        downloaded_bytes: bytes of their answers.
    """

    def __init__(
        self,
        *,
        project: str,
        url: str = "https://earthengine-highvolume.googleapis.com",
        credentials: Any = None,
        key_file: Path | None = None,
        is_anonymous: bool = False,
        concurrency: int = 40,
        requests_per_second: int = 100,
        timeout_s: float = 60.0,
        retries: Retries | None = None,
    ) -> None:
        if not project:
            raise SettingsError("Earth Engine needs a Cloud project: set GRAFT_EE_PROJECT.")
        if not is_http_url(url):
            raise SettingsError(f"Earth Engine's address {url!r} is no http(s) URL: correct GRAFT_EE_URL.")
        self._target = _Target(
            url.rstrip("/"), project, key_file, is_anonymous, credentials, timeout_s, concurrency
        )
        self.concurrency = concurrency
        self.requests = 0
        self.downloaded_bytes = 0
        self._retries = retries or Retries()
        self._pace = Pace("earth_engine", concurrency=concurrency, requests_per_second=requests_per_second)
        self._breaker = Breaker("Earth Engine", url, limit=max(20, 2 * concurrency))
        self._lock = threading.Lock()

    @classmethod
    def from_settings(
        cls, settings: Settings, credentials: Any = None, *, retries: Retries | None = None
    ) -> "EarthEngine":
        """The client of a deployment.

        Args:
            settings: names project, key file, URL, limits and timeout.
            credentials: google-auth credentials instead of the settings' own.
            retries: attempts and waits per request.

        Raises:
            SettingsError: if no project is set.
        """
        return cls(
            project=settings.ee_project or "",
            url=settings.ee_url,
            credentials=credentials,
            key_file=settings.ee_key_file,
            # The planet checks no credentials, and Google's must never be sent to another host.
            is_anonymous=credentials is None and settings.is_planet,
            concurrency=settings.ee_concurrency,
            requests_per_second=settings.ee_requests_per_second,
            timeout_s=settings.ee_timeout_s,
            retries=retries,
        )

    def __repr__(self) -> str:
        target = self._target
        return f"EarthEngine(project={target.project!r}, url={target.url!r}, requests={self.requests})"

    def list_scenes(
        self,
        sensor: Sensor,
        bounds: tuple[float, float, float, float],
        start: datetime | None = None,
        end: datetime | None = None,
    ) -> list[dict[str, Any]]:
        """Every scene of a sensor that touches a box, was acquired in a time window and is clear enough.

        Args:
            sensor: names the collection and its cloud rule.
            bounds: (west, south, east, north), degrees of EPSG:4326. Scenes up to 0.01 degrees outside may be
                listed as well.
            start: first acquisition time; the sensor's `listed_from` unless given.
            end: acquired before this time; unlimited unless given.

        Returns:
            EarthEngineAsset objects with `id`, `startTime`, `endTime`, `geometry`, `bands` (`id`, `grid`) and
            the cloud property, unique by id, in the API's order.
            https://developers.google.com/earth-engine/reference/rest/v1/projects.assets#EarthEngineAsset

        Raises:
            InputError: if the collection does not exist, or the query is refused.
            SettingsError: if project or credentials are refused.
            ServiceError: if Earth Engine cannot be reached, or keeps failing.
        """
        first, last = checked_window(sensor, start, end)
        # `endTime` would compare with the end of a scene's acquisition: a window by its start is half-open.
        terms = [f'startTime >= "{_rfc3339(first)}"']
        if last is not None:
            terms.append(f'startTime < "{_rfc3339(last)}"')
        terms.append(f'intersects("{_box(bounds)}")')
        fields = "id,startTime,endTime,geometry,bands(id,grid)"
        if sensor.cloud_property is not None:
            if sensor.scene_limit_pct is not None:
                # Most scenes are cloudy; of a region of a degree that is tens of thousands fewer.
                terms.append(f"properties.{sensor.cloud_property} < {sensor.scene_limit_pct}")
            fields += f",properties/{sensor.cloud_property}"
        query = {
            "parent": sensor.collection,
            "filter": " AND ".join(terms),
            "pageSize": PAGE_SIZE,
            "fields": f"assets({fields}),nextPageToken",
        }
        scenes: dict[str, dict[str, Any]] = {}
        token: str | None = None
        while True:
            page = self._list_page(sensor, {**query, "pageToken": token} if token else query)
            for scene in page["images"]:
                scenes.setdefault(scene["id"], scene)
            token = page.get("nextPageToken")
            if not token:
                return list(scenes.values())

    def get_chip(self, sensor: Sensor, scene_id: str, grid: Grid) -> NDArray[Any]:
        """The pixels of one scene on a grid, verified.

        Args:
            sensor: names the bands.
            scene_id: Earth Engine asset id.
            grid: where; its CRS must be projected, metres.

        Returns:
            (grid.height_px, grid.width_px, bands) array of the sensor's requested bands in the source's own
            dtype, the widest of them if they differ; 0 where the scene has no data.

        Raises:
            ItemError: if this chip cannot be had. Permanent: `scene_missing`, `bad_request`. To be tried
                again: `invalid_pixels`, `truncated`, `timeout`, `connection`, `unavailable`, `rate_limited`.
            SettingsError: if project or credentials are refused.
            ServiceError: if Earth Engine cannot be reached, or chip after chip fails.
        """
        # Bands of several types do not go into one GeoTIFF; NPY gives each its own, but has no georeference.
        is_plain = sensor.requested_bands == sensor.bands
        request = {
            "assetId": scene_id,
            "fileFormat": "GEO_TIFF" if is_plain else "NPY",
            "bandIds": list(sensor.requested_bands),
            "grid": {
                "dimensions": {"width": grid.width_px, "height": grid.height_px},
                "affineTransform": {
                    "scaleX": grid.gsd_m,
                    "shearX": 0,
                    "translateX": grid.x0_m,
                    "shearY": 0,
                    "scaleY": -grid.gsd_m,
                    "translateY": grid.y0_m,
                },
                "crsCode": grid.crs,
            },
        }

        def attempt() -> NDArray[Any]:
            decode = decode_chip if is_plain else decode_bands
            return decode(self._request(lambda ee: ee.data.getPixels(request)), sensor, grid)

        return chip_or_item_error(scene_id, attempt, self._retries, self._breaker, self._unreachable)

    def _list_page(self, sensor: Sensor, query: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._retries.call(
                lambda: _checked_page(self._request(lambda ee: ee.data.listImages(query)))
            )
        except TransientError as error:
            if error.is_unreachable:
                raise self._unreachable(error) from None
            raise ServiceError(
                f"Earth Engine ({host_of(self._target.url)}) keeps failing to list {sensor.collection}: "
                f"{error}. Run again later: finished work is kept."
            ) from None
        except RequestError as error:
            raise InputError(
                f"Earth Engine cannot list {sensor.collection} ({error}): check the sensor's collection, its "
                "cloud property and the region."
            ) from None

    def _unreachable(self, error: TransientError) -> ServiceError:
        return ServiceError(
            f"Earth Engine cannot be reached at {host_of(self._target.url)}: {error}. Check the network, "
            "the proxy (HTTPS_PROXY) and GRAFT_EE_URL, then run again: finished work is kept."
        )

    def _request(self, call: Callable[[Any], Result]) -> Result:
        """One attempt of a call of the ee library, within the limits, its errors classified."""
        with self._pace.slot(), _SESSION.use(self._target, self._count) as ee, _classified():
            return call(ee)

    def _count(self, requests: int, downloaded_bytes: int) -> None:
        with self._lock:
            self.requests += requests
            self.downloaded_bytes += downloaded_bytes


class _Transport:
    """What the ee library sends its requests through, in httplib2's interface: pooled, with timeouts.

    The library's own transport has no timeout, drops the reason of errors, and re-chunks bodies.
    """

    def __init__(self, target: _Target) -> None:
        self._pool = HttpPool(connections=target.connections, timeout_s=target.timeout_s)
        self._callers = threading.local()

    def count_with(self, count: Callable[[int, int], None]) -> None:
        """Name who counts the requests of this thread."""
        self._callers.count = count

    def request(
        self,
        uri: str,
        method: str = "GET",
        body: Any = None,
        headers: dict[str, str] | None = None,
        redirections: int = 0,
        connection_type: Any = None,
    ) -> tuple[Any, bytes]:
        import httplib2

        self._callers.count(1, 0)
        answer = self._pool.request(method, uri, body=body, headers=headers)
        self._callers.count(0, len(answer.body))
        info = {key.lower(): value for key, value in answer.headers.items()}
        response = httplib2.Response({**info, "status": str(answer.status)})
        response.reason = answer.reason or f"HTTP {answer.status}"
        return response, answer.body

    def close(self) -> None:
        self._pool.close()


class _Session:
    """The ee library's process-wide state: initialised for one target at a time, in use by many threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._target: _Target | None = None
        self._transport: _Transport | None = None
        self._users = 0
        self._attempts = 0
        self._failure: tuple[_Target, Exception] | None = None

    @contextmanager
    def use(self, target: _Target, count: Callable[[int, int], None]) -> Iterator[Any]:
        """The ee module, initialised for a target as long as the context is open.

        Raises:
            TransientError: if initialising failed and may succeed later.
            SettingsError: if project or credentials are refused.
        """
        import ee

        asked_at = self._attempts
        with self._changed:
            self._changed.wait_for(lambda: self._target == target or self._users == 0)
            if self._target != target:
                failure = self._failure
                if failure is not None and failure[0] == target and self._attempts > asked_at:
                    # Another thread tried while this one waited: no need to time out once more.
                    raise failure[1]
                self._initialise(ee, target, count)
            transport = self._transport
            self._users += 1
        assert transport is not None
        transport.count_with(count)
        try:
            yield ee
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def _initialise(self, ee: Any, target: _Target, count: Callable[[int, int], None]) -> None:
        # Loaded by one thread: several that load it together read codes before it has found PROJ's data.
        import rasterio.crs  # noqa: F401

        self._target, self._failure = None, None
        if self._transport is not None:
            self._transport.close()
        ee.Reset()
        # Otherwise Initialize fetches a list of deprecated assets, from another host and without a timeout.
        ee.deprecation.deprecated_assets = {"-": None}
        # The library's retries sleep up to a minute, ignore Retry-After and hide what failed; ours do not.
        ee.data.setMaxRetries(0)
        self._transport = _Transport(target)
        self._transport.count_with(count)
        try:
            with _classified():
                ee.Initialize(
                    _credentials(ee, target),
                    url=target.url,
                    project=target.project,
                    http_transport=self._transport,
                )
        except RequestError as error:
            message = (
                f"{host_of(target.url)} does not answer as Earth Engine does ({error}): "
                "check GRAFT_EE_URL and GRAFT_EE_PROJECT."
            )
            self._failure = target, SettingsError(message)
        except (AttributeError, KeyError, TypeError) as error:
            # The library takes whatever JSON or text comes for its description and list of algorithms.
            message = f"the answer is not Earth Engine's ({type(error).__name__}); is a proxy in between?"
            self._failure = target, TransientError("unreadable", message)
        except (GraftError, TransientError) as error:
            self._failure = target, error
        self._attempts += 1
        if self._failure is not None:
            raise self._failure[1]
        self._target = target
        logger.info("Earth Engine answers at %s for project %s.", target.url, target.project)


_SESSION = _Session()


def _credentials(ee: Any, target: _Target) -> Any:
    """What a target's requests are signed with.

    Raises:
        SettingsError: if a key file cannot be used; none of its content is repeated.
    """
    if target.credentials is not None:
        return target.credentials
    if target.is_anonymous:
        from google.auth.credentials import AnonymousCredentials

        return AnonymousCredentials()
    if target.key_file is None:
        return "persistent"
    problem = "it is not the JSON key of a service account"
    try:
        return ee.ServiceAccountCredentials(None, key_file=str(target.key_file))
    except OSError as error:
        problem = error.strerror or "it cannot be read"
    except (ValueError, KeyError, TypeError):
        # The text of these may quote the key.
        pass
    raise SettingsError(
        f"Key file {target.key_file} cannot be used, {problem}: correct GRAFT_EE_KEY_FILE. Keys are made at "
        "https://console.cloud.google.com/iam-admin/serviceaccounts."
    )


@contextmanager
def _classified() -> Iterator[None]:
    """Translate what the ee library and those below it raise."""
    import ee
    import google.auth.exceptions
    import googleapiclient.errors

    failure: Exception
    try:
        yield
        return
    except ee.EEException as error:
        # The library drops the status; the error it was made from has it.
        cause = error.__context__
        is_http = isinstance(cause, googleapiclient.errors.HttpError)
        failure = _of_status(cause) if is_http else _of_text(str(error))
    except googleapiclient.errors.HttpError as error:
        failure = _of_status(error)
    except googleapiclient.errors.UnknownApiNameOrVersion:
        failure = RequestError("no API description", 404)
    except googleapiclient.errors.Error as error:
        failure = TransientError("unreadable", f"the answer is not Earth Engine's ({type(error).__name__})")
    except google.auth.exceptions.TransportError as error:
        failure = TransientError("connection", f"no token from Google: {error}", is_unreachable=True)
    except google.auth.exceptions.GoogleAuthError as error:
        if error.retryable:
            failure = TransientError("connection", f"no token from Google: {error}")
        else:
            failure = _refused(str(error.args[0]) if error.args else type(error).__name__)
    except TRANSPORT_ERRORS as error:
        failure = transport_failure(error)
    raise failure


def _of_status(error: Any) -> Exception:
    """What an HTTP error of Earth Engine means."""
    status = int(error.status_code)
    message = f"HTTP {status}: {error.reason or error.resp.reason}"
    is_quota = status == 403 and b"ratelimitexceeded" in (error.content or b"").lower()
    retry_after_s = parse_retry_after(error.resp.get("retry-after"))
    return status_failure(status, message, retry_after_s, _refused, is_quota=is_quota)


def _of_text(message: str) -> Exception:
    """What an error of the ee library without an HTTP status means."""
    if "authorize access" in message or "no project found" in message:
        return _refused("no credentials were found")
    return TransientError("unreadable", f"the answer is not Earth Engine's ({message[:80]!r})")


def _refused(what: str) -> SettingsError:
    return SettingsError(
        f"Earth Engine refused the project or its credentials ({what}): check GRAFT_EE_PROJECT and "
        "GRAFT_EE_KEY_FILE, that the project is registered (https://code.earthengine.google.com/register), "
        "and that the account has the roles Earth Engine Resource Viewer and Service Usage Consumer in it."
    )


def _checked_page(page: Any) -> dict[str, Any]:
    """A page of a listing, if it is one."""
    if all(isinstance(scene, dict) and isinstance(scene.get("id"), str) for scene in page["images"]):
        return page
    raise TransientError("unreadable", "the listing holds something else than assets with an id")


def decode_chip(content: bytes, sensor: Sensor, grid: Grid) -> NDArray[Any]:
    """Check that bytes are the GeoTIFF that was asked for, and read it.

    Args:
        content: what getPixels returned; any bytes at all, such as a page of HTML.
        sensor: tells whether its three bands are 8-bit.
        grid: where the pixels must lie.

    Returns:
        (grid.height_px, grid.width_px, 3) array in the file's dtype.

    Raises:
        TransientError: `invalid_pixels` if it is another thing, `truncated` if it cannot be read to its end.
    """
    import rasterio
    from rasterio.io import MemoryFile

    if not content.startswith(_TIFF_MAGIC):
        kind = "HTML" if content.lstrip()[:1] == b"<" else "no TIFF"
        raise TransientError("invalid_pixels", f"{len(content)} bytes of {kind} instead of pixels")
    try:
        with MemoryFile(content) as memory, memory.open(driver="GTiff") as source:
            problem = _mismatch(source, sensor, grid)
            if problem is None:
                return np.stack(list(source.read()), axis=-1)
    except (rasterio.errors.RasterioError, UnicodeDecodeError) as error:
        raise TransientError("truncated", f"the GeoTIFF cannot be read: {error}") from None
    raise TransientError("invalid_pixels", problem)


def decode_bands(content: bytes, sensor: Sensor, grid: Grid) -> NDArray[Any]:
    """Check that bytes are the NPY of bands that was asked for, and read it.

    Args:
        content: what getPixels returned; any bytes at all, such as a page of HTML.
        sensor: names the requested bands, in their order.
        grid: its size is that of the pixels.

    Returns:
        (grid.height_px, grid.width_px, bands) array in the widest of the bands' dtypes.

    Raises:
        TransientError: `invalid_pixels` if it is another thing, `truncated` if it ends early.
    """
    from numpy.lib import format as npy

    if not content.startswith(npy.MAGIC_PREFIX):
        kind = "HTML" if content.lstrip()[:1] == b"<" else "no NPY"
        raise TransientError("invalid_pixels", f"{len(content)} bytes of {kind} instead of pixels")
    try:
        table = npy.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, TypeError, EOFError, MemoryError, SyntaxError, tokenize.TokenError) as error:
        # A header is a literal of Python.
        raise TransientError("truncated", f"the NPY cannot be read: {error}") from None
    shape, wanted = table.shape, (grid.height_px, grid.width_px)
    if set(table.dtype.names or ()) != set(sensor.requested_bands) or shape != wanted:
        found = f"bands {table.dtype.names} of {shape}"
        raise TransientError("invalid_pixels", f"{found} instead of {sensor.requested_bands} of {wanted}")
    is_number = all(table[name].dtype.kind in "uif" for name in sensor.requested_bands)
    is_scaled = sensor.display_range is not None or all(
        table[name].dtype == np.uint8 for name in sensor.bands
    )
    if not (is_number and is_scaled):
        raise TransientError("invalid_pixels", f"bands of type {table.dtype}")
    return np.stack([table[name] for name in sensor.requested_bands], axis=-1)


def _mismatch(source: Any, sensor: Sensor, grid: Grid) -> str | None:
    """In what a raster differs from what was asked for."""
    shape, wanted = (source.count, source.height, source.width), (3, grid.height_px, grid.width_px)
    if shape != wanted:
        return f"shape {shape} instead of {wanted}"
    kinds = set(source.dtypes)
    if len(kinds) != 1 or (sensor.display_range is None and kinds != {"uint8"}):
        return f"bands of type {sorted(kinds)}"
    if (size := block_bytes(source)) > MAX_BLOCK_BYTES:
        return f"blocks of {size} bytes"
    if source.crs != _crs(grid.epsg):
        return f"CRS {source.crs} instead of {grid.crs}"
    # Exact but for a millionth of a pixel, which another order of the same arithmetic may cost.
    if not source.transform.almost_equals(grid.affine, precision=1e-6 * grid.gsd_m):
        return f"transform {tuple(source.transform)[:6]} instead of {tuple(grid.affine)[:6]}"
    return None


@functools.lru_cache(maxsize=256)
def _crs(epsg: int) -> Any:
    from rasterio.crs import CRS

    return CRS.from_epsg(epsg)


def _rfc3339(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _box(bounds: tuple[float, float, float, float]) -> str:
    """A box as GeoJSON in single quotes, as the filter language wants it."""
    west, south, east, north = widened(bounds)
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    corners = ", ".join(f"[{x:.6f}, {y:.6f}]" for x, y in ring)
    return f"{{'type': 'Polygon', 'coordinates': [[{corners}]]}}"

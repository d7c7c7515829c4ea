"""What all imagery sources share: which one a deployment has, and what failing requests for a chip mean.

How each source lists scenes and cuts chips is in earth_engine.py, stac.py and imagery_folder.py.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from numpy.typing import NDArray

from graft_pipeline.errors import InputError, ItemError, ServiceError
from graft_pipeline.imagery import ImagerySource, Sensor
from graft_pipeline.settings import Settings
from resources.http import (
    TRANSIENT_STATUSES,
    BodyTooLargeError,
    Breaker,
    BrokenBodyError,
    Retries,
    TransientError,
    UnreachableError,
)

#: A box in degrees has parallels as edges, Earth Engine's polygons have geodesics: at 60 degrees of latitude
#: they part by 0.002 degrees over a degree of longitude.
LISTING_MARGIN_DEG = 0.01

#: What `transport_failure` understands.
TRANSPORT_ERRORS = (TimeoutError, ConnectionError, BodyTooLargeError)


class RequestError(Exception):
    """A source refused a request for what it asks; asking again does not help.

    Attributes:
        status: HTTP status, None if there was none.
    """

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status


def open_imagery(settings: Settings) -> ImagerySource:
    """The imagery source of a deployment.

    Args:
        settings: names the source, and what it needs.

    Returns:
        Its client; nothing is asked yet.

    Raises:
        SettingsError: if what the source needs is not set.
    """
    if settings.imagery == "stac":
        from resources.stac import Stac

        return Stac.from_settings(settings)
    if settings.imagery == "folder":
        from resources.imagery_folder import ImageryFolder

        return ImageryFolder.from_settings(settings)
    from resources.earth_engine import EarthEngine

    return EarthEngine.from_settings(settings)


def chip_or_item_error(
    scene_id: str,
    attempt: Callable[[], NDArray[Any]],
    retries: Retries,
    breaker: Breaker | None,
    unreachable: Callable[[TransientError], ServiceError] | None,
) -> NDArray[Any]:
    """Ask for a chip as often as allowed.

    Args:
        scene_id: for messages.
        attempt: one request; raises TransientError or RequestError.
        retries: attempts and waits.
        breaker: ends a run whose source fails for everything; None: a failure says nothing of the next.
        unreachable: what to say when there is no connection at all; None where none is needed.

    Returns:
        What `attempt` returned.

    Raises:
        ItemError: if this chip cannot be had.
        ServiceError: if the source cannot be reached, or chip after chip fails.
    """
    try:
        chip = retries.call(attempt)
    except TransientError as error:
        if error.is_unreachable and unreachable is not None:
            raise unreachable(error) from None
        if breaker is not None:
            breaker.failed(str(error))
        raise ItemError(error.reason, f"{scene_id}: {error}", is_permanent=False) from None
    except RequestError as error:
        if breaker is not None:
            breaker.succeeded()
        reason = "scene_missing" if error.status == 404 else "bad_request"
        raise ItemError(reason, f"{scene_id}: {error}", is_permanent=True) from None
    if breaker is not None:
        breaker.succeeded()
    return chip


def transport_failure(error: Exception) -> TransientError:
    """What one of `TRANSPORT_ERRORS`, as HttpPool raises them, means for a chip."""
    if isinstance(error, UnreachableError):
        return TransientError("unreachable", str(error), is_unreachable=True)
    reasons = {
        BrokenBodyError: "truncated",
        TimeoutError: "timeout",
        ConnectionError: "connection",
        BodyTooLargeError: "invalid_pixels",
    }
    reason = next(reason for kind, reason in reasons.items() if isinstance(error, kind))
    return TransientError(reason, str(error))


def status_failure(
    status: int,
    message: str,
    retry_after_s: float | None,
    refused: Callable[[str], Exception],
    *,
    is_quota: bool = False,
) -> Exception:
    """What an HTTP status other than success means.

    Args:
        status: the status.
        message: the server's words.
        retry_after_s: wait that the server asks for.
        refused: makes the error of refused credentials.
        is_quota: whether a refusal is one of quota, not of credentials.

    Returns:
        TransientError, RequestError, or what `refused` makes.
    """
    if status in TRANSIENT_STATUSES or is_quota:
        reason = "rate_limited" if status == 429 or is_quota else "unavailable"
        return TransientError(reason, message, retry_after_s=retry_after_s)
    if status in (401, 403):
        return refused(message)
    return RequestError(message, status)


def scene_record(
    scene_id: str,
    acquired: datetime | None,
    bands: Sequence[str],
    crs: str,
    affine: tuple[float, float, float, float, float, float],
    size: tuple[int, int],
    geometry: Mapping[str, Any] | None,
    properties: Mapping[str, Any],
) -> dict[str, Any]:
    """A scene as Earth Engine lists it, which is what `scenes.scene_rows` reads.

    Args:
        scene_id: id of the scene in its source.
        acquired: when, UTC. Without it, without a band that is needed or without a grid no row is made of it.
        bands: names of its bands; all share one grid here.
        crs: code of its CRS.
        affine: (scale_x, shear_x, x0, shear_y, scale_y, y0) of its pixel grid; zeros where unknown.
        size: (width, height), pixels.
        geometry: GeoJSON of valid ground, EPSG:4326; None: the pixel grid's rectangle.
        properties: what rules look at, such as the cloud percentage.

    Returns:
        The fields of an EarthEngineAsset that are read.
    """
    names = ("scaleX", "shearX", "translateX", "shearY", "scaleY", "translateY")
    grid = {
        "crsCode": crs,
        "dimensions": {"width": size[0], "height": size[1]},
        "affineTransform": dict(zip(names, affine, strict=True)),
    }
    time = None if acquired is None else acquired.astimezone(UTC).isoformat()
    return {
        "id": scene_id,
        "startTime": time,
        "endTime": time,
        "geometry": geometry,
        "bands": [{"id": name, "grid": grid} for name in bands],
        "properties": dict(properties),
    }


def checked_window(
    sensor: Sensor, start: datetime | None, end: datetime | None
) -> tuple[datetime, datetime | None]:
    """First and last time of a listing, UTC.

    Args:
        sensor: its `listed_from` is the first time unless one is given.
        start: first acquisition time.
        end: acquired before this time; unlimited if None.

    Raises:
        InputError: if a time has no zone.
    """
    first = start or datetime.fromisoformat(sensor.listed_from).replace(tzinfo=UTC)
    if first.tzinfo is None or (end is not None and end.tzinfo is None):
        raise InputError("Acquisition times need a time zone: pass datetimes in UTC.")
    return first.astimezone(UTC), None if end is None else end.astimezone(UTC)


def widened(bounds: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """A box with the margin of a listing.

    Args:
        bounds: (west, south, east, north), degrees of EPSG:4326.

    Raises:
        InputError: if it is no such box.
    """
    west, south, east, north = bounds
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise InputError(f"{bounds} is no box (west, south, east, north) in degrees of EPSG:4326.")
    return (
        max(west - LISTING_MARGIN_DEG, -180.0),
        max(south - LISTING_MARGIN_DEG, -90.0),
        min(east + LISTING_MARGIN_DEG, 180.0),
        min(north + LISTING_MARGIN_DEG, 90.0),
    )

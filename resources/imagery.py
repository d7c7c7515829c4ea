"""What all imagery sources share: which one a deployment has, and what failing requests for a chip mean.

How each source lists scenes and cuts chips is in earth_engine.py, stac.py and imagery_folder.py.
"""

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from graft_pipeline.errors import ItemError, ServiceError
from graft_pipeline.imagery import ImagerySource
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
    breaker: Breaker,
    unreachable: Callable[[TransientError], ServiceError],
) -> NDArray[Any]:
    """Ask for a chip as often as allowed.

    Args:
        scene_id: for messages.
        attempt: one request; raises TransientError or RequestError.
        retries: attempts and waits.
        breaker: ends a run whose source fails for everything.
        unreachable: what to say when there is no connection at all.

    Returns:
        What `attempt` returned.

    Raises:
        ItemError: if this chip cannot be had.
        ServiceError: if the source cannot be reached, or chip after chip fails.
    """
    try:
        chip = retries.call(attempt)
    except TransientError as error:
        if error.is_unreachable:
            raise unreachable(error) from None
        breaker.failed(str(error))
        raise ItemError(error.reason, f"{scene_id}: {error}", is_permanent=False) from None
    except RequestError as error:
        breaker.succeeded()
        reason = "scene_missing" if error.status == 404 else "bad_request"
        raise ItemError(reason, f"{scene_id}: {error}", is_permanent=True) from None
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

"""Query parameters of the search page's API: parsed, bounded, refused in words.

What is answered is in the modules beside this one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING

from graft_pipeline.errors import InputError
from graft_pipeline.search import Filters

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

#: More is no query but a document; a text tower reads 77 tokens.
MAX_WORDS_CHARS = 200
MAX_TOP = 500
DEFAULT_TOP = 24
#: Contrasts beyond these are met by no tile, or by all.
CONTRASTS = (-10.0, 20.0)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Query:
    """What an analyst asks for. A hashable value.

    Attributes:
        words: what is searched for.
        box: (west, south, east, north), degrees; None: anywhere.
        since: first UTC day of the scenes' acquisition; None: any.
        until: last UTC day of it, which belongs to it; None: any.
    """

    words: str
    box: Box | None = None
    since: date | None = None
    until: date | None = None

    @property
    def filters(self) -> Filters | None:
        """The same for a search; None: no tile is left out."""
        if self.box is None and self.since is None and self.until is None:
            return None
        # People count the last day in, searches do not.
        before = None if self.until is None else self.until + timedelta(days=1)
        return Filters(None if self.box is None else rectangle(self.box), self.since, before)


def rectangle(box: Box) -> "BaseGeometry":
    """The polygon of (west, south, east, north), EPSG:4326."""
    import shapely

    return shapely.box(*box)


def parse_query(parameters: Mapping[str, str]) -> Query:
    """Read the parameters that every search has.

    Args:
        parameters: `words`; optional `box` (west,south,east,north), `since` and `until` (YYYY-MM-DD).

    Returns:
        The query.

    Raises:
        InputError: if one is missing, no such thing or out of bounds.
    """
    words = " ".join(parameters.get("words", "").split())
    if not words:
        raise InputError('Say in words what is searched for, such as "farmland".')
    if len(words) > MAX_WORDS_CHARS:
        raise InputError(f"{len(words)} characters are too many: say it in at most {MAX_WORDS_CHARS}.")
    if not words.isprintable():
        raise InputError("The words hold characters that cannot be printed: write plain text.")
    since, until = _day(parameters, "since"), _day(parameters, "until")
    if since is not None and until is not None and since > until:
        raise InputError(f"No day lies from {since} to {until}: put the earlier day first.")
    return Query(words, parse_box(parameters, "box"), since, until)


def parse_box(parameters: Mapping[str, str], name: str) -> Box | None:
    """Read a box.

    Args:
        parameters: as sent.
        name: of the parameter.

    Returns:
        (west, south, east, north), degrees; None if it is not given.

    Raises:
        InputError: if it is no box on the globe.
    """
    text = parameters.get(name, "").strip()
    if not text:
        return None
    try:
        west, south, east, north = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{name} is no box: write west,south,east,north in degrees.") from None
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise InputError(
            f"{name} is no box on the globe: write west,south,east,north in degrees, west less than east."
        )
    return west, south, east, north


def parse_top(parameters: Mapping[str, str]) -> int:
    """How many tiles are listed at most.

    Args:
        parameters: optional `top`.

    Returns:
        1 to `MAX_TOP`.

    Raises:
        InputError: if it is no such number.
    """
    text = parameters.get("top", "").strip() or str(DEFAULT_TOP)
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= MAX_TOP):
        raise InputError(f"top is no number of tiles: give 1 to {MAX_TOP}.")
    return int(text)


def parse_contrast(parameters: Mapping[str, str], default: float) -> float:
    """From which contrast a tile is a hit.

    Args:
        parameters: optional `contrast`.
        default: without it.

    Returns:
        Standard deviations above the mean tile.

    Raises:
        InputError: if it is no such number.
    """
    text = parameters.get("contrast", "").strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    low, high = CONTRASTS
    if not low <= value <= high:
        raise InputError(f"contrast is no threshold: give {low:g} to {high:g} standard deviations.")
    return value


def _day(parameters: Mapping[str, str], name: str) -> date | None:
    text = parameters.get(name, "").strip()
    if not text:
        return None
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise InputError(f"{name} is no day: write YYYY-MM-DD.") from None
    if not 1900 <= day.year <= 2200:
        raise InputError(f"{name} is {day}: give a day of 1900 to 2200.")
    return day

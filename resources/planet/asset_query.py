"""The query language of `listAssets`: filters (an AIP-160 subset) and field masks.

What is listed is catalog.py; the HTTP side, earth_engine_api.py.
"""

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from resources.planet.catalog import Scene

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
_INTERSECTS = re.compile(r'intersects\(\s*"((?:[^"\\]|\\.)*)"\s*\)')
_COMPARISON = re.compile(
    r'(startTime|endTime|properties\.[\w:]+)\s*(>=|<=|!=|<|>|=)\s*("(?:[^"\\]|\\.)*"|-?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)'
)
_AND = re.compile(r"\s+AND\s+")


class QueryError(ValueError):
    """A filter or mask that Earth Engine would refuse with 400."""


@dataclass(frozen=True)
class AssetFilter:
    """A parsed filter.

    Attributes:
        region: ground that the footprint has to touch, EPSG:4326; None: anywhere.
        comparisons: (field, operator, value) that must all hold.
    """

    region: BaseGeometry | None
    comparisons: tuple[tuple[str, str, Any], ...]

    def accepts(self, scene: Scene) -> bool:
        """Whether a scene passes every comparison; the region is not looked at."""
        for name, sign, wanted in self.comparisons:
            value: Any
            if name == "startTime":
                value = scene.started
            elif name == "endTime":
                value = scene.ended
            else:
                value = scene.properties.get(name.removeprefix("properties."))
            if value is None or isinstance(value, str) != isinstance(wanted, str):
                return False
            if not _OPERATORS[sign](value, wanted):
                return False
        return True


def parse_filter(text: str) -> AssetFilter:
    """Parse comparisons of startTime, endTime and properties.X and `intersects(...)`, joined by AND.

    Args:
        text: the filter as the client sends it; empty accepts everything.

    Returns:
        The parsed filter.

    Raises:
        QueryError: if the text is outside of this subset.
    """
    region: BaseGeometry | None = None
    comparisons = []
    position, text = 0, text.strip()
    while position < len(text):
        if match := _INTERSECTS.match(text, position):
            place = _geometry(match[1].replace('\\"', '"'))
            region = place if region is None else region.intersection(place)
        elif match := _COMPARISON.match(text, position):
            name, sign, literal = match.groups()
            comparisons.append((name, sign, _value(name, literal)))
        else:
            raise QueryError(f"Invalid filter: cannot parse {text[position : position + 60]!r}.")
        position = match.end()
        if position < len(text):
            joint = _AND.match(text, position)
            if joint is None or joint.end() == len(text):
                raise QueryError(f"Invalid filter: expected AND at {text[position : position + 60]!r}.")
            position = joint.end()
    return AssetFilter(region, tuple(comparisons))


def _value(name: str, literal: str) -> Any:
    if not literal.startswith('"'):
        if not name.startswith("properties."):
            raise QueryError(f"Invalid filter: {name} is compared with a quoted RFC 3339 time.")
        return float(literal)
    text = literal[1:-1].replace('\\"', '"')
    if name.startswith("properties."):
        return text
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError as error:
        raise QueryError(f"Invalid filter: {text!r} is no RFC 3339 time.") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _geometry(text: str) -> BaseGeometry:
    """A GeoJSON geometry with single or double quotes, or WKT."""
    try:
        if text.lstrip().startswith("{"):
            # Single quotes: the client writes Python's repr of a dict.
            geometry = shapely.geometry.shape(ast.literal_eval(text.strip()))
        else:
            geometry = shapely.from_wkt(text)
    except (
        ValueError,
        OverflowError,
        RecursionError,
        MemoryError,
        SyntaxError,
        LookupError,
        TypeError,
        AttributeError,
        shapely.errors.ShapelyError,
    ) as error:
        raise QueryError(f"Invalid geometry in intersects(): {text[:80]!r}.") from error
    if geometry is None or geometry.is_empty:
        raise QueryError("Invalid geometry in intersects(): it is empty.")
    if not np.isfinite(shapely.get_coordinates(geometry)).all():
        raise QueryError("Invalid geometry in intersects(): a coordinate is not finite.")
    return geometry if geometry.is_valid else shapely.make_valid(geometry)


Mask = dict[str, "Mask"]


def parse_mask(text: str) -> Mask:
    """Parse a field mask such as `assets(id,properties/CLOUDY_PIXEL_PERCENTAGE,bands/grid),nextPageToken`.

    Args:
        text: the mask; empty or `*` keeps everything.

    Returns:
        Nested dict of the names to keep; an empty dict keeps all below it.

    Raises:
        QueryError: if brackets do not match.
    """
    tokens = re.findall(r"[^,()/\s]+|[,()/]", text)
    position = 0

    def fields() -> Mask:
        nonlocal position
        mask: Mask = {}
        while position < len(tokens) and tokens[position] != ")":
            node = mask
            while True:
                if tokens[position] in "(),/":
                    raise QueryError(f"Invalid field selection {text!r}.")
                node = node.setdefault(tokens[position], {})
                position += 1
                if position >= len(tokens) or tokens[position] != "/":
                    break
                position += 1
                if position >= len(tokens):
                    raise QueryError(f"Invalid field selection {text!r}.")
            if position < len(tokens) and tokens[position] == "(":
                position += 1
                node.update(fields())
                if position >= len(tokens):
                    raise QueryError(f"Invalid field selection {text!r}.")
                position += 1
            if position < len(tokens) and tokens[position] == ",":
                position += 1
        return mask

    try:
        mask = fields()
    except RecursionError as error:
        raise QueryError(f"Invalid field selection {text[:80]!r}: too deep.") from error
    if position < len(tokens):
        raise QueryError(f"Invalid field selection {text!r}.")
    return {} if "*" in mask else mask


def apply_mask(value: Any, mask: Mask) -> Any:
    """The parts of a JSON value that a mask keeps; lists are masked element by element."""
    if not mask or "*" in mask:
        return value
    if isinstance(value, list):
        return [apply_mask(item, mask) for item in value]
    if isinstance(value, dict):
        return {name: apply_mask(value[name], below) for name, below in mask.items() if name in value}
    return value

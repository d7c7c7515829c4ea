"""OpenStreetMap extracts: features of our classes out of .osm.pbf, .osm or Overpass JSON files.

Which tags make which class, and what becomes of the features, is in graft_pipeline/osm_labels.py.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft_pipeline.errors import InputError, SettingsError
from graft_pipeline.osm_labels import OsmClass, OsmFeature, osm_classes

logger = logging.getLogger(__name__)

_REMEDY = "give a .osm.pbf extract (https://download.geofabrik.de) or the JSON of an Overpass query with `out geom`."


def read_osm(file: Path, bounds: tuple[float, float, float, float]) -> Iterator[OsmFeature]:
    """Features of the table's classes that touch some bounds.

    Args:
        file: `.osm.pbf`, `.osm` (XML), or `.json` of an Overpass query.
        bounds: west, south, east, north, EPSG:4326 degrees.

    Yields:
        The features; one that has tags of several classes comes once for each.

    Raises:
        InputError: if the file is not there or no such file.
        SettingsError: if the library that reads it is not installed.
    """
    import shapely

    if not file.exists():
        raise InputError(f"There is no OpenStreetMap extract {file}: {_REMEDY}")
    area = shapely.box(*bounds)
    found = _overpass(file) if file.suffix == ".json" else _extract(file)
    for tags, geometry in found:
        if geometry.is_empty or not geometry.intersects(area):
            continue
        for of in _classes_of(tags, geometry.geom_type):
            yield OsmFeature(of.name, geometry)


def _classes_of(tags: dict[str, str], kind: str) -> Iterator[OsmClass]:
    """Classes that a feature's tags name, if it is the kind of geometry that they are drawn as."""
    is_line = kind in {"LineString", "MultiLineString"}
    is_area = kind in {"Polygon", "MultiPolygon"}
    for of in osm_classes():
        if of.has(tags) and (is_area or (is_line and of.line_width_m is not None)):
            yield of


def _keys() -> list[str]:
    return sorted({key for of in osm_classes() for key in of.tags})


def _extract(file: Path) -> Iterator[tuple[dict[str, str], Any]]:
    try:
        import osmium
    except ImportError as error:
        raise SettingsError("Reading .osm.pbf needs pyosmium: pip install 'graft-pipeline[osm]'.") from error
    from shapely.geometry import shape

    wanted = osmium.filter.KeyFilter(*_keys())
    lines = {key for of in osm_classes() if of.line_width_m is not None for key in of.tags}
    try:
        objects = osmium.FileProcessor(str(file)).with_areas(wanted).with_filter(wanted)
        for thing in objects.with_filter(osmium.filter.GeoInterfaceFilter()):
            tags = dict(thing.tags)
            # A closed way comes as a line and as an area: of classes that are lines it is a loop, unless it says that
            # it is an area; of all others an area.
            is_named_area = tags.get("area") == "yes"
            if thing.is_area() and thing.from_way() and not is_named_area:
                tags = {key: value for key, value in tags.items() if key not in lines}
            if thing.is_area() or (thing.is_way() and not is_named_area and lines & set(tags)):
                yield tags, shape(thing.__geo_interface__["geometry"])
    except (RuntimeError, OSError) as error:
        raise InputError(f"{file} is no OpenStreetMap extract ({error}): {_REMEDY}") from error


def _overpass(file: Path) -> Iterator[tuple[dict[str, str], Any]]:
    try:
        import osm2geojson
    except ImportError as error:
        raise SettingsError(
            "Reading Overpass JSON needs osm2geojson: pip install 'graft-pipeline[osm]'."
        ) from error
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if "error" in str(content.get("remark")):
            # Overpass gives what it had found when time or memory ran out, and says so here alone.
            raise InputError(
                f"{file} is not whole ({content['remark']}): ask again with a longer [timeout:...]."
            )
        shapes = osm2geojson.json2shapes(content, raise_on_failure=False)
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no JSON of Overpass ({error!r}): {_REMEDY}") from error
    for found in shapes:
        tags = found["properties"].get("tags")
        if tags:
            yield tags, found["shape"]

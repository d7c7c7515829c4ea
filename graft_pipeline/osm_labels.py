"""Labels of tiles from OpenStreetMap: which classes of a table cover a tile's footprint, and by how much.

Extracts are read in resources/osm.py; the labelled set is scored in training/zero_shot. For evaluation only: no step
of the training path reads these labels.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import transformer
from graft_pipeline.imagery import Sensor
from graft_pipeline.manifests import columns
from graft_pipeline.schemas import OSM_LABELS

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

#: Least area of a class within a footprint, square metres, unless the table says another.
MIN_AREA_M2 = 500.0
#: A footprint belongs to the single-label set if one class covers this share of it.
DOMINANT_SHARE = 0.6


@dataclass(frozen=True)
class OsmClass:
    """A class of the table `osm_classes.json`.

    Attributes:
        name: of the class.
        words: what it is called in prompts.
        tags: key to values of OpenStreetMap; a feature with any of them is of this class.
        line_width_m: ways of this class are lines, and this wide on the ground; None for areas.
        min_area_m2: least area within a footprint that makes it a label.
    """

    name: str
    words: tuple[str, ...]
    tags: Mapping[str, frozenset[str]]
    line_width_m: float | None
    min_area_m2: float

    def has(self, tags: Mapping[str, str]) -> bool:
        """Whether a feature's tags make it one of this class."""
        return any(tags.get(key) in values for key, values in self.tags.items())


@functools.cache
def osm_classes() -> tuple[OsmClass, ...]:
    """The table of classes and tags, documented in `osm_classes.json` beside this module."""
    text = (resources.files(__package__) / "osm_classes.json").read_text(encoding="utf-8")
    return tuple(
        OsmClass(
            name=name,
            words=tuple(entry["words"]),
            tags={key: frozenset(values) for key, values in entry["tags"].items()},
            line_width_m=entry.get("line_width_m"),
            min_area_m2=entry.get("min_area_m2", MIN_AREA_M2),
        )
        for name, entry in json.loads(text).items()
    )


@dataclass(frozen=True)
class OsmFeature:
    """A feature of an extract.

    Attributes:
        class_name: its class.
        geometry: polygon or line, EPSG:4326.
    """

    class_name: str
    geometry: "BaseGeometry"


def label_tiles(
    tiles: pa.Table,
    features: Iterable[OsmFeature],
    sensor: Sensor,
    epsg: int,
    progress: Callable[[int, int], None] | None = None,
) -> pa.Table:
    """Label the footprints of tiles.

    A class is a label where its features, united, cover at least its least area within the footprint. The class that
    covers at least `DOMINANT_SHARE` of it, if there is one, is the single label.

    Args:
        tiles: TILES rows of one region.
        features: features of the region.
        sensor: the tiles' sensor.
        epsg: the region's UTM zone.
        progress: told (tiles done, tiles).

    Returns:
        OSM_LABELS rows, one for each tile, sorted by tile_id; without labels where nothing of the table lies.

    Raises:
        InputError: if there are tiles, but no feature of the table at all.
    """
    import shapely

    table = {of.name: of for of in osm_classes()}
    to_zone = transformer("EPSG:4326", f"EPSG:{epsg}").transform
    names, shapes = [], []
    for feature in features:
        geometry = shapely.transform(feature.geometry, to_zone, interleaved=False)
        width_m = table[feature.class_name].line_width_m
        if width_m is not None and geometry.geom_type in {"LineString", "MultiLineString"}:
            geometry = shapely.buffer(geometry, width_m / 2, cap_style="flat")
        names.append(feature.class_name)
        shapes.append(shapely.make_valid(geometry))
    if not shapes and tiles.num_rows:
        raise InputError(
            "The OpenStreetMap extract has no feature of the table there: give one of that area."
        )
    tree = shapely.STRtree(shapes)
    x0_m, y0_m = columns(tiles, "x0_m", "y0_m")
    margin_m = (sensor.chip_m - sensor.footprint_m) / 2
    west, north = x0_m + margin_m, y0_m - margin_m
    squares: Any = shapely.box(west, north - sensor.footprint_m, west + sensor.footprint_m, north)
    rows = []
    for number, (tile_id, square) in enumerate(zip(tiles["tile_id"].to_pylist(), squares, strict=True)):
        inside: dict[str, list[Any]] = {}
        for place in np.sort(tree.query(square, predicate="intersects")):
            inside.setdefault(names[place], []).append(shapely.intersection(shapes[place], square))
        areas = {name: float(shapely.area(shapely.union_all(parts))) for name, parts in inside.items()}
        kept = sorted(name for name, area_m2 in areas.items() if area_m2 >= table[name].min_area_m2)
        shares = [areas[name] / sensor.footprint_m**2 for name in kept]
        largest = max(range(len(kept)), key=shares.__getitem__, default=None)
        is_dominant = largest is not None and shares[largest] >= DOMINANT_SHARE
        rows.append(
            {
                "tile_id": tile_id,
                "labels": kept,
                "shares": shares,
                "single_label": kept[largest] if largest is not None and is_dominant else None,
            }
        )
        if progress:
            progress(number + 1, tiles.num_rows)
    return pa.Table.from_pylist(rows, schema=OSM_LABELS.schema).sort_by("tile_id")


def count_labels(table: pa.Table) -> dict[str, int]:
    """Tiles of each class.

    Args:
        table: OSM_LABELS rows.

    Returns:
        Class to number of tiles, most frequent first.
    """
    return dict(Counter(name for labels in table["labels"].to_pylist() for name in labels).most_common())

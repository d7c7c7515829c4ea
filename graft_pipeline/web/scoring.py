"""What tiles score for words, ready for a map: contrasts, cells where tiles are too many, hits as GeoJSON.

The measure is concept_maps.py's, so that the page and `graft map` agree; what a single tile shows is in tiles.py.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline.concept_maps import Background, Squares, map_concepts, split_at_antimeridian
from graft_pipeline.geometry import projection as projection_of
from graft_pipeline.geometry import utm_epsg
from graft_pipeline.imagery import Sensor
from graft_pipeline.manifests import columns
from graft_pipeline.search import SearchIndex, best
from graft_pipeline.web.parameters import Box, Query

#: Tiles that a page draws one by one; more are counted in cells.
MAX_POINTS = 20_000
#: Cells across the wider side of what is shown.
_CELLS_ACROSS = 72
_CELL_KM = (0.25, 200.0)
#: Hits that are saved at most, the best first.
MAX_HITS = 50_000
#: Rows of the answers that are kept, all together: about 100 bytes each.
_KEPT_ROWS = 1_000_000
#: Tiles up to which a list is taken from the scores that the map needs anyway: one scan serves both.
_SCANNED_ROWS = 1_000_000
_KEPT_WORDS = 256
_BARS = 40

#: Words in, (D,) float32 L2-normalised out.
EncodeText = Callable[[str], npt.NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Scored:
    """Every tile that a query admits.

    Attributes:
        rows: SEARCH_RESULTS rows, in the order of region and tile.
        background: of the words, over every tile of the sensor.
        contrast: (N,) float64, standard deviations above the background's mean, to three decimals.
    """

    rows: pa.Table
    background: Background
    contrast: npt.NDArray[np.float64]

    @cached_property
    def places(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Longitudes and latitudes of the tiles' centres, (N,) each."""
        lon, lat = columns(self.rows, "center_lon_deg", "center_lat_deg")
        return lon, lat


class Scorer:
    """Scores the tiles of an index, and remembers the last answers. Safe to share between threads.

    Args:
        index: the sensor's index.
        encode_text: the text tower of the encoder that made its vectors.
    """

    def __init__(self, index: SearchIndex, encode_text: EncodeText) -> None:
        self._index = index
        self._encode = encode_text
        # One at a time: a scan keeps all cores busy and its answer is large; whoever waits may find it kept.
        self._lock = threading.Lock()
        self._vectors: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()
        self._backgrounds: OrderedDict[str, Background] = OrderedDict()
        self._scored: OrderedDict[Query, Scored] = OrderedDict()

    def nearest(self, query: Query, top: int) -> pa.Table:
        """SEARCH_RESULTS rows of the tiles nearest to the words, best first."""
        with self._lock:
            if self._index.rows <= _SCANNED_ROWS or query in self._scored:
                scored = self._scan(query)
                return scored.rows.take(pa.array(best(columns(scored.rows, "score")[0], top)))
            return self._index.search(self._vector(query.words), top, *filter(None, (query.filters,)))

    def scored(self, query: Query) -> Scored:
        """What every tile scores that the query admits."""
        with self._lock:
            return self._scan(query)

    def _scan(self, query: Query) -> Scored:
        if query in self._scored:
            self._scored.move_to_end(query)
            return self._scored[query]
        vector, filters = self._vector(query.words), query.filters
        rows = None
        if query.words not in self._backgrounds:
            rows = self._index.scores(vector).combine_chunks()
            self._backgrounds[query.words] = Background.of(columns(rows, "score")[0])
            _forget(self._backgrounds, _KEPT_WORDS)
        background = self._backgrounds[query.words]
        if filters is not None:
            rows = self._index.scores(vector, filters).combine_chunks()
        elif rows is None:
            rows = self._index.scores(vector).combine_chunks()
        # Rounded once, so that the page, which counts hits by itself, and the file agree on every one of them.
        made = Scored(rows, background, np.round(background.contrast(columns(rows, "score")[0]), 3))
        self._scored[query] = made
        while len(self._scored) > 1 and sum(s.rows.num_rows for s in self._scored.values()) > _KEPT_ROWS:
            self._scored.popitem(last=False)
        return made

    def _vector(self, words: str) -> npt.NDArray[np.float32]:
        if words not in self._vectors:
            self._vectors[words] = self._encode(words)
            _forget(self._vectors, _KEPT_WORDS)
        self._vectors.move_to_end(words)
        return self._vectors[words]


def _forget(kept: OrderedDict[str, Any], count: int) -> None:
    while len(kept) > count:
        kept.popitem(last=False)


def density(scored: Scored, view: Box | None, max_points: int = MAX_POINTS) -> dict[str, Any]:
    """What a map of a query draws.

    Args:
        scored: its tiles.
        view: what the map shows, degrees; None: everything.
        max_points: tiles that are told one by one.

    Returns:
        JSON: `admitted` tiles, the `background`, a `histogram` of all their contrasts, the first and last of their
        `days`. Of those in the view either each (`kind` tiles: `tile_id`, `region` as a number into `regions`, `lon`,
        `lat`, `contrast`) or, if they are more than max_points, counts in squares of equal area (`kind` cells:
        `box`es as west, south, east, north, their `tiles`, and their `hits` from each of `thresholds` on).
    """
    background = scored.background
    answer: dict[str, Any] = {
        "admitted": scored.rows.num_rows,
        "background": {
            "mean": round(background.mean, 5),
            "deviation": round(background.deviation, 5),
            "tiles": background.tiles,
        },
        "histogram": _histogram(scored.contrast),
        "days": _days(scored.rows),
    }
    lon, lat = scored.places
    shown = np.arange(len(lon))
    if view is not None:
        west, south, east, north = view
        shown = np.flatnonzero((lon >= west) & (lon <= east) & (lat >= south) & (lat <= north))
    answer["shown"] = len(shown)
    if len(shown) > max_points:
        return answer | _cells(scored, shown)
    some = scored.rows.take(pa.array(shown))
    regions = some["region"].combine_chunks().dictionary_encode()
    return answer | {
        "kind": "tiles",
        "regions": regions.dictionary.to_pylist(),
        "region": regions.indices.to_pylist(),
        "tile_id": some["tile_id"].to_pylist(),
        "lon": np.round(lon[shown], 6).tolist(),
        "lat": np.round(lat[shown], 6).tolist(),
        "contrast": scored.contrast[shown].tolist(),
    }


def _histogram(contrast: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Counts of contrasts from 0 on, in bars of one width."""
    top = max(2.0, float(np.ceil(contrast.max() * 2) / 2)) if len(contrast) else 2.0
    counts, _ = np.histogram(contrast, bins=_BARS, range=(0.0, top))
    return {"top": top, "counts": counts.tolist()}


def _cells(scored: Scored, shown: npt.NDArray[np.int64]) -> dict[str, Any]:
    import shapely

    lon, lat = scored.places[0][shown], scored.places[1][shown]
    north_km = 111.2 * float(np.ptp(lat))
    east_km = 111.2 * float(np.ptp(lon)) * float(np.cos(np.radians(lat.mean())))
    side_km = float(np.clip(max(north_km, east_km) / _CELLS_ACROSS, *_CELL_KM))
    rows = scored.rows.take(pa.array(shown))
    # The rounded contrasts, as the file's: they are cosines with a background of mean 0 and deviation 1.
    contrast, plain = scored.contrast[shown].astype(np.float32), Background(0.0, 1.0, len(shown))
    maps = map_concepts(rows, {"": contrast}, {"": plain}, Squares(side_km))
    boxes = shapely.bounds(maps.cells.outlines(maps.keys))
    return {
        "kind": "cells",
        "side_km": round(side_km, 3),
        "thresholds": list(maps.thresholds),
        "box": np.round(boxes, 5).tolist(),
        "tiles": maps.tiles.tolist(),
        "hits": maps.counts[0].tolist(),
    }


def listed(rows: pa.Table) -> list[dict[str, Any]]:
    """SEARCH_RESULTS rows as JSON."""
    return [
        {
            "tile_id": row["tile_id"],
            "region": row["region"],
            "lon": round(row["center_lon_deg"], 6),
            "lat": round(row["center_lat_deg"], 6),
            "acquired_on": row["acquired_at_utc"].date().isoformat(),
            "score": round(row["score"], 5),
        }
        for row in rows.to_pylist()
    ]


def hits_geojson(query: Query, scored: Scored, threshold: float, sensor: Sensor) -> dict[str, Any]:
    """The tiles from a contrast on, as GeoJSON (RFC 7946).

    Args:
        query: whose hits they are; told in the file.
        scored: its tiles.
        threshold: contrast from which a tile is a hit.
        sensor: tells how large a tile is.

    Returns:
        A FeatureCollection: each tile's footprint with its id, region, day, scene, score, contrast and rank, best
        first, MAX_HITS at most.
    """
    hits = np.flatnonzero(scored.contrast >= threshold)
    (scores,) = columns(scored.rows, "score")
    order = hits[np.argsort(-scores[hits], kind="stable")][:MAX_HITS]
    rows = scored.rows.take(pa.array(order))
    corners = _footprints(rows, sensor)
    features = [
        {
            "type": "Feature",
            "id": row["tile_id"],
            "geometry": _geometry(ring),
            "properties": {
                "rank": rank,
                "tile_id": row["tile_id"],
                "region": row["region"],
                "center_lon_deg": row["center_lon_deg"],
                "center_lat_deg": row["center_lat_deg"],
                "acquired_on": row["acquired_at_utc"].date().isoformat(),
                "scene_id": row["scene_id"],
                "score": round(row["score"], 5),
                "contrast": contrast,
            },
        }
        for rank, (row, contrast, ring) in enumerate(
            zip(rows.to_pylist(), scored.contrast[order].tolist(), corners, strict=True), start=1
        )
    ]
    return {
        "type": "FeatureCollection",
        # Foreign members, which RFC 7946 allows: what was asked, and whether the file holds all of it.
        "query": {
            "words": query.words,
            "sensor": sensor.name,
            "box": None if query.box is None else list(query.box),
            "since": None if query.since is None else query.since.isoformat(),
            "until": None if query.until is None else query.until.isoformat(),
            "contrast": threshold,
        },
        "hits": len(hits),
        "features": features,
    }


def _footprints(rows: pa.Table, sensor: Sensor) -> list[list[list[float]]]:
    """Rings of the tiles' footprints, counter-clockwise from the south-west corner."""
    lon, lat, regions = columns(rows, "center_lon_deg", "center_lat_deg", "region")
    half_m = sensor.crop_px * sensor.gsd_m / 2
    rings = np.empty((len(lon), 5, 2))
    for region in dict.fromkeys(regions.tolist()):
        here = np.flatnonzero(regions == region)
        # A region lies in one UTM zone, whichever of its tiles is asked.
        plane = projection_of(utm_epsg(float(lon[here[0]]), float(lat[here[0]])))
        x, y = plane.forward(lon[here], lat[here])
        for corner, (right, up) in enumerate(((-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1))):
            rings[here, corner] = np.column_stack(plane.inverse(x + right * half_m, y + up * half_m))
    made: list[list[list[float]]] = np.round(rings, 7).tolist()
    return made


def _geometry(ring: list[list[float]]) -> dict[str, Any]:
    """A footprint's GeoJSON geometry; on the antimeridian in two parts (RFC 7946, 3.1.9)."""
    lons = [lon for lon, _ in ring]
    if max(lons) - min(lons) <= 180:
        return {"type": "Polygon", "coordinates": [ring]}
    import shapely
    from shapely.geometry.polygon import orient

    parts = shapely.get_parts(split_at_antimeridian([(lon, lat) for lon, lat in ring]))
    rings = [np.round(orient(part).exterior.coords, 7).tolist() for part in parts]
    return {"type": "MultiPolygon", "coordinates": [[ring] for ring in rings]}


def _days(rows: pa.Table) -> list[str] | None:
    """First and last day on which the scenes of rows were acquired; None without any."""
    ends = pc.min_max(rows["acquired_at_utc"]).as_py()
    return None if ends["min"] is None else [ends[end].date().isoformat() for end in ("min", "max")]

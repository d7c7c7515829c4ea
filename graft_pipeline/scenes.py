"""Scenes: a source's listing made rows, and which scene serves which chip.

The listing is fetched in resources/; pixels are asked for in chips.py.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline.errors import DataError
from graft_pipeline.geometry import FloatArray, Grid, projection, transformer
from graft_pipeline.imagery import Sensor
from graft_pipeline.manifests import columns
from graft_pipeline.schemas import SCENES

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

logger = logging.getLogger(__name__)

#: So many scenes are offered for one chip: if all have missing pixels there, more will not help.
MAX_CANDIDATES = 8
#: And so many where clouds decide: of five scenes three are cloudy somewhere, and one of 24 is clear.
MAX_CLOUDY_CANDIDATES = 24

_EPSG = re.compile(r"EPSG:\d{4,6}")

#: Metres by which a chip may stick out of a scene's rectangle: rounding of coordinates, far below a pixel.
_ROUNDING_M = 1e-3


def most_candidates(sensor: Sensor) -> int:
    """How many scenes are offered for one chip of a sensor."""
    return MAX_CLOUDY_CANDIDATES if sensor.has_mask else MAX_CANDIDATES


def scene_rows(assets: Iterable[Mapping[str, Any]], sensor: Sensor) -> pa.Table:
    """Coerce a source's listing to rows: Earth Engine's images (EarthEngineAsset, REST reference), or the like.

    Zero-valued fields may be absent from an answer; ids repeat when listings overlap. Assets that lack a
    band, a grid or a time cannot serve any chip: they are left out and counted in the log.

    Args:
        assets: assets with id, startTime, geometry, properties and bands.
        sensor: whose collection was listed.

    Returns:
        SCENES rows, unique by scene_id and sorted by it.
    """
    rows: dict[str, dict[str, Any]] = {}
    unusable = 0
    for asset in assets:
        row = _scene_row(asset, sensor)
        if row is None:
            unusable += 1
        else:
            rows[row["scene_id"]] = row
    if unusable:
        logger.warning("%d assets of %s have no usable bands, grid or time", unusable, sensor.collection)
    return pa.Table.from_pylist([rows[key] for key in sorted(rows)], schema=SCENES.schema)


def _scene_row(asset: Mapping[str, Any], sensor: Sensor) -> dict[str, Any] | None:
    import shapely

    scene_id = str(asset.get("id") or asset.get("name") or "")
    scene_id = scene_id.removeprefix("projects/earthengine-public/assets/")
    bands = {band.get("id"): band.get("grid") or {} for band in asset.get("bands") or []}
    acquired = _time(asset.get("startTime"))
    if not scene_id or acquired is None or any(band not in bands for band in sensor.bands):
        return None
    grid = bands[sensor.bands[0]]
    crs = str(grid.get("crsCode", ""))
    affine, size = grid.get("affineTransform") or {}, grid.get("dimensions") or {}
    scale_x, scale_y = float(affine.get("scaleX", 0)), float(affine.get("scaleY", 0))
    width, height = int(size.get("width", 0)), int(size.get("height", 0))
    is_sheared = any(float(affine.get(key, 0)) for key in ("shearX", "shearY"))
    if _EPSG.fullmatch(crs) is None or is_sheared or not (scale_x and scale_y and width and height):
        return None
    xs = sorted((float(affine.get("translateX", 0)), float(affine.get("translateX", 0)) + scale_x * width))
    ys = sorted((float(affine.get("translateY", 0)), float(affine.get("translateY", 0)) + scale_y * height))
    cloud = None
    if sensor.cloud_property is not None:
        given = (asset.get("properties") or {}).get(sensor.cloud_property)
        cloud = None if given is None else float(given)
    footprint = _footprint(asset.get("geometry"))
    if footprint is None:
        footprint = _rectangle(crs, xs[0], ys[0], xs[1], ys[1])
    return {
        "scene_id": scene_id,
        "acquired_at_utc": acquired,
        "cloud_pct": cloud,
        "crs": crs,
        "x_min_m": xs[0],
        "y_min_m": ys[0],
        "x_max_m": xs[1],
        "y_max_m": ys[1],
        "footprint_wkb": shapely.to_wkb(footprint),
    }


def _time(text: Any) -> datetime | None:
    try:
        time = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return time if time.tzinfo is not None else None


def _footprint(geometry: Any) -> "BaseGeometry | None":
    """The valid (multi)polygon of a GeoJSON geometry or a bare ring, as of `_ground`; None if there is none."""
    import shapely

    if not isinstance(geometry, Mapping):
        return None
    try:
        shape: Any = shapely.geometry.shape(dict(geometry))
        if shape.geom_type in ("LinearRing", "LineString"):
            shape = shapely.Polygon(shape)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, shapely.errors.ShapelyError):
        return None
    return _ground(shape)


def _ground(shape: "BaseGeometry") -> "BaseGeometry | None":
    """The polygons of a shape, valid, and cut in two where one crosses the antimeridian; None if there are none."""
    import shapely

    repaired = [shapely.make_valid(_unwrapped(polygon)) for polygon in _polygons(shape)]
    polygons = [polygon for part in repaired for polygon in _polygons(part) if polygon.area > 0]
    if not polygons:
        return None
    ground = shapely.union_all(polygons)
    if ground.bounds[2] <= 180:
        return ground
    here = shapely.intersection(ground, shapely.box(-180, -90, 180, 90))
    beyond = shapely.intersection(ground, shapely.box(180, -90, 540, 90))
    return shapely.union_all([here, shapely.transform(beyond, lambda points: points - (360, 0))])


def _polygons(shape: "BaseGeometry") -> "list[BaseGeometry]":
    """The single polygons of a geometry; a collection may hold multipolygons."""
    import shapely

    return [part for part in shapely.get_parts(shapely.get_parts(shape)) if part.geom_type == "Polygon"]


def _unwrapped(polygon: "BaseGeometry") -> "BaseGeometry":
    """A polygon that crosses the antimeridian, its longitudes going on beyond 180; any other as it is."""
    import shapely

    if polygon.is_empty:
        return polygon
    turned = shapely.transform(polygon, lambda points: np.column_stack([points[:, 0] % 360, points[:, 1]]))
    (west, _, east, _), (first, _, last, _) = polygon.bounds, turned.bounds
    # From -179.9 to 179.9 is no scene around the world, unless nothing smaller comes of it.
    return turned if west < -180 or (east - west > 180 and 0 < last - first < 180) else polygon


def _rectangle(crs: str, x_min: float, y_min: float, x_max: float, y_max: float) -> "BaseGeometry":
    """A pixel grid's rectangle in EPSG:4326, its sides bent as they are there."""
    import shapely

    outline = shapely.segmentize(
        shapely.box(x_min, y_min, x_max, y_max), max(x_max - x_min, y_max - y_min) / 20
    )
    to_degrees = transformer(crs, "EPSG:4326")
    points = shapely.get_coordinates(outline)
    ring = shapely.Polygon(np.column_stack(to_degrees.transform(points[:, 0], points[:, 1])))
    return _ground(ring) or ring


def candidates(
    grid: Grid, time: datetime | None, scenes: pa.Table, sensor: Sensor, limit: int = MAX_CANDIDATES
) -> pa.Table:
    """Scenes that can serve one chip, best first.

    A scene can when its own pixel rectangle contains the chip (not when it merely intersects), so does its
    footprint of valid ground, and its cloud percentage is below the sensor's limit for scenes. The best is the
    newest or the closest in time (paper, section 3.2), ties by id.

    Args:
        grid: the chip's grid.
        time: when the centre photo was taken, UTC; where it is unknown the newest scene is best.
        scenes: SCENES rows.
        sensor: the sensor.
        limit: most scenes to return.

    Returns:
        SCENES rows in order of preference.
    """
    rows = _choose([grid], [time], scenes, sensor, limit)[0]
    return scenes.take(pa.array(rows, pa.int64()))


def candidates_for_grids(
    grids: Sequence[Grid],
    times: Sequence[datetime | None],
    scenes: pa.Table,
    sensor: Sensor,
    limit: int = MAX_CANDIDATES,
) -> list[list[str]]:
    """`candidates` for many chips at once.

    Args:
        grids: the chips' grids, of one UTM zone.
        times: as many times, UTC, None where unknown.
        scenes: SCENES rows.
        sensor: the sensor.
        limit: most scenes for a chip.

    Returns:
        Scene ids in order of preference, one list for each grid.
    """
    ids = scenes["scene_id"].to_pylist()
    return [[ids[row] for row in rows] for rows in _choose(grids, times, scenes, sensor, limit)]


def chip_candidates(
    tiles: pa.Table,
    photos: pa.Table,
    scenes: pa.Table,
    sensor: Sensor,
    tile_ids: Sequence[str],
    limit: int = MAX_CANDIDATES,
) -> dict[str, list[str]]:
    """`candidates` for tiles, at the time of their centre photos.

    Args:
        tiles: TILES rows of a region.
        photos: FLICKR_PHOTOS rows of it.
        scenes: SCENES rows of it.
        sensor: the sensor.
        tile_ids: which tiles.
        limit: at most so many for each.

    Returns:
        Scene ids in order of preference by tile id; tiles that are not in `tiles` have none.
    """
    wanted = tiles.filter(pc.is_in(tiles["tile_id"], pa.array(tile_ids, pa.string())))
    grids = tile_grids(wanted)
    chosen = candidates_for_grids(grids, center_times(wanted, photos), scenes, sensor, limit)
    found = dict(zip(wanted["tile_id"].to_pylist(), chosen, strict=True))
    return {tile_id: found.get(tile_id, []) for tile_id in tile_ids}


def not_held(chips: pa.Table, scenes: pa.Table, sensor: Sensor) -> npt.NDArray[np.bool_]:
    """Which chips are not held, or no more, by the scene that they are of.

    Args:
        chips: CHIPS rows of a region.
        scenes: SCENES rows of it. Of a scene that is listed no more nothing is known: it holds its chips.
        sensor: the sensor; its clouds do not count.

    Returns:
        (rows,) bool; False for chips without a scene.
    """
    clear = regardless_of_clouds(sensor)
    of_scene = chips["scene_id"].combine_chunks()
    found = np.zeros(chips.num_rows, dtype=np.bool_)
    for scene_id in pc.unique(of_scene.drop_null()).to_pylist():
        scene = scenes.filter(pc.equal(scenes["scene_id"], scene_id))
        if scene.num_rows:
            rows = np.flatnonzero(
                pc.fill_null(pc.equal(of_scene, scene_id), False).to_numpy(zero_copy_only=False)
            )
            grids = tile_grids(chips.take(pa.array(rows)))
            holding = candidates_for_grids(grids, [None] * len(grids), scene, clear)
            found[rows] = [not scene_ids for scene_ids in holding]
    return found


def regardless_of_clouds(sensor: Sensor) -> Sensor:
    """The sensor without its limits of clouds: which scene holds which chip has nothing to do with them."""
    return replace(sensor, cloud_rule="scene", cloud_property=None, max_cloud_pct=None)


def tile_grids(tiles: pa.Table) -> list[Grid]:
    """The chip grids of tiles.

    Args:
        tiles: rows with the grid columns: TILES or CHIPS.

    Returns:
        One grid for each row.
    """
    names = ("epsg", "x0_m", "y0_m", "gsd_m", "chip_px")
    rows = zip(*(tiles[name].to_pylist() for name in names), strict=True)
    return [Grid(epsg, x0_m, y0_m, gsd_m, side, side) for epsg, x0_m, y0_m, gsd_m, side in rows]


def center_times(tiles: pa.Table, photos: pa.Table) -> list[datetime | None]:
    """When the centre photos of tiles were taken.

    Args:
        tiles: TILES rows.
        photos: FLICKR_PHOTOS rows.

    Returns:
        `taken_at_utc`, None where it or the photo is unknown.
    """
    position = pc.index_in(tiles["center_photo_id"], photos["photo_id"].combine_chunks())
    times: list[datetime | None] = photos["taken_at_utc"].take(position).to_pylist()
    return times


def _choose(
    grids: Sequence[Grid],
    times: Sequence[datetime | None],
    scenes: pa.Table,
    sensor: Sensor,
    limit: int,
) -> list[list[int]]:
    """Rows of the scenes that serve each grid, best first."""
    import shapely

    if not grids or not scenes.num_rows:
        return [[] for _ in grids]
    if len({grid.epsg for grid in grids}) > 1:
        raise DataError("Chips of several UTM zones at once: choose scenes region by region.")
    acquired, ids, crs = columns(scenes, "acquired_at_utc", "scene_id", "crs")
    acquired = acquired.astype("datetime64[ms]").astype(np.int64)
    box = np.column_stack(columns(scenes, "x_min_m", "y_min_m", "x_max_m", "y_max_m"))
    usable = np.ones(scenes.num_rows, dtype=bool)
    if sensor.scene_limit_pct is not None:
        (cloud,) = columns(scenes, "cloud_pct")
        # An unknown percentage (NaN) is not below any limit.
        usable = np.asarray(cloud.astype(np.float64) < sensor.scene_limit_pct)
    outlines = [grid.outline_m() for grid in grids]
    x, y = np.stack([outline[0] for outline in outlines]), np.stack([outline[1] for outline in outlines])
    reach = {name: _bounds_in(x, y, grids[0].crs, str(name)) for name in np.unique(crs)}
    lon, lat = projection(grids[0].epsg).inverse(x, y)
    squares: Any = shapely.polygons(np.stack([lon, lat], axis=-1))
    footprints = shapely.from_wkb(scenes["footprint_wkb"].to_pylist())
    shapely.prepare(footprints)
    by_id = np.argsort(ids.astype(str), kind="stable")
    newest_first = by_id[np.argsort(-acquired[by_id], kind="stable")]
    of_crs = {name: np.flatnonzero(crs == name) for name in reach}

    chosen: list[list[int]] = []
    for number, (square, time) in enumerate(zip(squares, times, strict=True)):
        contains = np.zeros(scenes.num_rows, dtype=bool)
        for name, rows in of_crs.items():
            x_min, y_min, x_max, y_max = reach[name][number]
            own = box[rows]
            contains[rows] = (
                (own[:, 0] <= x_min + _ROUNDING_M)
                & (own[:, 1] <= y_min + _ROUNDING_M)
                & (own[:, 2] >= x_max - _ROUNDING_M)
                & (own[:, 3] >= y_max - _ROUNDING_M)
            )
        if sensor.scene_choice == "closest" and time is not None:
            moment = round(time.timestamp() * 1000)
            order = by_id[np.argsort(np.abs(acquired[by_id] - moment), kind="stable")]
        else:
            order = newest_first
        served: list[int] = []
        # Polygons are dear and only the first few scenes are wanted: one after the other.
        for row in order[(contains & usable)[order]]:
            if shapely.covers(footprints[row], square):
                served.append(int(row))
                if len(served) == limit:
                    break
        chosen.append(served)
    return chosen


def _bounds_in(x: FloatArray, y: FloatArray, source: str, target: str) -> npt.NDArray[np.float64]:
    """(G, 4) bounds in another CRS of (G, P) points; not finite where that is not defined, so in no scene."""
    if source != target:
        x, y = transformer(source, target).transform(x, y)
        x, y = np.asarray(x), np.asarray(y)
    return np.stack([x.min(axis=1), y.min(axis=1), x.max(axis=1), y.max(axis=1)], axis=1)

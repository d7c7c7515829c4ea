"""Grid tiles: a regular lattice of tiles over an area, ground that nobody photographed included; for search and maps.

No photo is paired with them and nothing learns from them: they are kept under a sensor name of their own. Tiles that
centre on photos are chosen in sampling.py; how chips are fetched is in chips.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline.errors import InputError
from graft_pipeline.imagery import Sensor
from graft_pipeline.manifests import partition_file, read_table
from graft_pipeline.regions import Region
from graft_pipeline.schemas import CHIPS, TILES

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry
    from upath import UPath

SUFFIX = "_grid"
SAMPLING = "grid"
#: Of no use to either split.
_SPLIT = "guard"


def grid_sensor(sensor: Sensor) -> Sensor:
    """The sensor under whose name a sensor's grid tiles are kept: `naip_grid`.

    Args:
        sensor: a deployment's sensor.

    Returns:
        The same record by another name; raw bands are not kept.
    """
    return replace(sensor, name=f"{sensor.name}{SUFFIX}", raw_bands=())


def kept_as(sensor: str) -> tuple[str, str]:
    """The names under which tiles of a sensor are kept: those that centre on photos, and those of its grid."""
    return sensor, f"{sensor}{SUFFIX}"


def stored_chips(root: "UPath | Path", sensor: str, region: str) -> "tuple[pa.Table, UPath]":
    """The chips of a region's tiles, of its grid too.

    Args:
        root: storage root.
        sensor: name of the sensor.
        region: key of the region.

    Returns:
        CHIPS rows, and the folder that their shards are named from.

    Raises:
        DataError: if a table is damaged.
    """
    tables = [CHIPS.empty()]
    for name in kept_as(sensor):
        place = {"sensor": name, "region": region}
        found = read_table(partition_file(root, CHIPS, **place), CHIPS)
        if found is not None:
            folder = pa.scalar(f"sensor={name}/region={region}/")
            shards = pc.binary_join_element_wise(folder, found["shard"], "")
            number = CHIPS.schema.get_field_index("shard")
            tables.append(found.set_column(number, CHIPS.schema.field(number), shards))
    return pa.concat_tables(tables), cast("UPath", root / CHIPS.name)


def sensor_of(tile_id: str) -> str:
    """The sensor under whose name a tile and its chip are kept, `naip` or `naip_grid`: the first part of its id."""
    return tile_id.partition("-")[0]


def grid_tiles(region: Region, area: "BaseGeometry", sensor: Sensor, stride_m: float) -> pa.Table:
    """Tiles whose centres lie on a lattice of the region's UTM zone, within the area.

    Centres are the multiples of the stride in x and in y: neighbouring regions of a zone go on with one lattice, and a
    larger area adds tiles and moves none. With a stride of `sensor.footprint_m` footprints cover the ground once.

    Args:
        region: the region; centres lie in it.
        area: shapely geometry in which they lie as well, EPSG:4326.
        sensor: of the grid, see `grid_sensor`.
        stride_m: distance of neighbours, metres.

    Returns:
        TILES rows without a centre photo, from north to south and west to east.

    Raises:
        InputError: if the stride is below half a footprint.
    """
    import shapely

    if not stride_m >= sensor.spacing_m:
        raise InputError(
            f"A grid of {sensor.name} every {stride_m:g} m: give at least {sensor.spacing_m:g} m, half a footprint, "
            "in GRAFT_GRID_STRIDE_M."
        )
    shared = shapely.intersection(area, region.polygon)
    if shared.is_empty or shared.area == 0:
        return TILES.empty()
    outline = shapely.segmentize(shared.envelope, 0.05)
    x, y = region.projection.forward(*shapely.get_coordinates(outline).T)
    columns = np.arange(np.floor(x.min() / stride_m), np.ceil(x.max() / stride_m) + 1).astype(np.int64)
    rows = np.arange(np.ceil(y.max() / stride_m), np.floor(y.min() / stride_m) - 1, -1).astype(np.int64)
    row, column = (values.ravel() for values in np.meshgrid(rows, columns, indexing="ij"))
    lon, lat = region.projection.inverse(column * stride_m, row * stride_m)
    shapely.prepare(shared)
    kept = shapely.intersects_xy(shared, lon, lat) & region.contains(lon, lat)
    row, column, lon, lat = row[kept], column[kept], lon[kept], lat[kept]
    center_x, center_y, half = column * float(stride_m), row * float(stride_m), sensor.chip_px / 2
    count = len(row)
    return pa.table(
        {
            "tile_id": [
                f"{sensor.name}-{region.epsg}-{stride_m:g}-{c}-{r}"
                for c, r in zip(column.tolist(), row.tolist(), strict=True)
            ],
            "tile_index": pa.array(np.arange(count, dtype=np.int32)),
            "center_photo_id": [""] * count,
            "center_lon_deg": lon,
            "center_lat_deg": lat,
            "center_x_m": center_x,
            "center_y_m": center_y,
            "epsg": np.full(count, region.epsg, np.int32),
            # As Grid.snapped, for all at once.
            "x0_m": np.floor(center_x / sensor.gsd_m - half + 0.5) * sensor.gsd_m,
            "y0_m": np.floor(center_y / sensor.gsd_m + half + 0.5) * sensor.gsd_m,
            "gsd_m": np.full(count, float(sensor.gsd_m)),
            "chip_px": np.full(count, sensor.chip_px, np.int32),
            "sampling": [SAMPLING] * count,
            "split": [_SPLIT] * count,
        },
        schema=TILES.schema,
    )

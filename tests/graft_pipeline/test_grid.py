"""Grid tiles: one lattice for a zone, inside region and area, that grows with the area and moves nothing."""

import numpy as np
import pyarrow.compute as pc
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Grid
from graft_pipeline.grid import grid_sensor, grid_tiles, kept_as, sensor_of
from graft_pipeline.imagery import NAIP, SENTINEL2
from graft_pipeline.manifests import conform
from graft_pipeline.regions import Region
from graft_pipeline.schemas import TILES

SENSORS = st.sampled_from([grid_sensor(NAIP), grid_sensor(SENTINEL2)])
CORNERS = st.tuples(st.integers(-320, 332).map(lambda n: n / 4), st.integers(-720, 719).map(lambda n: n / 4))


@st.composite
def areas(draw: st.DrawFn) -> tuple[Region, shapely.Geometry, float]:
    """A region, an area that overlaps it, and a stride in footprints that gives tens of tiles."""
    south, west = draw(CORNERS)
    region = Region(south, west, 0.25)
    x, y = draw(st.floats(-0.05, 0.2)), draw(st.floats(-0.05, 0.2))
    width, height = draw(st.floats(0.02, 0.1)), draw(st.floats(0.02, 0.1))
    area = shapely.box(west + x, south + y, west + x + width, south + y + height)
    return region, area, draw(st.floats(0.5, 2))


@given(areas(), SENSORS)
def test_tiles_lie_on_the_lattice_inside_region_and_area(of, sensor) -> None:
    region, area, strides = of
    stride_m = max(sensor.spacing_m, strides * 900.0)
    tiles = grid_tiles(region, area, sensor, stride_m)
    rows = conform(tiles, TILES).to_pylist()
    lon, lat = tiles["center_lon_deg"].to_numpy(), tiles["center_lat_deg"].to_numpy()
    assert region.contains(lon, lat).all()
    assert shapely.intersects_xy(area, lon, lat).all()
    for row in rows:
        assert sensor_of(row["tile_id"]) == sensor.name
        for value in (row["center_x_m"], row["center_y_m"]):
            assert value / stride_m == pytest.approx(round(value / stride_m), abs=1e-9)
        snapped = Grid.snapped(
            region.epsg, row["center_x_m"], row["center_y_m"], sensor.gsd_m, sensor.chip_px
        )
        assert (row["x0_m"], row["y0_m"]) == (snapped.x0_m, snapped.y0_m)
    # None is forgotten: as many as the ground that both share has room for, give or take a border's length.
    shared = area.intersection(region.polygon)
    x, y = region.projection.forward(*shapely.get_coordinates(shared).T) if not shared.is_empty else ([], [])
    ground = shapely.Polygon(np.column_stack([x, y])) if len(x) > 3 else shapely.Polygon()
    slack = ground.length / stride_m + 4
    assert abs(len(rows) - ground.area / stride_m**2) <= slack


@given(areas())
def test_a_larger_area_adds_tiles_and_neighbours_share_none(of) -> None:
    region, area, _ = of
    sensor = grid_sensor(NAIP)
    small = set(grid_tiles(region, area, sensor, 1000.0)["tile_id"].to_pylist())
    large = grid_tiles(region, area.buffer(0.02), sensor, 1000.0)
    assert small <= set(large["tile_id"].to_pylist())
    east = region.west_deg + 0.25
    if east < 180:
        beside = grid_tiles(Region(region.south_deg, east, 0.25), area.buffer(0.02), sensor, 1000.0)
        assert not pc.any(pc.is_in(beside["tile_id"], large["tile_id"].combine_chunks())).as_py()


def test_a_grid_has_a_name_of_its_own_and_no_tile_twice_on_the_ground() -> None:
    assert kept_as("naip") == ("naip", grid_sensor(NAIP).name)
    assert sensor_of("naip-123_4") == "naip"
    with pytest.raises(InputError, match="GRAFT_GRID_STRIDE_M"):
        grid_tiles(Region(42.0, -71.0), shapely.box(-71, 42, -70, 43), grid_sensor(NAIP), 111.0)
    nowhere = grid_tiles(Region(42.0, -71.0), shapely.box(10, 42, 11, 43), grid_sensor(NAIP), 500.0)
    assert nowhere.num_rows == 0

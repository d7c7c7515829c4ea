from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Grid, projection, utm_epsg

GRIDS = st.builds(
    Grid.snapped,
    epsg=st.just(32619),
    x_m=st.floats(2e5, 8e5),
    y_m=st.floats(0, 9e6),
    gsd_m=st.sampled_from([0.6, 1.0, 10.0]),
    size_px=st.sampled_from([32, 224, 448]),
)


@pytest.mark.parametrize(
    ("lon", "lat", "epsg"),
    [
        (-71.5, 42.3, 32619),
        (-72.0, 42.0, 32619),
        (-72.0001, 42.0, 32618),
        (5.0, 60.0, 32631),  # no exception for Norway
        (151.2, -33.9, 32756),
        (180.0, 0.0, 32660),
        (-180.0, -0.1, 32701),
    ],
)
def test_utm_epsg_follows_the_six_degree_rule(lon: float, lat: float, epsg: int) -> None:
    assert utm_epsg(lon, lat) == epsg


@pytest.mark.parametrize(("lon", "lat"), [(0, 85), (0, -81), (181, 0), (float("nan"), 0)])
def test_utm_epsg_refuses_what_utm_does_not_cover(lon: float, lat: float) -> None:
    with pytest.raises(InputError, match="outside of UTM"):
        utm_epsg(lon, lat)


@given(lon=st.floats(-72, -66.001), lat=st.floats(-79, 83))
def test_projection_and_back(lon: float, lat: float) -> None:
    there = projection(utm_epsg(lon, lat)).forward([lon], [lat])
    back = projection(utm_epsg(lon, lat)).inverse(*there)
    assert np.allclose(back, [[lon], [lat]], atol=1e-9)


def test_projection_leaves_its_arguments_alone_and_works_in_threads() -> None:
    lon, lat = np.linspace(-72, -66, 500), np.linspace(40, 45, 500)
    before = lon.copy()
    expected = projection(32619).forward(lon, lat)
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(lambda _: projection(32619).forward(lon, lat), range(64)):
            np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(lon, before)


@given(
    x=st.floats(2e5, 8e5),
    y=st.floats(0, 9e6),
    gsd=st.sampled_from([0.6, 1.0, 10.0]),
    size=st.sampled_from([32, 224, 448]),
)
def test_snapped_grid_is_on_the_pixel_grid_and_centred(x: float, y: float, gsd: float, size: int) -> None:
    grid = Grid.snapped(32619, x, y, gsd, size)
    for origin in (grid.x0_m, grid.y0_m):
        assert abs(origin / gsd - round(origin / gsd)) < 1e-6
    col, row = grid.to_pixel(x, y)
    assert abs(col - size / 2) <= 0.5 + 1e-6
    assert abs(row - size / 2) <= 0.5 + 1e-6
    assert 0 <= col < size
    assert 0 <= row < size


@given(grid=GRIDS, col=st.floats(-10, 500), row=st.floats(-10, 500))
def test_pixels_places_and_affine_agree(grid: Grid, col: float, row: float) -> None:
    x, y = grid.to_xy(col, row)
    a, _, x0, _, e, y0 = tuple(grid.affine)[:6]
    assert np.allclose((x, y), (x0 + a * col, y0 + e * row), atol=1e-6)
    assert np.allclose(grid.to_pixel(x, y), (col, row), atol=1e-6)


@given(grid=GRIDS)
def test_outline_runs_along_the_bounds(grid: Grid) -> None:
    x, y = grid.outline_m(7)
    assert x.shape == y.shape == (28,)
    assert (x.min(), y.min(), x.max(), y.max()) == pytest.approx(grid.bounds_m)
    x_min, y_min, x_max, y_max = grid.bounds_m
    on_border = np.isclose(x, x_min) | np.isclose(x, x_max) | np.isclose(y, y_min) | np.isclose(y, y_max)
    assert on_border.all()
    assert len({(round(a, 3), round(b, 3)) for a, b in zip(x, y, strict=True)}) == 28

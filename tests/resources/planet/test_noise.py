import numpy as np
import pytest

from resources.planet.noise import (
    NodeAxes,
    SplineNoise,
    hashes,
    interpolate_points,
    nodes_around,
    salt,
    uniforms,
)


def test_salts_tell_parts_apart():
    assert salt(1, "a") == salt(1, "a")
    assert len({salt(1, "a"), salt(1, "b"), salt(2, "a"), salt("1", "a"), salt((1, "a"))}) == 5


def test_hashes_do_not_depend_on_the_shape_of_the_request():
    i, j = np.arange(-40, 40), np.arange(-3, 30)
    field = hashes(7, i[None, :], j[:, None])
    assert field[5, 11] == hashes(7, int(i[11]), int(j[5]))[0]
    assert len(np.unique(field)) == field.size


def test_uniforms_are_uniform():
    draw = uniforms(salt("uniform"), np.arange(300)[:, None], np.arange(300))
    assert draw.min() >= 0
    assert draw.max() < 1
    counts, _ = np.histogram(draw, bins=10, range=(0, 1))
    assert np.all(np.abs(counts / draw.size - 0.1) < 0.005)


@pytest.mark.parametrize("spread", [900.0, 4e6])
def test_noise_has_the_same_bits_on_axes_and_among_points(spread):
    # The wider spread makes `at` hash each point by itself.
    noise = SplineNoise([salt("a"), salt("b")], 170.0)
    rng = np.random.default_rng(0)
    x, y = np.sort(rng.uniform(0, spread, 23)), np.sort(rng.uniform(-5e5, -5e5 + spread, 19))[::-1]
    grid = noise.on_axes(x, y) if spread < 1e4 else None
    points = noise.at(*(axis.ravel() for axis in np.meshgrid(x, y)))
    assert points.dtype == np.float32
    if grid is not None:
        np.testing.assert_array_equal(grid.reshape(2, -1), points)
    for k in (0, 100, 300):
        row, column = divmod(k, len(x))
        alone = noise.on_axes(x[column : column + 1], y[row : row + 1])
        np.testing.assert_array_equal(alone[:, 0, 0], points[:, k])


def test_noise_is_smooth_and_of_unit_variance():
    noise = SplineNoise([salt("smooth")], 400.0)
    axis = np.arange(0, 40_000, 50.0)
    values = noise.on_axes(axis, axis)[0]
    assert abs(values.mean()) < 0.1
    assert 0.85 < values.std() < 1.15
    assert np.abs(np.diff(values, axis=0)).max() < 0.8


@pytest.mark.parametrize("gsd_m", [1.0, 10.0])
def test_interpolation_has_the_same_bits_in_bands_rows_and_points(gsd_m):
    noise = SplineNoise([salt("nodes")], 300.0)
    x = (np.arange(320_000, 320_090) + 0.5) * gsd_m
    y = (np.arange(-4_600_000, -4_599_900) * -1.0 - 0.5) * -gsd_m
    y = -np.sort(-y)
    nodes = NodeAxes(x, y, 40.0)
    values = noise.on_axes(nodes.x, nodes.y)[0]
    whole = nodes.interpolate(values)
    assert whole.shape == (len(y), len(x))
    part = NodeAxes(x[13:60], y[20:33], 40.0)
    np.testing.assert_array_equal(part.interpolate(noise.on_axes(part.x, part.y)[0]), whole[20:33, 13:60])
    points_x, points_y = (axis.ravel() for axis in np.meshgrid(x, y))
    at_nodes = noise.at(*nodes_around(points_x, points_y, 40.0))[0]
    np.testing.assert_array_equal(interpolate_points(at_nodes, points_x, points_y, 40.0), whole.ravel())
    assert whole.min() >= values.min()
    assert whole.max() <= values.max()

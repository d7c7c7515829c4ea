"""The planet's truth over HTTP, for evaluation."""

from typing import Any

import numpy as np
import pytest

from graft_pipeline.errors import ServiceError
from graft_pipeline.geometry import Grid
from resources.planet.truth_client import PlanetTruth
from resources.planet.world import World


def test_the_truth_is_the_worlds_own(planet: Any) -> None:
    truth, world = PlanetTruth(planet.url), World(0)
    assert truth.classes == list(world.classes)
    assert truth.palette.shape == (len(truth.classes), 3)
    assert truth.palette.dtype == np.uint8
    grid = Grid(32619, 280_000, 4_660_000, 4.0, 60, 40)
    cover = truth.land_cover(grid)
    assert cover.shape == (40, 60)
    assert cover.dtype == np.uint8
    np.testing.assert_array_equal(cover, world.land_cover(grid))


@pytest.mark.parametrize(
    "grid",
    [
        Grid(4326, 0, 0, 1.0, 10, 10),
        Grid(32619, 280_000, 4_660_000, 0.0, 10, 10),
        Grid(32619, 280_000, 4_660_000, 1.0, 100_000, 100_000),
    ],
)
def test_what_is_no_grid_is_refused(planet: Any, grid: Grid) -> None:
    with pytest.raises(ServiceError, match="Not a grid"):
        PlanetTruth(planet.url).land_cover(grid)


def test_no_planet_is_an_error_that_names_the_address() -> None:
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:9"):
        _ = PlanetTruth("http://127.0.0.1:9").classes

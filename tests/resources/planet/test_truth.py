"""The planet's truth over HTTP, for evaluation."""

from typing import Any

import numpy as np
import pytest
import requests

from graft_pipeline.errors import InputError, ServiceError
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
        Grid(32619, 280_000, 4_660_000, 50_001.0, 10, 10),
        Grid(32619, 280_000, 4_660_000, float("nan"), 10, 10),
        Grid(32619, 1e12, 4_660_000, 1.0, 10, 10),
        Grid(32619, 280_000, float("inf"), 1.0, 10, 10),
    ],
)
def test_what_is_no_grid_is_refused(planet: Any, grid: Grid) -> None:
    with pytest.raises(ServiceError, match="Not a grid"):
        PlanetTruth(planet.url).land_cover(grid)


def test_no_planet_is_an_error_that_names_the_address() -> None:
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:9"):
        _ = PlanetTruth("http://127.0.0.1:9").classes


def test_photos_are_what_the_world_drew(planet: Any) -> None:
    truth, world = PlanetTruth(planet.url), World(0)
    photos = world.photos_in(-70.45, 42.05, -70.4, 42.1)
    kinds, is_outdoor = truth.photos([str(photo_id) for photo_id in photos["photo_id"]])
    assert kinds == photos["kind"].tolist()
    np.testing.assert_array_equal(is_outdoor, np.isin(photos["kind"], world.classes))
    assert 0 < is_outdoor.mean() < 1
    assert truth.photos([])[1].shape == (0,)
    with pytest.raises(InputError, match="1 photos such as 12345678901"):
        truth.photos([str(photos["photo_id"][0]), "12345678901"])


@pytest.mark.parametrize("body", ["{", "{}", "[1]", "x", "[" * 100_000])
def test_what_is_no_list_of_photos_is_refused(planet: Any, body: str) -> None:
    answer = requests.post(f"{planet.url}/truth/photos", data=body, timeout=30)
    assert answer.status_code == 400
    assert "JSON list of strings" in answer.text

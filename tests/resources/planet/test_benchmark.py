"""The planet's benchmark: labels and masks are what the land cover behind the crops says."""

import numpy as np
import pytest

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Grid, Projection
from graft_pipeline.imagery import NAIP
from graft_pipeline.settings import Settings
from resources.imagery import open_imagery
from resources.planet.benchmark import MIN_CHIPS, NARROW, NARROW_SHARE, build_benchmark
from resources.planet.questions import build_questions
from resources.planet.truth_client import PlanetTruth
from resources.planet.world import World
from resources.world import open_world

#: NAIP ends in the middle of it, at 50 degrees north.
AT_THE_EDGE = (-70.05, 49.965, -69.95, 50.035)


@pytest.fixture(scope="module")
def imagery(planet):
    with open_world(Settings(world="planet", planet={"url": planet.url})) as settings:
        yield open_imagery(settings)


@pytest.fixture(scope="module")
def made(planet, imagery):
    truth = PlanetTruth(planet.url)
    return build_benchmark(
        truth, imagery, NAIP, AT_THE_EDGE, chips_per_class=MIN_CHIPS + 2, segmentation_chips=12
    )


def test_crops_show_what_they_are_labelled(made):
    world = World(0)
    covers = []
    for west, south, east, north in made.squares:
        x, y = Projection(32619).forward((west + east) / 2, (south + north) / 2)
        grid = Grid.snapped(32619, float(x), float(y), NAIP.gsd_m, NAIP.crop_px)
        covers.append(world.land_cover(grid))
    for cover, label in zip(covers, made.labels, strict=False):
        name = made.classes[label]
        # A square's middle is the crop's within a pixel or two; the labels' map is coarser than the crop.
        share = (cover == world.classes.index(name)).mean()
        assert share > (NARROW_SHARE if name in NARROW else 0.6) - 0.06, name
    agreement = [
        (mask == cover).mean() for mask, cover in zip(made.masks, covers[len(made.labels) :], strict=True)
    ]
    assert min(agreement) > 0.9


def test_classes_that_lost_their_scenes_are_left_out(made):
    """Half of the area has no scene: what is left of a class must still be enough to be scored."""
    assert len(made.chips) == len(made.labels) > 0
    assert len(made.squares) == len(made.chips) + len(made.masks)
    counts = np.bincount(made.labels, minlength=len(made.classes))
    assert len(counts) == len(made.classes)
    assert counts.min() >= MIN_CHIPS
    assert len(made.classes) < len(made.all_classes)


@pytest.mark.parametrize("bounds", [(10.0, 48.0, 10.1, 48.1), (-70.1, 43.0, -70.098, 43.002)])
def test_an_area_without_a_crop_says_which_setting_to_change(planet, imagery, bounds):
    """NAIP flies over one country only; the other area is smaller than a crop."""
    truth = PlanetTruth(planet.url)
    for build in (build_benchmark, build_questions):
        with pytest.raises(InputError, match="GRAFT_BENCHMARK_BOUNDS"):
            build(truth, imagery, NAIP, bounds)

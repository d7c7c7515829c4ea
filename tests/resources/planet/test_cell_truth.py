"""True land cover of cells and footprints, against a fine map of the same ground."""

import numpy as np
import pytest
import shapely

from graft_pipeline.concept_maps import Hexagons
from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Grid, Projection
from resources.planet.cell_truth import cell_shares
from resources.planet.truth_client import PlanetTruth


def test_shares_are_those_of_a_fine_map(planet):
    truth, cells = PlanetTruth(planet.url), Hexagons(8)
    lon, lat = np.array([-70.31, -70.30, -70.27]), np.array([42.11, 42.11, 42.13])
    keys, cell_of = np.unique(cells.keys(lon, lat), return_inverse=True)
    told = []
    outlines = cells.outlines(keys)
    of_cells, of_tiles = cell_shares(
        truth, outlines, lon, lat, cell_of, 224.0, lambda done, of: told.append((done, of))
    )
    assert told[-1] == (len(keys), len(keys))
    assert of_cells.sum(axis=1) == pytest.approx(1)
    assert of_tiles.sum(axis=1) == pytest.approx(1)

    utm = Projection(32619)
    x, y = utm.forward(lon, lat)
    for number in range(len(lon)):
        grid = Grid(32619, x[number] - 112, y[number] + 112, 4.0, 56, 56)
        exact = np.bincount(truth.land_cover(grid).ravel(), minlength=len(truth.classes)) / 56**2
        # A pixel is an eighth of the footprint's side: classes may differ by what lies along its borders.
        assert np.abs(of_tiles[number] - exact).max() < 0.15
    for number, outline in enumerate(outlines):
        west, south, east, north = outline.bounds
        places = np.random.default_rng(number).uniform((west, south), (east, north), (400, 2))
        places = places[shapely.contains_xy(outline, *places.T)]
        seen = [
            truth.land_cover(Grid(32619, float(px) - 2, float(py) + 2, 4.0, 1, 1))[0, 0]
            for px, py in zip(*utm.forward(*places[:60].T), strict=True)
        ]
        drawn = np.bincount(seen, minlength=len(truth.classes)) / len(seen)
        # Four standard deviations of 60 draws.
        assert np.abs(of_cells[number] - drawn).max() < 4 * 0.5 / np.sqrt(60)


def test_a_cell_larger_than_a_request_is_refused(planet):
    cells = Hexagons(3)
    outlines = cells.outlines(cells.keys([-70.3], [42.1]))
    nothing = np.zeros(0)
    with pytest.raises(InputError, match="GRAFT_CONCEPT_RESOLUTION"):
        cell_shares(PlanetTruth(planet.url), outlines, nothing, nothing, nothing, 224.0)

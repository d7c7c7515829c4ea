"""Scores of maps: a perfect map, one that is upside down, one that says nothing, and what is not compared."""

import numpy as np
import pytest

from graft_pipeline.errors import InputError
from training.zero_shot.map_scores import LEAST_TILES, score_maps

RANDOM = np.random.default_rng(0)
TRUTH = RANDOM.random((2, 50))
TILES = np.full(50, LEAST_TILES)


def test_agreement_is_one_at_best_and_nothing_for_a_map_that_says_nothing():
    maps = {"perfect": TRUTH * 0.5, "upside down": -TRUTH, "nothing": np.ones_like(TRUTH)}
    scores = score_maps(maps, TRUTH, TILES, ["lake", "forest"]).metrics["concept maps"]
    assert scores["perfect"] == pytest.approx(dict.fromkeys(scores["perfect"], 1.0))
    assert scores["upside down"]["correlation"] == pytest.approx(-1)
    assert scores["upside down"]["average precision"] < scores["chance"]["average precision"]
    assert scores["nothing"] == pytest.approx(scores["chance"]) == scores["chance"]
    assert scores["chance"]["average precision"] == pytest.approx(0.2)


def test_cells_with_few_tiles_and_concepts_that_lie_nowhere_are_left_out():
    tiles = TILES.copy()
    tiles[:10] = LEAST_TILES - 1
    wrong_there = TRUTH.copy()
    wrong_there[:, :10] = RANDOM.random((2, 10))
    truth = np.stack([TRUTH[0], np.zeros(50)])
    made = score_maps({"map": wrong_there}, truth, tiles, ["lake", "desert"])
    assert made.cells == 40
    assert list(made.by_concept["map"]) == ["lake"]
    assert made.metrics["concept maps"]["map"]["correlation"] == pytest.approx(1)


def test_a_rare_class_counts_where_it_is():
    truth = np.zeros((1, 50))
    truth[0, :3] = 0.4
    made = score_maps({"map": truth}, truth, TILES, ["lake"])
    assert made.by_concept["chance"]["lake"]["average precision"] == pytest.approx(3 / 50)
    assert made.by_concept["map"]["lake"]["average precision"] == 1


def test_nothing_to_compare_is_said():
    for truth, tiles in ((np.zeros((2, 50)), TILES), (TRUTH, np.zeros(50, int)), (TRUTH[:1], TILES)):
        with pytest.raises(InputError, match="map"):
            score_maps({"map": TRUTH}, truth, tiles, ["lake", "forest"])

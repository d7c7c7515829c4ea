"""How well concept maps agree with what lies in their cells: correlation, and precision of their ranking.

The maps come from graft_pipeline/concept_maps.py, the truth from its owner; pictures are drawn by the caller.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score

from graft_pipeline.errors import InputError
from training.zero_shot.evaluate import CHANCE

#: Cells with fewer tiles say more about chance than about the map.
LEAST_TILES = 3
#: The cells in which a class covers most, so many of all, are what its map should rank first.
TOP_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class MapScores:
    """Agreement of maps with the truth.

    Attributes:
        metrics: task `concept maps`: contender to metric to mean over concepts; `chance` among the contenders.
        by_concept: contender to concept to metric to value.
        cells: cells that were compared.
    """

    metrics: dict[str, dict[str, dict[str, float]]]
    by_concept: dict[str, dict[str, dict[str, float]]]
    cells: int


def score_maps(
    maps: Mapping[str, NDArray[np.float64]],
    truth: NDArray[np.float64],
    tiles: NDArray[np.integer],
    concepts: Sequence[str],
) -> MapScores:
    """Compare maps with true shares of land cover, over cells of at least `LEAST_TILES` tiles.

    `correlation` is Pearson's between a map's value and the true share of the cell, `rank correlation` Spearman's;
    both are 0 for a map without any variation. `average precision` is of ranking first the fifth of the cells in which
    the class covers most; cells of equal value rank together. At chance it is that fifth.

    Args:
        maps: contender to (K, C) values.
        truth: (K, C) true share of each concept in each cell.
        tiles: (C,) tiles in each cell.
        concepts: names of the K concepts.

    Returns:
        The scores; concepts that no compared cell holds, or all hold alike, are left out.

    Raises:
        InputError: if shapes differ, or nothing can be compared.
    """
    shape = (len(concepts), len(tiles))
    if truth.shape != shape or any(values.shape != shape for values in maps.values()):
        raise InputError(f"Maps and truth must be (concepts, cells) = {shape}: map the same cells.")
    kept = tiles >= LEAST_TILES
    scored = [number for number in range(len(concepts)) if kept.any() and np.ptp(truth[number, kept]) > 0]
    if not scored:
        raise InputError(
            f"No cell with {LEAST_TILES} tiles differs from others in a concept: map larger cells or more ground."
        )
    by_concept: dict[str, dict[str, dict[str, float]]] = {name: {} for name in (*maps, CHANCE)}
    for number in scored:
        true = truth[number, kept]
        # Where fewer cells hold the class, it is those that do.
        is_top = (true >= np.quantile(true, 1 - TOP_SHARE)) & (true > 0)
        for name, values in maps.items():
            by_concept[name][concepts[number]] = _agreement(values[number, kept], true, is_top)
        by_concept[CHANCE][concepts[number]] = {
            "correlation": 0.0,
            "rank correlation": 0.0,
            "average precision": float(is_top.mean()),
        }
    metrics = {
        name: {
            metric: float(np.mean([values[metric] for values in of.values()]))
            for metric in next(iter(of.values()))
        }
        for name, of in by_concept.items()
    }
    return MapScores({"concept maps": metrics}, by_concept, int(kept.sum()))


def _agreement(
    values: NDArray[np.float64], true: NDArray[np.float64], is_top: NDArray[np.bool_]
) -> dict[str, float]:
    varies = np.ptp(values) > 0
    return {
        "correlation": float(pearsonr(values, true)[0]) if varies else 0.0,
        "rank correlation": float(spearmanr(values, true)[0]) if varies else 0.0,
        "average precision": float(average_precision_score(is_top, values)),
    }

"""How well indoor/outdoor scores agree with what photos really show, and two scene classifiers with each other.

Scores are computed in embeddings.py; where the truth comes from is the caller's business.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graft_pipeline.errors import InputError

#: Thresholds of the curve.
THRESHOLDS = np.round(np.arange(0.0, 1.0001, 0.02), 2)

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Accuracy:
    """One classifier against the truth.

    Attributes:
        accuracy: share of right decisions.
        indoor_recall: share of indoor photos that are dropped; NaN without any.
        outdoor_recall: share of outdoor photos that are kept; NaN without any.
        confusion: (2, 2) int64 of indoor, outdoor; rows are the truth, columns the decision.
        curve: (T,) accuracy at each of `THRESHOLDS`.
        kept_curve: (T,) share of photos that each threshold keeps.
        best_threshold: threshold of the curve with most right decisions; the middle one of several.
    """

    accuracy: float
    indoor_recall: float
    outdoor_recall: float
    confusion: npt.NDArray[np.int64]
    curve: Floats
    kept_curve: Floats
    best_threshold: float


@dataclass(frozen=True, eq=False)
class Agreement:
    """Two classifiers beside each other.

    Attributes:
        share: share of photos with the same decision.
        kappa: Cohen's kappa, agreement beyond what their shares of outdoor photos give by chance; NaN if both
            decide everything alike and the same.
        disagreeing: (M,) int64 numbers of photos with different decisions, the widest gap of scores first.
        second_is_right: of those, how many the second classifier has right.
    """

    share: float
    kappa: float
    disagreeing: npt.NDArray[np.int64]
    second_is_right: int


def accuracy(is_outdoor: Bools, scores: npt.NDArray[np.float32], threshold: float) -> Accuracy:
    """Compare a classifier's decisions with the truth.

    Args:
        is_outdoor: (N,) what the photos show.
        scores: (N,) outdoor probabilities.
        threshold: least score of a photo that is kept.

    Returns:
        Accuracy at the threshold, and at all others.

    Raises:
        InputError: if there is no photo, or the lengths differ.
    """
    if len(is_outdoor) != len(scores) or not len(scores):
        raise InputError(
            f"{len(is_outdoor)} photos and {len(scores)} scores: collect a region with photos, and score all of them."
        )
    kept = scores >= threshold
    confusion = np.bincount(2 * is_outdoor.astype(np.int64) + kept, minlength=4).reshape(2, 2)
    with np.errstate(invalid="ignore"):
        recalls = confusion.diagonal() / confusion.sum(axis=1)
    decisions = scores[None] >= THRESHOLDS[:, None].astype(np.float32)
    curve = (decisions == is_outdoor[None]).mean(axis=1)
    best = np.flatnonzero(curve == curve.max())
    return Accuracy(
        accuracy=float(confusion.trace() / len(scores)),
        indoor_recall=float(recalls[0]),
        outdoor_recall=float(recalls[1]),
        confusion=confusion,
        curve=curve,
        kept_curve=decisions.mean(axis=1),
        best_threshold=float(THRESHOLDS[best[len(best) // 2]]),
    )


def agreement(
    is_outdoor: Bools,
    first: npt.NDArray[np.float32],
    second: npt.NDArray[np.float32],
    threshold: float,
) -> Agreement:
    """Compare two classifiers' decisions.

    Args:
        is_outdoor: (N,) what the photos show.
        first: (N,) outdoor probabilities.
        second: (N,) outdoor probabilities of the same photos.
        threshold: least score of a photo that is kept.

    Returns:
        How often they agree, and where they do not.
    """
    a, b = first >= threshold, second >= threshold
    share = float((a == b).mean())
    chance = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    differing = np.flatnonzero(a != b)
    gap = np.abs(first[differing] - second[differing])
    return Agreement(
        share=share,
        kappa=(share - chance) / (1 - chance) if chance < 1 else float("nan"),
        disagreeing=differing[np.argsort(-gap, kind="stable")],
        second_is_right=int((b[differing] == is_outdoor[differing]).sum()),
    )


def errors_by_kind(
    kinds: Sequence[str], is_outdoor: Bools, scores: npt.NDArray[np.float32], threshold: float
) -> Mapping[str, tuple[int, int]]:
    """Wrong decisions and photos of each kind that has wrong ones, most wrong ones first.

    Args:
        kinds: what each photo shows.
        is_outdoor: (N,) whether that is outdoors.
        scores: (N,) outdoor probabilities.
        threshold: least score of a photo that is kept.

    Returns:
        (wrong, photos) by kind.
    """
    names, kind_of = np.unique(np.asarray(kinds, dtype=str), return_inverse=True)
    is_wrong = (scores >= threshold) != is_outdoor
    wrong = np.bincount(kind_of, weights=is_wrong, minlength=len(names)).astype(int)
    photos = np.bincount(kind_of, minlength=len(names))
    order = np.argsort(-wrong, kind="stable")
    return {str(names[n]): (int(wrong[n]), int(photos[n])) for n in order if wrong[n]}

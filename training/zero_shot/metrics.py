"""Metrics of predictions: accuracy, confusion matrix, per-class accuracy, intersection over union.

Retrieval's mean average precision is in retrieve.py. Where scikit-learn defines a metric, it computes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from graft_pipeline.errors import InputError


@dataclass(frozen=True, eq=False)
class Scores:
    """How predictions agree with the truth; of images or of pixels.

    Attributes:
        classes: class names in order.
        confusion: (K, K) int64, rows are the truth, columns the prediction.
        accuracy: share of correct predictions.
        recall: per class present in the truth: share of it that was found.
        iou: per class present in the truth: intersection over union of truth and prediction.
        per_class_accuracy: mean of `recall` (the paper's segmentation metric).
        mean_iou: mean of `iou`.
    """

    classes: tuple[str, ...]
    confusion: NDArray[np.int64]
    accuracy: float
    recall: dict[str, float]
    iou: dict[str, float]
    per_class_accuracy: float
    mean_iou: float


def score(truth: NDArray[np.integer], predicted: NDArray[np.integer], classes: Sequence[str]) -> Scores:
    """Compare predictions with the truth.

    Args:
        truth: class numbers, any shape; numbers outside 0..K-1 are ignored, as unlabelled pixels.
        predicted: class numbers 0..K-1, same shape.
        classes: names of the K classes.

    Returns:
        The scores.

    Raises:
        InputError: if the shapes differ or nothing is labelled.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if truth.shape != predicted.shape:
        raise InputError(f"Truth {truth.shape} and prediction {predicted.shape} must be the same shape.")
    count = len(classes)
    is_labelled = (truth >= 0) & (truth < count)
    if not is_labelled.any():
        raise InputError("No label is one of the classes: there is nothing to score.")
    return scores_of(_confusion(truth[is_labelled], predicted[is_labelled], count), classes)


def scores_of(confusion: NDArray[np.int64], classes: Sequence[str]) -> Scores:
    """Scores from a confusion matrix.

    Args:
        confusion: (K, K) int64, rows are the truth, columns the prediction; not all zero.
        classes: names of the K classes.

    Returns:
        The scores; classes that the truth lacks have neither recall nor IoU.
    """
    of_truth, of_prediction, right = confusion.sum(axis=1), confusion.sum(axis=0), confusion.diagonal()
    present = np.flatnonzero(of_truth)
    recall = {classes[i]: float(right[i] / of_truth[i]) for i in present}
    iou = {classes[i]: float(right[i] / (of_truth[i] + of_prediction[i] - right[i])) for i in present}
    return Scores(
        classes=tuple(classes),
        confusion=confusion,
        accuracy=float(right.sum() / confusion.sum()),
        recall=recall,
        iou=iou,
        per_class_accuracy=float(np.mean(list(recall.values()))),
        mean_iou=float(np.mean(list(iou.values()))),
    )


def _confusion(truth: NDArray[np.integer], predicted: NDArray[np.integer], count: int) -> NDArray[np.int64]:
    if truth.size < 100_000:
        return confusion_matrix(truth.ravel(), predicted.ravel(), labels=range(count)).astype(np.int64)
    # scikit-learn sorts labels first: a minute where millions of pixels take one bincount.
    joint = truth.ravel().astype(np.int64) * count + predicted.ravel()
    return np.bincount(joint, minlength=count * count).reshape(count, count)

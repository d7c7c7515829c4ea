"""Text-to-image retrieval: which images answer a query best, and the mean average precision of the ranking.

Embeddings come from training/encoders.py; queries are texts encoded there, or class embeddings of
classify.py.
"""

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from graft_pipeline.errors import InputError


def retrieve(
    queries: NDArray[np.float32], images: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k images nearest to each query.

    Args:
        queries: (Q, D) float32, L2-normalised.
        images: (N, D) float32, L2-normalised.
        k: how many; N if it is larger.

    Returns:
        (Q, k) int64 image numbers, best first, equal scores in order of number; and (Q, k) float32 cosines.

    Raises:
        InputError: if the widths differ.
    """
    if queries.shape[1] != images.shape[1]:
        raise InputError(
            f"Queries {queries.shape} and images {images.shape} are not in one space: use one model."
        )
    scores = queries @ images.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


def mean_average_precision(
    scores: NDArray[np.float32], is_relevant: NDArray[np.bool_], k: int | None = None
) -> float:
    """Mean average precision of rankings, over queries that have a relevant image.

    Without `k`, AP is scikit-learn's `average_precision_score`. With `k`, only the first k ranks count:
    AP@k = 1 / min(k, R) * sum over ranks i <= k of [image i is relevant] * precision@i, with R relevant
    images in all, so a ranking whose first min(k, R) images are all relevant has AP@k = 1. Equal scores rank
    in order of image number.

    Args:
        scores: (Q, N) float, higher is better.
        is_relevant: (Q, N) bool.
        k: last rank that counts; None: all.

    Returns:
        The mean, 0 to 1.

    Raises:
        InputError: if the shapes differ or no query has a relevant image.
    """
    if scores.shape != is_relevant.shape or scores.ndim != 2:
        raise InputError(f"Scores {scores.shape} and relevance {is_relevant.shape} must be one (Q, N) shape.")
    answerable = is_relevant.any(axis=1)
    if not answerable.any():
        raise InputError("No query has a relevant image: mean average precision is not defined.")
    scores, is_relevant = scores[answerable], is_relevant[answerable]
    if k is None:
        return float(
            np.mean([average_precision_score(y, s) for y, s in zip(is_relevant, scores, strict=True)])
        )
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    hits = np.take_along_axis(is_relevant, order, axis=1)
    precision = hits.cumsum(axis=1) / np.arange(1, hits.shape[1] + 1)
    found = np.minimum(k, is_relevant.sum(axis=1))
    return float(((precision * hits).sum(axis=1) / found).mean())

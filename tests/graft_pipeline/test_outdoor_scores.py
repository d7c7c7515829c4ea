"""Decisions of scene classifiers against the truth; scikit-learn defines the metrics."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, cohen_kappa_score, confusion_matrix, recall_score

from graft_pipeline.errors import InputError
from graft_pipeline.outdoor_scores import THRESHOLDS, accuracy, agreement, errors_by_kind

SCORE = st.floats(0, 1, width=32)
PHOTOS = st.lists(st.tuples(st.booleans(), SCORE, SCORE), min_size=1, max_size=40)


def columns(photos: list[tuple[bool, float, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    truth, first, second = zip(*photos, strict=True)
    return np.array(truth), np.array(first, np.float32), np.array(second, np.float32)


@given(photos=PHOTOS, threshold=st.sampled_from(THRESHOLDS.tolist()))
def test_accuracy_is_scikit_learns(photos: list[tuple[bool, float, float]], threshold: float) -> None:
    truth, scores, _ = columns(photos)
    found = accuracy(truth, scores, threshold)
    decided = scores >= threshold
    assert found.accuracy == pytest.approx(accuracy_score(truth, decided))
    np.testing.assert_array_equal(found.confusion, confusion_matrix(truth, decided, labels=[False, True]))
    for side, value in ((False, found.indoor_recall), (True, found.outdoor_recall)):
        expected = recall_score(truth, decided, pos_label=side, zero_division=np.nan)
        np.testing.assert_allclose(value, expected)
    at_best = accuracy_score(truth, scores >= np.float32(found.best_threshold))
    assert at_best == pytest.approx(found.curve.max())
    assert (np.diff(found.kept_curve) <= 0).all()


@given(photos=PHOTOS)
def test_agreement_is_cohens(photos: list[tuple[bool, float, float]]) -> None:
    truth, first, second = columns(photos)
    found = agreement(truth, first, second, 0.5)
    a, b = first >= 0.5, second >= 0.5
    assert found.share == pytest.approx((a == b).mean())
    if len(np.unique(np.concatenate([a, b]))) == 2:
        assert found.kappa == pytest.approx(cohen_kappa_score(a, b), abs=1e-9)
    assert sorted(found.disagreeing.tolist()) == np.flatnonzero(a != b).tolist()
    gaps = np.abs(first - second)[found.disagreeing]
    assert (np.diff(gaps) <= 0).all()
    assert found.second_is_right == sum(b[n] == truth[n] for n in found.disagreeing)


def test_errors_are_counted_by_kind() -> None:
    kinds = ["dog", "lake", "dog", "food", "dog"]
    truth = np.array([False, True, False, False, False])
    scores = np.array([0.9, 0.2, 0.8, 0.1, 0.1], np.float32)
    assert errors_by_kind(kinds, truth, scores, 0.5) == {"dog": (2, 3), "lake": (1, 1)}


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(InputError, match="collect a region"):
        accuracy(np.zeros(0, bool), np.zeros(0, np.float32), 0.5)

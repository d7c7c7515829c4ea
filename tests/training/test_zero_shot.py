import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score, jaccard_score

from graft_pipeline.errors import InputError
from training.encoders import encode_patches
from training.foundation import FoundationConfig, new_clip
from training.zero_shot.classify import class_embeddings, classify
from training.zero_shot.metrics import score
from training.zero_shot.prompts import PromptSet, load_prompts
from training.zero_shot.retrieve import mean_average_precision, retrieve
from training.zero_shot.scoring import score_images, score_segmentation
from training.zero_shot.segment import score_maps, segment


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def words(texts):
    """A text encoder for tests: one dimension per letter."""
    counts = np.array(
        [[text.count(letter) + 0.01 for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]
    )
    return unit(counts)


# --- prompts and classification ---


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("planet", 12),
        ("eurosat", 10),
        ("bigearthnet", 19),
        ("bigearthnet43", 43),
        ("sat4", 4),
        ("sat6", 6),
        ("satlas", 11),
    ],
)
def test_prompt_sets_that_come_with_the_package(name, count):
    prompts = load_prompts(name)
    assert len(prompts.names) == count
    texts = [text for some in prompts.prompts().values() for text in some]
    assert len(set(texts)) == len(texts)
    assert all("{" not in text for text in texts)


def test_the_planets_classes_are_the_planets():
    from resources.planet.landcover import CLASS_NAMES, CLASSES

    assert load_prompts("planet").names == CLASSES
    assert load_prompts("planet").classes == CLASS_NAMES


def test_prompts_are_every_word_in_every_template():
    prompts = PromptSet({"lake": ("lake", "pond"), "city": ("city",)}, ("a {}", "{}"))
    assert prompts.prompts() == {"lake": ["a lake", "lake", "a pond", "pond"], "city": ["a city", "city"]}
    some = prompts.restricted_to(["city", "swamp"])
    assert some.prompts() == {"city": ["a city", "city"], "swamp": ["a swamp", "swamp"]}


def test_prompt_files_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"templates": ["{}"], "classes": {"a": ["b"]}}))
    assert load_prompts(path).prompts() == {"a": ["b"]}
    path.write_text(json.dumps({"templates": ["{} of {year}"], "classes": {"a": ["{b}"]}}))
    assert load_prompts(path).prompts() == {"a": ["{b} of {year}"]}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"classes": {}}',
        '{"classes": {}, "templates": ["{}"]}',
        '{"classes": {"a": []}, "templates": ["{}"]}',
        '{"classes": {"a": ["b"]}, "templates": ["no place"]}',
        # A word, not a list of words: its letters would be prompts.
        '{"classes": {"a": "bc"}, "templates": ["{}"]}',
        '{"classes": {"a": [1]}, "templates": ["{}"]}',
        '{"classes": {"a": [" "]}, "templates": ["{}"]}',
        '{"classes": {"for\xeat": ["b"]}, "templates": ["{}"]}',
    ],
)
def test_malformed_prompt_files_are_refused(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(InputError):
        load_prompts(path)


def test_an_unknown_prompt_set_names_the_known_ones():
    with pytest.raises(InputError, match="eurosat, planet"):
        load_prompts("mars")


def test_class_embeddings_average_their_prompts():
    prompts = PromptSet({"x": ("a", "b"), "y": ("c",)}, ("{}",))
    embedded = class_embeddings(prompts, words)
    a, b, c = words(["a", "b", "c"])
    np.testing.assert_allclose(embedded, np.stack([unit(a + b), c]), atol=1e-6)
    assert classify(words(["ab", "cc", "b"]), embedded).tolist() == [0, 1, 0]
    with pytest.raises(InputError, match="one space"):
        classify(words(["a"])[:, :5], embedded)


# --- retrieval ---


def plain_average_precision(scores, is_relevant, k):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    hits, total = 0, 0.0
    for rank, image in enumerate(order, start=1):
        if is_relevant[image]:
            hits += 1
            total += hits / rank
    return total / min(k, sum(is_relevant))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 30), ties=st.booleans())
def test_map_at_k_is_the_definition(seed, k, ties):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 4, (3, 20)).astype(float) if ties else random.random((3, 20))
    is_relevant = random.random((3, 20)) < 0.3
    is_relevant[:, 0] = True
    expected = np.mean([plain_average_precision(s, r, k) for s, r in zip(scores, is_relevant, strict=True)])
    assert mean_average_precision(scores, is_relevant, k) == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_map_without_ties_is_scikit_learns_at_every_depth(seed):
    random = np.random.default_rng(seed)
    scores, is_relevant = random.random((2, 15)), random.random((2, 15)) < 0.4
    is_relevant[:, 3] = True
    expected = np.mean([average_precision_score(r, s) for s, r in zip(scores, is_relevant, strict=True)])
    assert mean_average_precision(scores, is_relevant) == pytest.approx(expected)
    assert mean_average_precision(scores, is_relevant, 15) == pytest.approx(expected)


def test_queries_without_an_answer_do_not_count():
    scores = np.array([[0.9, 0.1], [0.9, 0.1]])
    assert mean_average_precision(scores, np.array([[True, False], [False, False]]), 2) == 1.0
    with pytest.raises(InputError, match="not defined"):
        mean_average_precision(scores, np.zeros((2, 2), bool))
    with pytest.raises(InputError, match="one \\(Q, N\\) shape"):
        mean_average_precision(scores, np.zeros((2, 3), bool))


def test_retrieve_orders_by_cosine_then_number():
    images = unit(np.array([[1, 0], [0, 1], [1, 0], [1, 1]]))
    numbers, cosines = retrieve(unit(np.array([[1, 0.1]])), images, 3)
    assert numbers.tolist() == [[0, 2, 3]]
    assert (np.diff(cosines) <= 0).all()
    assert retrieve(images[:1], images, 99)[0].shape == (1, 4)


# --- segmentation and metrics ---


def test_segmentation_puts_patches_where_they_are():
    classes = np.eye(3, dtype=np.float32)
    patches = np.zeros((1, 2, 2, 3), dtype=np.float32)
    patches[0, 0, 0, 0] = patches[0, 0, 1, 1] = patches[0, 1, 0, 2] = patches[0, 1, 1, 2] = 1
    expected = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]])
    assert segment(patches, classes, 4).tolist() == [expected.tolist()]
    # Bilinear between patch centres, constant outside: pixel 1 of 4 lies a quarter of the way.
    np.testing.assert_allclose(score_maps(patches, classes, 4)[0, 0, 0], [1, 0.75, 0.25, 0])
    with pytest.raises(InputError, match="Patches"):
        segment(patches[0], classes, 4)
    with pytest.raises(InputError, match="256"):
        segment(patches, np.zeros((257, 3), np.float32), 4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([30, 120_000]))
def test_metrics_are_scikit_learns(seed, size):
    random = np.random.default_rng(seed)
    truth, predicted = random.integers(0, 4, size), random.integers(0, 5, size)
    scores = score(truth, predicted, ("a", "b", "c", "d", "e"))
    present = np.unique(truth)
    assert scores.accuracy == pytest.approx((truth == predicted).mean())
    if size > 1000:
        return
    import warnings

    with warnings.catch_warnings():
        # It warns of the class that is predicted but never true; that is the case under test.
        warnings.simplefilter("ignore", UserWarning)
        assert scores.per_class_accuracy == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert scores.mean_iou == pytest.approx(jaccard_score(truth, predicted, labels=present, average="macro"))
    assert scores.confusion.sum() == size


def test_large_and_small_inputs_count_alike():
    random = np.random.default_rng(0)
    truth, predicted = random.integers(0, 3, (2, 100)), random.integers(0, 3, (2, 100))
    many = score(np.tile(truth, (1, 600)), np.tile(predicted, (1, 600)), "abc")
    few = score(truth, predicted, "abc")
    np.testing.assert_array_equal(many.confusion, few.confusion * 600)
    assert many.recall == few.recall


def test_unlabelled_pixels_and_absent_classes_do_not_count():
    scores = score(np.array([0, 0, 255, 1]), np.array([0, 1, 1, 1]), ("a", "b", "c"))
    assert scores.accuracy == pytest.approx(2 / 3)
    assert scores.recall == {"a": 0.5, "b": 1.0}
    assert scores.iou == {"a": 0.5, "b": 0.5}
    with pytest.raises(InputError, match="nothing to score"):
        score(np.array([9]), np.array([0]), ("a",))
    with pytest.raises(InputError, match="same shape"):
        score(np.array([0]), np.array([0, 0]), ("a",))


# --- scores of several models ---


@pytest.fixture(scope="module")
def contenders():
    config = FoundationConfig(image_px=32, width=32, head_width=16, vision_layers=1, text_layers=1)
    return {
        "encoder": new_clip(config),
        "foundation": new_clip(FoundationConfig(**(config.__dict__ | {"seed": 1}))),
    }


def test_image_scores_of_each_contender_and_of_chance(contenders):
    random = np.random.default_rng(0)
    chips = random.integers(0, 256, (40, 224, 224, 3), dtype=np.uint8)
    labels = np.arange(40) % 4
    prompts = load_prompts("planet").restricted_to(["lake", "river", "beach", "forest"])
    scores = score_images(contenders, chips, labels, prompts)
    assert set(scores.metrics) == {"classification", "retrieval"}
    for task in scores.metrics.values():
        assert list(task) == ["encoder", "foundation", "chance"]
        assert all(0 <= value <= 1 for values in task.values() for value in values.values())
    assert scores.metrics["classification"]["chance"] == {"accuracy": 0.25}
    # A random ranking of ten relevant images among forty.
    assert scores.metrics["retrieval"]["chance"]["mAP"] == pytest.approx(0.33, abs=0.06)
    assert scores.classification["encoder"].confusion.sum() == 40
    assert scores.top["encoder"].shape == (4, 10)
    again = score_images(contenders, chips, labels, prompts)
    assert again.metrics == scores.metrics
    with pytest.raises(InputError, match="one label per chip"):
        score_images(contenders, chips, labels[:-1], prompts)
    with pytest.raises(InputError, match="are not the 4 classes"):
        score_images(contenders, chips, labels + 1, prompts)


def test_segmentation_scores_of_each_contender_and_of_chance(contenders):
    random = np.random.default_rng(0)
    chips = random.integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    masks = random.integers(0, 12, (3, 224, 224)).astype(np.uint8)
    scores = score_segmentation(contenders, chips, masks, load_prompts("planet"))
    assert list(scores.metrics["segmentation"]) == ["encoder", "foundation", "chance"]
    assert scores.metrics["segmentation"]["chance"]["per-class accuracy"] == pytest.approx(1 / 12, abs=0.01)
    assert set(scores.maps) == {"encoder", "foundation"}
    assert scores.maps["encoder"].shape == masks.shape
    assert set(scores.by_class) == {"encoder", "foundation", "chance"}
    with pytest.raises(InputError, match="Masks must be"):
        score_segmentation(contenders, chips, masks[:, :100], load_prompts("planet"))


def test_a_sensor_with_other_crops_is_scored_as_it_is_trained(contenders):
    random = np.random.default_rng(0)
    # Crops of 32 px fill the input as they are; the same ground in crops of 224 px does after the averaging.
    chips = random.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    enlarged = chips.repeat(7, axis=1).repeat(7, axis=2)
    prompts = load_prompts("planet")
    found = score_images(contenders, chips, np.arange(12), prompts, 32)
    assert found.metrics == score_images(contenders, enlarged, np.arange(12), prompts).metrics
    patches = encode_patches(contenders["encoder"], chips, crop_px=32, footprint_px=32)
    np.testing.assert_array_equal(patches, encode_patches(contenders["encoder"], enlarged))
    masks = random.integers(0, 12, (12, 32, 32)).astype(np.uint8)
    assert score_segmentation(contenders, chips, masks, prompts, 32).maps["encoder"].shape == masks.shape

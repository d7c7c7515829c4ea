"""Zero-shot scores of several models on one labelled set, beside each other and beside chance.

The labelled set is the caller's; single steps and metrics are in classify, retrieve, segment and metrics.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from graft_pipeline.errors import InputError
from training.encoders import CROP_PX, Clip, encode_images, encode_patches, encode_texts
from training.zero_shot.classify import class_embeddings, class_scores
from training.zero_shot.evaluate import CHANCE, chance, image_metrics
from training.zero_shot.metrics import Scores, score
from training.zero_shot.prompts import PromptSet
from training.zero_shot.retrieve import retrieve
from training.zero_shot.segment import segment

#: task -> contender -> metric -> value.
Metrics = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True, eq=False)
class ImageScores:
    """Classification and retrieval of each contender.

    Attributes:
        metrics: tasks `classification` (accuracy) and `retrieval` (mAP, mAP@100, mAP@20), `chance` among the
            contenders.
        classification: per model: accuracy, recall per class and confusion matrix.
        top: per model: (K, 10) int64 numbers of the images retrieved first for each class.
    """

    metrics: Metrics
    classification: dict[str, Scores]
    top: dict[str, NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class SegmentationScores:
    """Segmentation of each contender.

    Attributes:
        metrics: task `segmentation` (per-class accuracy, mIoU, pixel accuracy), `chance` among the
            contenders.
        by_class: per model and for `chance`: recall and IoU per class, confusion matrix.
        maps: per model: (N, P, P) uint8 class numbers.
    """

    metrics: Metrics
    by_class: dict[str, Scores]
    maps: dict[str, NDArray[np.uint8]]


def score_images(
    contenders: Mapping[str, Clip],
    chips: NDArray[np.uint8],
    labels: NDArray[np.int64],
    prompts: PromptSet,
    crop_px: int = CROP_PX,
) -> ImageScores:
    """Classify and retrieve labelled chips by text alone.

    Args:
        contenders: models by name, such as the satellite encoder and the frozen foundation model.
        chips: (N, H, H, 3) uint8 RGB; the central crop is used.
        labels: (N,) class numbers, as in `prompts.names`.
        prompts: the classes in words.
        crop_px: side of the central crop, which is the sensor's.

    Returns:
        The scores.

    Raises:
        InputError: if numbers of chips and labels differ, or a label is no class.
    """
    _check_labels(chips, labels, prompts)
    is_of_class = labels[:, None] == np.arange(len(prompts.names))
    metrics: Metrics = {"classification": {}, "retrieval": {}}
    classification, top = {}, {}
    for name, clip in contenders.items():
        classes = class_embeddings(prompts, partial(encode_texts, clip))
        images = encode_images(clip, chips, crop_px=crop_px)
        scores = class_scores(images, classes)
        classification[name] = score(labels, scores.argmax(axis=1), prompts.names)
        _enter(metrics, name, image_metrics(scores, is_of_class, is_multi_label=False))
        top[name] = retrieve(classes, images, 10)[0]
    random = {name: measure.value for name, measure in chance(is_of_class, is_multi_label=False).items()}
    # Known exactly.
    _enter(metrics, CHANCE, random | {"accuracy": 1 / len(prompts.names)})
    return ImageScores(metrics, classification, top)


def score_segmentation(
    contenders: Mapping[str, Clip],
    chips: NDArray[np.uint8],
    masks: NDArray[np.integer],
    prompts: PromptSet,
    crop_px: int = CROP_PX,
) -> SegmentationScores:
    """Segment chips by text alone.

    Args:
        contenders: models by name, such as the pixel-level encoder and the frozen foundation model's patches.
        chips: (N, H, H, 3) uint8 RGB; the central crop is used.
        masks: (N, crop_px, crop_px) class numbers of the central crop, as in `prompts.names`; others are ignored.
        prompts: the classes in words.
        crop_px: side of the central crop, which is the sensor's.

    Returns:
        The scores.

    Raises:
        InputError: if the masks are not those of the chips' central crops.
    """
    if masks.shape != (len(chips), crop_px, crop_px):
        raise InputError(f"Masks must be ({len(chips)}, {crop_px}, {crop_px}), got {masks.shape}.")
    metrics: Metrics = {"segmentation": {}}
    by_class, maps = {}, {}
    for name, clip in contenders.items():
        classes = class_embeddings(prompts, partial(encode_texts, clip))
        patches = encode_patches(clip, chips, crop_px=crop_px, footprint_px=crop_px)
        maps[name] = segment(patches, classes, crop_px)
        by_class[name] = score(masks, maps[name], prompts.names)
    random = np.random.default_rng(0)
    by_class[CHANCE] = score(
        masks, random.integers(len(prompts.names), size=masks.shape, dtype=np.uint8), prompts.names
    )
    for name, scores in by_class.items():
        metrics["segmentation"][name] = {
            "per-class accuracy": scores.per_class_accuracy,
            "mIoU": scores.mean_iou,
            "pixel accuracy": scores.accuracy,
        }
    return SegmentationScores(metrics, by_class, maps)


def _enter(metrics: Metrics, name: str, values: Mapping[str, float]) -> None:
    """Sort the metrics of one contender by task."""
    metrics["classification"][name] = {"accuracy": values["accuracy"]}
    metrics["retrieval"][name] = {
        metric.removeprefix("retrieval "): value
        for metric, value in values.items()
        if metric.startswith("retrieval ")
    }


def _check_labels(chips: NDArray[np.uint8], labels: NDArray[np.int64], prompts: PromptSet) -> None:
    if len(chips) != len(labels) or len(labels) == 0:
        raise InputError(
            f"{len(chips)} chips and {len(labels)} labels: give one label per chip, and at least one."
        )
    if labels.min() < 0 or labels.max() >= len(prompts.names):
        raise InputError(f"Labels {labels.min()} to {labels.max()} are not the {len(prompts.names)} classes.")

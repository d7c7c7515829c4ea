"""The paper's protocol for image sets: zero-shot and one-shot, classification and retrieval, with intervals.

Sets are read in datasets.py and models in contenders.py; how the numbers are shown is in tables.py.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from graft_pipeline.errors import DataError, InputError
from graft_pipeline.fetching import ordered_map
from training.zero_shot.classify import class_embeddings, class_scores
from training.zero_shot.contenders import Contender
from training.zero_shot.datasets import ImageSet
from training.zero_shot.metrics import Scores, score
from training.zero_shot.prompts import PromptSet
from training.zero_shot.retrieve import mean_average_precision

logger = logging.getLogger(__name__)

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]

CHANCE = "chance"
_CHANCE_DRAWS = 20
_TOP = 10


@dataclass(frozen=True)
class Measure:
    """A number and how sure it is.

    Attributes:
        value: the metric; of one-shot tasks its mean over the draws.
        low: lower end of the 95 % bootstrap interval over images; of one-shot tasks, the mean less the standard
            deviation over the draws.
        high: upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What contenders reach on one image set.

    Attributes:
        dataset: name of the set.
        images: images that were scored.
        classes: class names in order.
        metrics: task (`zero-shot`, `one-shot`) to contender to metric.
        confusion: per contender with text, on single-label sets: accuracy, recall per class, confusion matrix.
        average_precision: per contender with text: class to average precision.
        best: per contender with text: (K, 10) numbers of the images retrieved first for each class.
        is_right: per contender with text: (K, 10) bool, which of those are of the class.
        worst: per contender with text: for each class, up to ten of its images that are retrieved last.
        skipped: samples that were not scored, by reason.
        read: images of the set in order; the numbers above count them.
    """

    dataset: str
    images: int
    classes: tuple[str, ...]
    metrics: dict[str, dict[str, dict[str, Measure]]]
    confusion: dict[str, Scores]
    average_precision: dict[str, dict[str, float]]
    best: dict[str, NDArray[np.int64]]
    is_right: dict[str, NDArray[np.bool_]]
    worst: dict[str, list[NDArray[np.int64]]]
    skipped: dict[str, int]
    read: Callable[[int], NDArray[np.uint8]] = field(repr=False)


def image_metrics(scores: Floats, labels: Bools, *, is_multi_label: bool) -> dict[str, float]:
    """Classification and retrieval from class scores.

    Args:
        scores: (N, K) float, cosine of image and class.
        labels: (N, K) bool.
        is_multi_label: whether an image may have several classes.

    Returns:
        `accuracy` (share of images whose best class is theirs) of single-label sets, or `mAP` over classes
        (scikit-learn's average_precision_score, mean over classes that occur) of multi-label ones; and of the
        ranking of images by each class's score, `retrieval mAP`, `retrieval mAP@100` and `retrieval mAP@20` as
        `retrieve.mean_average_precision` defines them.
    """
    whole = mean_average_precision(scores.T, labels.T)
    first = (
        {"mAP": whole}
        if is_multi_label
        else {"accuracy": float(np.take_along_axis(labels, scores.argmax(axis=1)[:, None], axis=1).mean())}
    )
    return first | {
        "retrieval mAP": whole,
        "retrieval mAP@100": mean_average_precision(scores.T, labels.T, 100),
        "retrieval mAP@20": mean_average_precision(scores.T, labels.T, 20),
    }


def evaluate_images(
    contenders: Sequence[Contender],
    images: ImageSet,
    prompts: PromptSet,
    *,
    draws: int = 10,
    resamples: int = 200,
    seed: int = 0,
    batch_size: int = 64,
    threads: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score models on a labelled set: by words those that know words, and all from one example per class.

    Every image is decoded once, for all contenders. An image that cannot be decoded is left out and counted.

    Args:
        contenders: the models; names must differ.
        images: the set.
        prompts: its classes in words. Classes of the set without words are left out with the images that have no
            other class, and counted; words of classes that the set does not have are ignored, with a warning.
        draws: one-shot runs, each with other examples (paper: 10); 0 leaves one-shot out.
        resamples: bootstrap resamples of the images.
        seed: of examples and resamples.
        batch_size: images encoded at once.
        threads: threads that decode.
        progress: told (images done, images).

    Returns:
        The scores, `chance` among the contenders.

    Raises:
        InputError: if names repeat, no class of the set has words, or no image can be scored.
    """
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names) or CHANCE in names or not names:
        raise InputError(f"Contenders need names of their own other than {CHANCE!r}, got {names}.")
    wanted, skipped = _with_words(images, prompts)
    columns = [images.classes.index(name) for name in wanted.names]
    rows = np.flatnonzero(images.labels[:, columns].any(axis=1))
    if lost := len(images) - len(rows):
        skipped["class without words"] = lost
    vectors, kept = _encode(contenders, images, rows, batch_size, threads, skipped, progress)
    if len(kept) == 0:
        raise InputError(f"No image of {images.name} can be scored; left out: {dict(skipped)}.")
    labels = images.labels[np.ix_(kept, columns)]
    random = np.random.default_rng(seed)
    resampled = [random.integers(len(kept), size=len(kept)) for _ in range(resamples)]
    metrics: dict[str, dict[str, dict[str, Measure]]] = {"zero-shot": {}}
    confusion, precision, best, right, worst = {}, {}, {}, {}, {}
    for contender in contenders:
        if not contender.has_text:
            continue
        name = contender.name
        scores = class_scores(vectors[name], class_embeddings(wanted, contender.encode_texts))
        metrics["zero-shot"][name] = _measured(scores, labels, resampled, images.is_multi_label)
        if not images.is_multi_label:
            confusion[name] = score(labels.argmax(axis=1), scores.argmax(axis=1), wanted.names)
        precision[name] = {
            of: float(average_precision_score(labels[:, n], scores[:, n]))
            for n, of in enumerate(wanted.names)
            if labels[:, n].any()
        }
        order = np.argsort(-scores, axis=0, kind="stable")
        best[name] = kept[order[:_TOP].T]
        right[name] = np.take_along_axis(labels, order[:_TOP], axis=0).T
        worst[name] = [kept[own[labels[own, n]][::-1][:_TOP]] for n, own in enumerate(order.T)]
    metrics["zero-shot"][CHANCE] = chance(labels, is_multi_label=images.is_multi_label, seed=seed)
    if draws:
        metrics["one-shot"] = {
            name: one_shot(vectors[name], labels, draws, seed, is_multi_label=images.is_multi_label)
            for name in names
        }
    return Evaluation(
        dataset=images.name,
        images=len(kept),
        classes=wanted.names,
        metrics=metrics,
        confusion=confusion,
        average_precision=precision,
        best=best,
        is_right=right,
        worst=worst,
        skipped=dict(skipped),
        read=images.read,
    )


def one_shot(
    vectors: Floats, labels: Bools, draws: int, seed: int, *, is_multi_label: bool
) -> dict[str, Measure]:
    """Score by one example per class in place of words (paper, section 4.1).

    Args:
        vectors: (N, D) float32, L2-normalised.
        labels: (N, K) bool.
        draws: runs with other examples; examples are not scored themselves.
        seed: of the examples.
        is_multi_label: as in `image_metrics`.

    Returns:
        Metrics as of `image_metrics`, mean and standard deviation over the draws.
    """
    present = np.flatnonzero(labels.any(axis=0))
    results = []
    for draw in range(draws):
        random = np.random.default_rng([seed, draw])
        examples = np.array([random.choice(np.flatnonzero(labels[:, n])) for n in present])
        others = np.setdiff1d(np.arange(len(vectors)), examples)
        others = others[labels[others][:, present].any(axis=1)]
        if len(others) == 0:
            continue
        scores = vectors[others] @ vectors[examples].T
        results.append(image_metrics(scores, labels[np.ix_(others, present)], is_multi_label=is_multi_label))
    if not results:
        return {}
    table = {name: np.array([row[name] for row in results]) for name in results[0]}
    return {
        name: Measure(float(v.mean()), float(v.mean() - v.std()), float(v.mean() + v.std()))
        for name, v in table.items()
    }


def _with_words(images: ImageSet, prompts: PromptSet) -> tuple[PromptSet, Counter[str]]:
    """The prompts of the classes that the set has, in the set's order."""
    unknown = [name for name in prompts.names if name not in images.classes]
    shared = [name for name in images.classes if name in prompts.classes]
    if unknown:
        logger.warning("%s has no class %s: their prompts are ignored", images.name, ", ".join(unknown))
    if not shared:
        raise InputError(
            f"The prompts name no class of {images.name}: its classes are {', '.join(images.classes)}."
        )
    return prompts.restricted_to(shared), Counter(images.skipped)


def _encode(
    contenders: Sequence[Contender],
    images: ImageSet,
    rows: NDArray[np.int64],
    batch_size: int,
    threads: int,
    skipped: Counter[str],
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, Floats], NDArray[np.int64]]:
    """Vectors of every contender, and the numbers of the images that could be decoded."""
    kept: list[int] = []
    parts: dict[str, list[Floats]] = {contender.name: [] for contender in contenders}
    for numbers, batch in prepared_batches(contenders, images, rows, batch_size, threads, skipped):
        for contender in contenders:
            parts[contender.name].append(contender.encode(batch[contender.image_px]))
        kept += numbers
        if progress:
            progress(len(kept), len(rows))
    if not kept:
        return {}, np.empty(0, np.int64)
    return {name: np.concatenate(some) for name, some in parts.items()}, np.array(kept)


def prepared_batches(
    contenders: Sequence[Contender],
    images: ImageSet,
    rows: NDArray[np.int64],
    batch_size: int,
    threads: int,
    skipped: Counter[str],
) -> Iterator[tuple[list[int], Mapping[int, NDArray[np.uint8]]]]:
    """Batches of images at the sizes that the contenders want, decoded ahead in threads.

    Args:
        contenders: the models.
        images: the set.
        rows: (N,) int64, which images.
        batch_size: images of a batch.
        threads: threads that decode.
        skipped: counts images that cannot be decoded.

    Yields:
        Image numbers, and size to (n, size, size, 3) uint8.
    """
    by_size = {contender.image_px: contender for contender in contenders}

    def prepare(number: int) -> dict[int, NDArray[np.uint8]] | None:
        try:
            image = images.read(number)
        except DataError as error:
            logger.warning("%s", error)
            return None
        return {side: contender.prepare(image) for side, contender in by_size.items()}

    numbers: list[int] = []
    ready: dict[int, list[NDArray[np.uint8]]] = {side: [] for side in by_size}
    with closing(ordered_map(prepare, rows.tolist(), threads)) as results:
        for number, prepared in results:
            if prepared is None:
                skipped["image cannot be decoded"] += 1
                continue
            numbers.append(number)
            for side, image in prepared.items():
                ready[side].append(image)
            if len(numbers) == batch_size:
                yield numbers, {side: np.stack(some) for side, some in ready.items()}
                numbers, ready = [], {side: [] for side in by_size}
    if numbers:
        yield numbers, {side: np.stack(some) for side, some in ready.items()}


def _measured(
    scores: Floats, labels: Bools, resampled: Sequence[NDArray[np.int64]], is_multi_label: bool
) -> dict[str, Measure]:
    """Metrics with their bootstrap intervals."""
    values = image_metrics(scores, labels, is_multi_label=is_multi_label)
    draws = [
        image_metrics(scores[rows], labels[rows], is_multi_label=is_multi_label)
        for rows in resampled
        if labels[rows].any()
    ]
    if not draws:
        return {name: Measure(value, value, value) for name, value in values.items()}
    ends = {name: np.percentile([draw[name] for draw in draws], (2.5, 97.5)) for name in values}
    return {name: Measure(value, *map(float, ends[name])) for name, value in values.items()}


def chance(labels: Bools, *, is_multi_label: bool, seed: int = 0) -> dict[str, Measure]:
    """What scores drawn at random reach.

    Args:
        labels: (N, K) bool.
        is_multi_label: as in `image_metrics`.
        seed: of the draws.

    Returns:
        Metrics as of `image_metrics`, mean and 95 % interval over twenty draws.
    """
    random = np.random.default_rng([seed, 1])
    draws = [
        image_metrics(random.random(labels.shape, np.float32), labels, is_multi_label=is_multi_label)
        for _ in range(_CHANCE_DRAWS)
    ]
    table = {name: np.array([draw[name] for draw in draws]) for name in draws[0]}
    return {
        name: Measure(float(v.mean()), *map(float, np.percentile(v, (2.5, 97.5))))
        for name, v in table.items()
    }

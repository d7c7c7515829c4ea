"""The paper's protocol for segmentation: every pixel's class by words, per-class accuracy and intersection over union.

Masks are read in mask_sets.py; images without masks are scored in evaluate.py, planet chips in scoring.py.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graft_pipeline.errors import DataError, InputError
from training.encoders import CROP_PX, Clip, check_patch_tower, encode_texts
from training.zero_shot.classify import class_embeddings
from training.zero_shot.evaluate import CHANCE, Measure
from training.zero_shot.mask_sets import UNLABELLED, MaskSet
from training.zero_shot.metrics import Scores, scores_of
from training.zero_shot.prompts import PromptSet
from training.zero_shot.segment import spread
from training.zero_shot.windows import Lattice, finished_rows

logger = logging.getLogger(__name__)

_SHOWN = 12


class Segmenter(Protocol):
    """A model that scores every part of an image for every class.

    Attributes:
        name: as the report shows it.
        patch_px: height and width, in pixels of an image, of what one score is of, the first at the image's upper left
            corner and the last ones beyond it where they do not tile it; None: scores tile every image.
    """

    name: str
    patch_px: tuple[float, float] | None

    def prepare(self, prompts: PromptSet) -> None:
        """Take the classes; called once, before any image."""
        ...

    def scores(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scores of an (H, W, 3) uint8 image, (K, rows, columns) float32 at whatever resolution the model has."""
        ...


class PatchSegmenter:
    """Patch tokens of a CLIP's image tower, over windows at the resolution that it was trained at.

    Args:
        name: as the report shows it.
        clip: pixel-level satellite encoder, or a frozen CLIP.
        overlap: share of a window's side that its neighbour sees too.

    Raises:
        InputError: if the tower has no patch tokens.
    """

    def __init__(self, name: str, clip: Clip, overlap: float = 0.25) -> None:
        check_patch_tower(clip.model.visual)
        self.name, self._clip, self._overlap = name, clip, overlap
        side = CROP_PX / clip.model.visual.grid_size[0]
        self.patch_px = (side, side)
        self._classes = np.zeros((0, clip.embedding_width), np.float32)

    def prepare(self, prompts: PromptSet) -> None:
        """See `Segmenter.prepare`."""
        self._classes = class_embeddings(prompts, partial(encode_texts, self._clip))

    def scores(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Segmenter.scores`; one score per patch."""
        clip = self._clip
        patch_px, _ = self.patch_px
        height, width = image.shape[:2]
        grid = Lattice.over(clip, width, height, patch_px, patch_px, self._overlap)
        side = CROP_PX
        right, bottom = grid.columns * patch_px, grid.rows * patch_px
        beyond = (max(side, int(np.ceil(bottom))) - height, max(side, int(np.ceil(right))) - width)
        padded = np.pad(image, ((0, beyond[0]), (0, beyond[1]), (0, 0)), mode="symmetric")

        def window(row: int, column: int) -> NDArray[np.uint8]:
            left, top = round(column * patch_px), round(row * patch_px)
            square = padded[top : top + side, left : left + side]
            if side == grid.model_px and square.shape[:2] == (side, side):
                return square
            shrinks = grid.model_px < side
            how = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
            return np.asarray(Image.fromarray(square).resize((grid.model_px, grid.model_px), how))

        rows = np.stack(list(finished_rows(clip, self._classes, window, grid)))
        return rows.transpose(2, 0, 1)


@dataclass(frozen=True, eq=False)
class MaskEvaluation:
    """What segmenters reach on one set of masks.

    Attributes:
        dataset: name of the set.
        images: images that were scored.
        classes: class names in order.
        metrics: task (`segmentation`) to contender to metric: `per-class accuracy`, `mIoU`, `pixel accuracy`.
        by_class: per contender: recall and IoU per class, confusion matrix.
        shown: a few images: RGB, mask, and each contender's map at the mask's resolution.
        skipped: samples that were not scored, by reason.
    """

    dataset: str
    images: int
    classes: tuple[str, ...]
    metrics: dict[str, dict[str, dict[str, Measure]]]
    by_class: dict[str, Scores]
    shown: list[tuple[NDArray[np.uint8], NDArray[np.uint8], dict[str, NDArray[np.uint8]]]] = field(repr=False)
    skipped: dict[str, int]


def evaluate_masks(
    contenders: Sequence[Segmenter],
    masks: MaskSet,
    prompts: PromptSet,
    *,
    resamples: int = 200,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> MaskEvaluation:
    """Segment the images of a set by words, and compare with its masks at the masks' own resolution.

    Args:
        contenders: the models; names must differ.
        masks: the set.
        prompts: words of its classes; classes of other sets among them are ignored.
        resamples: bootstrap resamples of the images.
        seed: of the resamples.
        progress: told (images done, images).

    Returns:
        The scores, `chance` among the contenders.

    Raises:
        InputError: if names repeat, a class has no words, or no image can be scored.
    """
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names) or CHANCE in names or not names:
        raise InputError(f"Contenders need names of their own other than {CHANCE!r}, got {names}.")
    without = [name for name in masks.classes if name not in prompts.classes]
    if without:
        raise InputError(f"The prompts have no words for {', '.join(without)} of {masks.name}: add them.")
    wanted = prompts.restricted_to(masks.classes)
    for contender in contenders:
        contender.prepare(wanted)
    count = len(masks.classes)
    random = np.random.default_rng(seed)
    skipped: Counter[str] = Counter(masks.skipped)
    confusions: dict[str, list[NDArray[np.int64]]] = {name: [] for name in (*names, CHANCE)}
    shown = []
    for number in range(len(masks)):
        try:
            image, truth = masks.read(number)
        except DataError as error:
            logger.warning("%s", error)
            skipped["image or mask cannot be decoded"] += 1
            continue
        maps = {contender.name: _map_of(contender, image, truth.shape) for contender in contenders}
        drawn = random.integers(count, size=truth.shape).astype(np.uint8)
        for name, of in (*maps.items(), (CHANCE, drawn)):
            confusions[name].append(_confusion(truth, of, count))
        if len(shown) < _SHOWN:
            shown.append((image, truth, maps))
        if progress:
            progress(number + 1, len(masks))
    images = len(confusions[CHANCE])
    if not images or not sum(matrix.sum() for matrix in confusions[CHANCE]):
        raise InputError(f"No pixel of {masks.name} can be scored; left out: {dict(skipped)}.")
    rows = [random.integers(images, size=images) for _ in range(resamples)]
    by_class = {name: scores_of(np.sum(some, axis=0), masks.classes) for name, some in confusions.items()}
    metrics = {name: _measured(np.stack(some), masks.classes, rows) for name, some in confusions.items()}
    return MaskEvaluation(
        dataset=masks.name,
        images=images,
        classes=masks.classes,
        metrics={"segmentation": metrics},
        by_class=by_class,
        shown=shown,
        skipped=dict(skipped),
    )


def _map_of(contender: Segmenter, image: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The best class of each pixel of an image's mask, which may be finer or coarser than image and scores."""
    (height, width), scores = shape, contender.scores(image)
    if contender.patch_px is None:
        patch = (height / scores.shape[1], width / scores.shape[2])
    else:
        patch = (contender.patch_px[0] * height / len(image), contender.patch_px[1] * width / image.shape[1])
    return spread(scores, patch, (height, width)).argmax(axis=0).astype(np.uint8)


def _confusion(truth: NDArray[np.uint8], predicted: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
    labelled = truth != UNLABELLED
    joint = truth[labelled].astype(np.int64) * count + predicted[labelled]
    return np.bincount(joint, minlength=count * count).reshape(count, count)


def _measured(
    confusions: NDArray[np.int64], classes: Sequence[str], rows: Sequence[NDArray[np.int64]]
) -> dict[str, Measure]:
    def values(matrix: NDArray[np.int64]) -> Mapping[str, float]:
        of = scores_of(matrix, classes)
        return {
            "per-class accuracy": of.per_class_accuracy,
            "mIoU": of.mean_iou,
            "pixel accuracy": of.accuracy,
        }

    found = values(confusions.sum(axis=0))
    sums = [confusions[some].sum(axis=0) for some in rows]
    draws = [values(matrix) for matrix in sums if matrix.sum()]
    if not draws:
        return {name: Measure(value, value, value) for name, value in found.items()}
    ends = {name: np.percentile([draw[name] for draw in draws], (2.5, 97.5)) for name in found}
    return {name: Measure(value, *map(float, ends[name])) for name, value in found.items()}

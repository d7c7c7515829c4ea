"""A pixel-level encoder as open-vocabulary detector: patch scores, a threshold, connected components (section 3.3).

What programs do with the objects is in interpreter.py; SAM, which may refine them, in zero_shot/prompted.py.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 -- PyTorch's own idiom
from numpy.typing import NDArray
from PIL import Image as Picture
from scipy.ndimage import distance_transform_edt, find_objects, label

from graft_pipeline.errors import InputError
from training.encoders import CROP_PX, Clip, check_patch_tower, encode_texts
from training.zero_shot.answering.concepts import classes_of, singular, words_of
from training.zero_shot.answering.interpreter import Detected, Image
from training.zero_shot.classify import class_embeddings
from training.zero_shot.prompts import PromptSet
from training.zero_shot.windows import Lattice, finished_rows

logger = logging.getLogger(__name__)

#: Image and (P, 2) points x, y in pixels in, (P, H, W) bool masks out: `prompted.Sam.masks`.
Masks = Callable[[NDArray[np.uint8], NDArray[np.float64]], NDArray[np.bool_]]

#: Rounds in which the shares of the classes in an image settle.
_ROUNDS = 30
#: Pixels touch diagonally too.
_NEIGHBOURS = np.ones((3, 3), np.bool_)
#: A mask of SAM is of an object if it shows this share of it and is at most so many times as large, or if this share
#: of the mask is in the object. Masks replace an object that they show this share of together.
_MASK_SHARE, _MASK_TIMES = 0.5, 4.0
#: Masks that have this share in common (intersection over union) are of one object.
_SAME_SHARE = 0.5
#: Points of one object that SAM is asked about, at most: a point for every patch of an object that has fewer.
_POINTS = 256
#: Pixels of masks that are held at once, about.
_MASK_PIXELS = 1 << 28


@dataclass(frozen=True, kw_only=True)
class DetectionOptions:
    """How objects come from scores.

    Attributes:
        temperature: of the softmax over cosines. The encoder's own is 0.07.
        threshold: probability from which a pixel is of the concept.
        least_patches: area of the smallest object, in patches of the encoder.
        gap_patches: pieces of one concept at most so far apart are one object, in sides of a patch.
        steps: scores along a patch: the image is encoded steps x steps times, shifted.
        overlap: share of a window's side that its neighbour sees too.
        batch_size: windows encoded at once.
    """

    temperature: float = 0.03
    threshold: float = 0.5
    least_patches: float = 1.0
    gap_patches: float = 0.6
    steps: int = 2
    overlap: float = 0.5
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Reject options that nothing could be found with."""
        if self.temperature <= 0 or not 0 < self.threshold < 1 or not 0 <= self.overlap < 1:
            raise InputError("Give a positive temperature, a threshold between 0 and 1, an overlap below 1.")
        if self.least_patches < 0 or self.gap_patches < 0 or self.steps < 1 or self.batch_size < 1:
            raise InputError("Give sizes in patches of at least 0, and at least 1 step and window.")


class PixelDetector:
    """Finds objects by name.

    A patch belongs to the concept or to one of the vocabulary's other classes: a softmax over their cosines, weighted
    by how much of the image each class covers. Those shares are not known; they are what explains the image's scores
    best (expectation maximisation; Saerens et al., 2002). So a class of which the image shows nothing takes no patch
    for being merely similar.

    Args:
        clip: pixel-level satellite encoder, or any open_clip ViT.
        vocabulary: what images show besides: background of every concept. A concept that is one of its classes, or
            several, is those; any other competes with all of them.
        gsd_m: metres per pixel that the encoder was trained at.
        options: how objects come from scores.
        masks: gives the mask of a point, such as `prompted.Sam.masks`; objects are then drawn to their outlines,
            and those that touch are told apart.

    Raises:
        InputError: if the encoder has no patch tokens.
    """

    def __init__(
        self,
        clip: Clip,
        vocabulary: PromptSet,
        gsd_m: float,
        options: DetectionOptions | None = None,
        masks: Masks | None = None,
    ) -> None:
        check_patch_tower(clip.model.visual)
        self._clip, self._vocabulary, self._gsd_m = clip, vocabulary, gsd_m
        self._options, self._masks = options or DetectionOptions(), masks
        self._classes = self._text_embeddings(vocabulary)
        # Several questions are asked about one image.
        self._seen: tuple[Image, NDArray[np.float32]] | None = None

    def find(self, image: Image, concept: str, tick: Callable[[], None]) -> list[Detected]:
        """Every object of a concept.

        Args:
            image: to look at.
            concept: such as "baseball field".
            tick: called between batches.

        Returns:
            The objects, best first.

        Raises:
            InputError: if the image is too coarse for the encoder.
        """
        concept = singular(concept)
        probability = self.probability(image, concept, tick)
        tick()
        patch_px = self._patch_px(image)
        found = components(
            probability,
            concept,
            threshold=self._options.threshold,
            least_px=self._options.least_patches * patch_px**2,
            gap_px=self._options.gap_patches * patch_px,
        )
        if self._masks is not None and found:
            found = refined(found, image.pixels, probability, self._masks, patch_px, tick)
        return sorted(found, key=lambda of: (-of.score, of.top, of.left))

    def classify(self, image: Image, options: Sequence[str], tick: Callable[[], None]) -> NDArray[np.float32]:
        """The share of the image that looks like each of some options, if it showed nothing else.

        Args:
            image: to look at.
            options: in words.
            tick: called between batches.

        Returns:
            (K,) float32, sum 1.

        Raises:
            InputError: if the image is too coarse for the encoder.
        """
        prompts = PromptSet({of: words_of(singular(of)) for of in options}, self._vocabulary.templates)
        cosines = self._patches(image, tick) @ self._text_embeddings(prompts).T
        return shares(cosines, self._options.temperature)

    def probability(self, image: Image, concept: str, tick: Callable[[], None]) -> NDArray[np.float32]:
        """How likely each pixel is of a concept.

        Args:
            image: to look at.
            concept: in the singular.
            tick: called between batches.

        Returns:
            (H, W) float32, 0 to 1.

        Raises:
            InputError: if the image is too coarse for the encoder.
        """
        classes, numbers = self._classes, classes_of(concept, self._vocabulary)
        if not numbers:
            own = PromptSet({concept: words_of(concept)}, self._vocabulary.templates)
            classes = np.concatenate([classes, self._text_embeddings(own)])
            numbers = (len(classes) - 1,)
        cosines = self._patches(image, tick) @ classes.T
        of_classes = probabilities(cosines, self._options.temperature)
        of_concept = np.ascontiguousarray(of_classes[..., list(numbers)].sum(axis=-1))
        step_px = self._patch_px(image) / self._options.steps
        size = tuple(max(1, round(side * step_px)) for side in of_concept.shape)
        full = F.interpolate(
            torch.from_numpy(of_concept)[None, None], size=size, mode="bilinear", align_corners=False
        )
        # The last patches may reach beyond the image, and rounding may leave a pixel.
        short = [max(0, wanted - had) for wanted, had in zip(image.pixels.shape[:2], size, strict=True)]
        cropped = full[0, 0, : image.height_px, : image.width_px].numpy()
        return np.pad(cropped, ((0, short[0]), (0, short[1])), mode="edge") if any(short) else cropped

    def _text_embeddings(self, prompts: PromptSet) -> NDArray[np.float32]:
        return class_embeddings(prompts, partial(encode_texts, self._clip))

    def _patch_px(self, image: Image) -> float:
        """Side of a patch in pixels of an image."""
        # A window shows CROP_PX pixels of the sensor, as training crops do.
        return self._gsd_m * CROP_PX / self._clip.model.visual.grid_size[0] / image.gsd_m

    def _patches(self, image: Image, tick: Callable[[], None]) -> NDArray[np.float32]:
        """(rows, columns, D) float32, L2-normalised: embeddings of patches, `steps` along each patch."""
        if self._seen is not None:
            seen, known = self._seen
            if seen.gsd_m == image.gsd_m and np.array_equal(seen.pixels, image.pixels):
                return known
        if self._patch_px(image) < 1:
            raise InputError(
                f"A patch of the encoder is smaller than a pixel of {image.gsd_m:g} m: the image is too coarse for "
                "this encoder; ask with the encoder of another sensor."
            )
        made = self._encode(image, tick)
        self._seen = (image, made)
        return made

    def _encode(self, image: Image, tick: Callable[[], None]) -> NDArray[np.float32]:
        clip, steps = self._clip, self._options.steps
        own_px = clip.model.visual.patch_size[0]
        scale = own_px / self._patch_px(image)
        width, height = (max(1, round(side * scale)) for side in (image.width_px, image.height_px))
        # Averaged when it shrinks, so that nothing aliases.
        how = Picture.Resampling.BOX if scale < 1 else Picture.Resampling.BILINEAR
        scaled = np.asarray(Picture.fromarray(image.pixels).resize((width, height), how))
        margin = (own_px, own_px + clip.image_px)
        padded = np.pad(scaled, (margin, margin, (0, 0)), mode="symmetric")
        grid = Lattice.over(clip, width, height, own_px, own_px, self._options.overlap)
        # Scores with the axes of the embedding space are embeddings, agreed on by the windows that show them.
        axes = np.eye(clip.embedding_width, dtype=np.float32)
        made = np.empty((grid.rows * steps, grid.columns * steps, len(axes)), np.float32)
        # Middles of all shifts' patches are evenly spaced over the image.
        shifts = [own_px + round((own_px * (2 * step + 1 - steps)) / (2 * steps)) for step in range(steps)]
        for down, top in enumerate(shifts):
            for along, left in enumerate(shifts):
                shifted = padded[top:, left:]

                def window(row: int, column: int, shifted: NDArray[np.uint8] = shifted) -> NDArray[np.uint8]:
                    y, x = row * own_px, column * own_px
                    return shifted[y : y + clip.image_px, x : x + clip.image_px]

                rows = finished_rows(clip, axes, window, grid, self._options.batch_size, lambda *_: tick())
                for number, row in enumerate(rows):
                    made[number * steps + down, along::steps] = row
        made /= np.maximum(np.linalg.norm(made, axis=-1, keepdims=True), 1e-12)
        return made


def shares(cosines: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Share of each class that explains an image's scores best.

    Args:
        cosines: (..., K) float32, of patches with classes.
        temperature: of the softmax.

    Returns:
        (K,) float32, sum 1, none 0.
    """
    likelihood = cosines.reshape(-1, cosines.shape[-1]) / temperature
    likelihood = np.exp(likelihood - likelihood.max(axis=1, keepdims=True))
    classes = likelihood.shape[1]
    found = np.full(classes, 1 / classes, np.float32)
    for _ in range(_ROUNDS):
        posterior = likelihood * found
        posterior /= posterior.sum(axis=1, keepdims=True)
        # Half a patch of each class is taken for granted: none vanishes for good.
        found = (posterior.sum(axis=0) + 0.5) / (len(posterior) + 0.5 * classes)
    return found.astype(np.float32)


def probabilities(cosines: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Probability of every class in every patch, given the shares of the classes in the image.

    Args:
        cosines: (..., K) float32, of patches with classes.
        temperature: of the softmax.

    Returns:
        (..., K) float32, sum 1 over the last axis.
    """
    weighted = cosines / temperature + np.log(shares(cosines, temperature))
    weighted = np.exp(weighted - weighted.max(axis=-1, keepdims=True))
    return np.asarray(weighted / weighted.sum(axis=-1, keepdims=True), dtype=np.float32)


def components(
    probability: NDArray[np.float32], concept: str, *, threshold: float, least_px: float, gap_px: float
) -> list[Detected]:
    """Objects in a map: connected pixels above a threshold.

    Args:
        probability: (H, W) float32, 0 to 1.
        concept: what the objects are.
        threshold: from which a pixel belongs to an object.
        least_px: pixels of the smallest object.
        gap_px: pieces at most so far apart are one object; what lies between them is not part of it.

    Returns:
        The objects from north to south; an object's score is the mean of its pixels.
    """
    mask = probability >= threshold
    if not mask.any():
        return []
    # Pieces that are gap_px apart meet when each grows by half of it.
    grown = distance_transform_edt(~mask) <= gap_px / 2 if gap_px > 0 else mask
    labels, _ = label(grown, _NEIGHBOURS)
    labels[~mask] = 0
    found = []
    for number, box in enumerate(find_objects(labels), start=1):
        if box is None:
            continue
        own = labels[box] == number
        if own.sum() >= least_px:
            score = float(probability[box][own].mean())
            found.append(Detected(concept, box[0].start, box[1].start, own, score))
    return found


def refined(
    found: Sequence[Detected],
    pixels: NDArray[np.uint8],
    probability: NDArray[np.float32],
    masks: Masks,
    apart_px: float,
    tick: Callable[[], None],
) -> list[Detected]:
    """Objects drawn to the outlines of what their best points show; those that touch are told apart by it.

    Args:
        found: objects.
        pixels: (H, W, 3) uint8 RGB.
        probability: (H, W) float32, where the points come from.
        masks: gives the mask of each point.
        apart_px: least distance of two points of an object.
        tick: called between batches.

    Returns:
        The objects that the masks show, each once, and what is left of an object that is as thick as `apart_px`. An
        object of which the masks show less than half stays as it was: crowns are no forest.
    """
    points = [_peaks(of, probability, apart_px) for of in found]
    owners = np.repeat(np.arange(len(found)), [len(some) for some in points])
    places = np.concatenate(points)[:, ::-1] + 0.5
    fitting: list[list[Detected]] = [[] for _ in found]
    # Few calls: each of them encodes the image anew.
    batch = max(1, _MASK_PIXELS // probability.size)
    for start in range(0, len(places), batch):
        tick()
        some = masks(pixels, places[start : start + batch])
        for mask, owner in zip(some, owners[start : start + batch], strict=True):
            of = found[owner]
            if mask.any() and _fits(outlined := Detected.of_mask(of.concept, mask, of.score), of):
                fitting[owner].append(outlined)
    made: list[Detected] = []
    for of, fits in zip(found, fitting, strict=True):
        tick()
        parts = _without_parts(fits)
        shown = np.zeros_like(of.mask)
        for part in parts:
            _paint_within(part, of, shown)
        if (shown & of.mask).sum() < _MASK_SHARE * of.pixels:
            made.append(of)
            continue
        # Pieces of one thing have one mask.
        made += [part for part in parts if not any(_is_same(part, other) for other in made)]
        made += _thick(of, of.mask & ~shown, apart_px)
    return made


def _without_parts(masks: Sequence[Detected]) -> list[Detected]:
    """Masks of one object without those that mostly lie in a larger one: a chimney is no house."""
    kept: list[Detected] = []
    for mask in sorted(masks, key=lambda of: -of.pixels):
        if all(mask.overlap_px(larger) < _MASK_SHARE * mask.pixels for larger in kept):
            kept.append(mask)
    return kept


def _paint_within(mask: Detected, of: Detected, canvas: NDArray[np.bool_]) -> None:
    """Set a mask's pixels on a canvas of an object's box."""
    top, left = max(mask.top, of.top), max(mask.left, of.left)
    bottom, right = min(mask.bottom, of.bottom), min(mask.right, of.right)
    if top < bottom and left < right:
        canvas[top - of.top : bottom - of.top, left - of.left : right - of.left] |= mask.mask[
            top - mask.top : bottom - mask.top, left - mask.left : right - mask.left
        ]


def _thick(of: Detected, rest: NDArray[np.bool_], least_px: float) -> list[Detected]:
    """Connected pieces of the rest of an object, without what is thinner than some pixels, such as a blurred rim."""
    padded = np.pad(rest, 1)
    inner = distance_transform_edt(padded) > least_px / 2
    if not inner.any():
        return []
    opened = (padded & (distance_transform_edt(~inner) <= least_px / 2))[1:-1, 1:-1]
    labels, count = label(opened, _NEIGHBOURS)
    pieces = []
    for number in range(1, count + 1):
        piece = Detected.of_mask(of.concept, labels == number, of.score)
        pieces.append(replace(piece, top=piece.top + of.top, left=piece.left + of.left))
    return pieces


def _fits(mask: Detected, of: Detected) -> bool:
    """Whether a mask shows an object, or a part of it."""
    common = mask.overlap_px(of)
    # Of the mask, most is of the object; or of the object, most is in a mask not much larger.
    is_part = common >= _MASK_SHARE * mask.pixels
    return is_part or (common >= _MASK_SHARE * of.pixels and mask.pixels <= _MASK_TIMES * of.pixels)


def _is_same(mask: Detected, other: Detected) -> bool:
    common = mask.overlap_px(other)
    return common >= _SAME_SHARE * (mask.pixels + other.pixels - common)


def _peaks(of: Detected, probability: NDArray[np.float32], apart_px: float) -> NDArray[np.float64]:
    """(P, 2) float64 rows and columns of an object's highest pixels, best first, all over it; at least one."""
    inside = np.where(of.mask, probability[of.top : of.bottom, of.left : of.right], 0)
    # Inner pixels first, where the map is flat.
    inside = inside + 1e-3 * distance_transform_edt(np.pad(of.mask, 1))[1:-1, 1:-1] / max(of.mask.shape)
    inside[~of.mask] = -1
    reach = max(1, round(apart_px))
    places: list[tuple[float, float]] = []
    while len(places) < _POINTS:
        row, column = np.unravel_index(int(inside.argmax()), inside.shape)
        if inside[row, column] < 0:
            break
        places.append((of.top + float(row), of.left + float(column)))
        inside[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1] = -1
    return np.array(places)

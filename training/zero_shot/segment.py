"""Zero-shot segmentation: the class of every pixel from patch embeddings and class embeddings.

Patch embeddings come from training/encoders.py, class embeddings from classify.py, metrics from metrics.py.
"""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 -- PyTorch's own idiom
from numpy.typing import NDArray

from graft_pipeline.errors import InputError


def score_maps(
    patches: NDArray[np.float32], classes: NDArray[np.float32], side_px: int
) -> NDArray[np.float32]:
    """Cosine of every pixel with every class: patch scores, interpolated bilinearly.

    Args:
        patches: (N, rows, columns, D) float32, L2-normalised.
        classes: (K, D) float32, L2-normalised.
        side_px: side of the maps in pixels.

    Returns:
        (N, K, side_px, side_px) float32.

    Raises:
        InputError: if the widths differ.
    """
    if patches.ndim != 4 or patches.shape[-1] != classes.shape[-1]:
        raise InputError(
            f"Patches {patches.shape} must be (N, rows, columns, D) with D of classes {classes.shape}."
        )
    scores = torch.from_numpy(np.ascontiguousarray((patches @ classes.T).transpose(0, 3, 1, 2)))
    # Scores, not embeddings, are interpolated: the same up to normalisation, and K values a pixel instead of
    # D.
    return F.interpolate(scores, size=(side_px, side_px), mode="bilinear", align_corners=False).numpy()


def spread(
    scores: NDArray[np.float32], patch_px: tuple[float, float], shape: tuple[int, int]
) -> NDArray[np.float32]:
    """Scores of patches at every pixel of an image that they cover, interpolated bilinearly.

    Args:
        scores: (K, rows, columns) float32; patch (0, 0) starts at the image's upper left corner.
        patch_px: height and width of a patch in pixels, may be fractions.
        shape: height and width of the image in pixels; patches may reach beyond it.

    Returns:
        (K, *shape) float32.
    """
    # One more patch, the same as the last: there is a pixel to cut off even where the patches end with the image.
    padded = F.pad(torch.from_numpy(np.ascontiguousarray(scores))[None], (0, 1, 0, 1), mode="replicate")
    fine = F.interpolate(
        padded, scale_factor=patch_px, mode="bilinear", align_corners=False, recompute_scale_factor=False
    )
    return fine[0, :, : shape[0], : shape[1]].numpy()


def segment(
    patches: NDArray[np.float32], classes: NDArray[np.float32], side_px: int, *, batch_size: int = 64
) -> NDArray[np.uint8]:
    """The nearest class of every pixel.

    Args:
        patches: (N, rows, columns, D) float32, L2-normalised.
        classes: (K, D) float32, L2-normalised; at most 256 classes.
        side_px: side of the maps in pixels.
        batch_size: images at once.

    Returns:
        (N, side_px, side_px) uint8 class numbers; row 0 is north.

    Raises:
        InputError: if the widths differ or there are too many classes.
    """
    if len(classes) > 256:
        raise InputError(f"{len(classes)} classes do not fit a uint8 map: segment at most 256 at once.")
    out = np.empty((len(patches), side_px, side_px), dtype=np.uint8)
    for first in range(0, len(patches), batch_size):
        rows = slice(first, first + batch_size)
        out[rows] = score_maps(patches[rows], classes, side_px).argmax(axis=1)
    return out

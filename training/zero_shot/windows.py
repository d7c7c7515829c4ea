"""Overlapping windows over an image that is larger than an encoder's input, and patch scores that they agree on.

Where the pixels come from, and what becomes of the scores, is in raster.py and evaluate_masks.py.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from training.encoders import Clip, patch_features, to_input

#: Patch row and column in, the (model_px, model_px, 3) uint8 window that starts there out.
Window = Callable[[int, int], NDArray[np.uint8]]


@dataclass(frozen=True)
class Lattice:
    """Patches and windows over a raster; patch (0, 0) starts at its upper left corner.

    Attributes:
        patch_x: width of a patch in raster pixels, may be a fraction.
        patch_y: height of a patch in raster pixels.
        rows: patches that cover the raster's height.
        columns: patches that cover its width.
        side: patches along a window.
        step: patches from one window to the next.
        model_px: side of the encoder's input.
    """

    patch_x: float
    patch_y: float
    rows: int
    columns: int
    side: int
    step: int
    model_px: int

    @classmethod
    def over(
        cls, clip: Clip, width: int, height: int, patch_x: float, patch_y: float, overlap: float
    ) -> "Lattice":
        """The lattice of an image.

        Args:
            clip: whose patches these are.
            width: of the image, pixels.
            height: of the image, pixels.
            patch_x: width of a patch, in pixels of the image; may be a fraction.
            patch_y: height of a patch.
            overlap: share of a window's side that its neighbour sees too.

        Returns:
            The lattice.
        """
        side = clip.model.visual.grid_size[0]
        return cls(
            patch_x=patch_x,
            patch_y=patch_y,
            rows=math.ceil(height / patch_y),
            columns=math.ceil(width / patch_x),
            side=side,
            step=max(1, round(side * (1 - overlap))),
            model_px=clip.image_px,
        )

    def _starts(self, patches: int) -> list[int]:
        """First patch of each window along an axis; the last window ends with the raster, if it can."""
        last = max(0, patches - self.side)
        return [*range(0, last, self.step), last]

    @property
    def row_starts(self) -> list[int]:
        """First patch row of each row of windows."""
        return self._starts(self.rows)

    @property
    def column_starts(self) -> list[int]:
        """First patch column of each column of windows."""
        return self._starts(self.columns)

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return len(self.row_starts) * len(self.column_starts)

    @property
    def weights(self) -> NDArray[np.float32]:
        """(side, side) float32: how much a window's patch counts, least at its edges, never nothing."""
        ramp = 1 - np.abs((np.arange(self.side) + 0.5) / self.side * 2 - 1)
        return np.outer(ramp, ramp).astype(np.float32)


@torch.inference_mode()
def _patch_scores(
    clip: Clip, images: Sequence[NDArray[np.uint8]], classes: torch.Tensor
) -> NDArray[np.float32]:
    """Cosines of windows' patches with the classes, (N, side, side, K) float32."""
    pixels = torch.from_numpy(np.stack(images)).to(clip.device).permute(0, 3, 1, 2).float()
    return (patch_features(clip.model.visual, to_input(clip, pixels)).float() @ classes.T).cpu().numpy()


def finished_rows(
    clip: Clip,
    classes: NDArray[np.float32],
    window: Window,
    grid: Lattice,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[NDArray[np.float32]]:
    """Scores of the lattice's rows from north to south, each as soon as no later window touches it.

    A patch's score is the mean over the windows that show it, weighted by `Lattice.weights`.

    Args:
        clip: pixel-level satellite encoder, or any open_clip ViT.
        classes: (K, D) float32, L2-normalised.
        window: gives the windows.
        grid: the lattice.
        batch_size: windows encoded at once.
        progress: told (rows of windows done, rows of windows).

    Yields:
        (columns, K) float32 cosines, one array for each row of patches.
    """
    on_device = torch.from_numpy(classes).to(clip.device)
    shape = (grid.columns + grid.side, len(classes))
    weights = grid.weights[:, :, None]
    pending: dict[int, list[NDArray[np.float32]]] = {}
    starts, column_starts = grid.row_starts, grid.column_starts
    for number, start in enumerate(starts):
        for row in range(start, start + grid.side):
            if row not in pending:
                pending[row] = [np.zeros(shape, np.float32), np.zeros((shape[0], 1), np.float32)]
        for first in range(0, len(column_starts), batch_size):
            some = column_starts[first : first + batch_size]
            scores = _patch_scores(clip, [window(start, column) for column in some], on_device)
            for column, of_window in zip(some, scores, strict=True):
                columns = slice(column, column + grid.side)
                for offset in range(grid.side):
                    total, weight = pending[start + offset]
                    total[columns] += of_window[offset] * weights[offset]
                    weight[columns] += weights[offset]
        if progress:
            progress(number + 1, len(starts))
        following = starts[number + 1] if number + 1 < len(starts) else grid.rows
        for row in range(start, min(following, grid.rows)):
            total, weight = pending.pop(row)
            yield total[: grid.columns] / weight[: grid.columns]

"""Random crops of chips without padding, a whole batch at once, and the same transform for photo positions.

Coordinates are pixels, (column, row), 0 at the left and upper edge of the first pixel, as in the manifests.
Which chips are in memory, and at which resolution, is in data.py.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 -- PyTorch's own idiom
from numpy.typing import NDArray
from torch import Tensor

from graft_pipeline.errors import InputError


@dataclass(frozen=True)
class Crops:
    """One square crop per chip of a batch: `chip = matrix @ (crop - crop_px / 2) + center`.

    Attributes:
        matrix: (B, 2, 2) float64, rotation and flip (orthonormal): crop pixels to chip pixels.
        center: (B, 2) float64, crop's centre in the chip, (column, row) pixels.
        chip_px: side of the chips.
        crop_px: side of the crops.
    """

    matrix: NDArray[np.float64]
    center: NDArray[np.float64]
    chip_px: int
    crop_px: int

    def __len__(self) -> int:
        return len(self.matrix)

    def part(self, rows: slice) -> "Crops":
        """Some of the crops.

        Args:
            rows: which chips of the batch.

        Returns:
            Their crops.
        """
        return replace(self, matrix=self.matrix[rows], center=self.center[rows])

    def to_chip(self, points: NDArray[np.float64], chip: NDArray[np.int64]) -> NDArray[np.float64]:
        """Positions in the chip of positions in the crop.

        Args:
            points: (P, 2) float64, (column, row) in the crop.
            chip: (P,) int64, chip of the batch that each point belongs to.

        Returns:
            (P, 2) float64, (column, row) in the chip.
        """
        rotated = np.einsum("pij,pj->pi", self.matrix[chip], points - self.crop_px / 2)
        return rotated + self.center[chip]

    def to_crop(self, points: NDArray[np.float64], chip: NDArray[np.int64]) -> NDArray[np.float64]:
        """Positions in the crop of positions in the chip; the inverse of `to_chip`.

        Args:
            points: (P, 2) float64, (column, row) in the chip.
            chip: (P,) int64, chip of the batch that each point belongs to.

        Returns:
            (P, 2) float64, (column, row) in the crop; outside 0..crop_px where the point left the crop.
        """
        # Orthonormal: the inverse is the transpose.
        return np.einsum("pji,pj->pi", self.matrix[chip], points - self.center[chip]) + self.crop_px / 2

    def holds(self, points: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which positions lie in the crop's half-open square.

        Args:
            points: (P, 2) float64, (column, row) in the crop.

        Returns:
            (P,) bool.
        """
        return ((points >= 0) & (points < self.crop_px)).all(axis=1)

    def sample(self, chips: Tensor) -> Tensor:
        """Cut the crops out of the chips, bilinearly.

        Every sampled position is at least half a pixel inside the chip, so nothing is padded or extrapolated.

        Args:
            chips: (B, 3, chip_px, chip_px) float.

        Returns:
            (B, 3, crop_px, crop_px) float, on the same device.

        Raises:
            InputError: if the chips are of another size or number.
        """
        if (
            chips.ndim != 4
            or len(chips) != len(self.matrix)
            or chips.shape[2:] != (self.chip_px, self.chip_px)
        ):
            wanted = (len(self.matrix), 3, self.chip_px, self.chip_px)
            raise InputError(f"Chips must be {wanted} for these crops, got {tuple(chips.shape)}.")
        # Without align_corners, affine_grid's -1 and 1 are the outer edges, as our 0 and size are.
        linear = self.matrix * (self.crop_px / self.chip_px)
        shift = 2 * self.center / self.chip_px - 1
        theta = np.concatenate([linear, shift[:, :, None]], axis=2)
        grid = F.affine_grid(
            torch.from_numpy(theta).to(chips),
            [len(chips), chips.shape[1], self.crop_px, self.crop_px],
            align_corners=False,
        )
        return F.grid_sample(chips, grid, mode="bilinear", padding_mode="border", align_corners=False)


def central_crops(count: int, chip_px: int, crop_px: int) -> Crops:
    """The crops of evaluation: the chip's central square, upright.

    Args:
        count: number of chips.
        chip_px: side of the chips.
        crop_px: side of the crops.

    Returns:
        The crops.
    """
    matrix = np.broadcast_to(np.eye(2), (count, 2, 2)).copy()
    return Crops(matrix, np.full((count, 2), chip_px / 2), chip_px, crop_px)


def random_crops(
    count: int, chip_px: int, crop_px: int, random: np.random.Generator, *, max_shift: float = 0.5
) -> Crops:
    """Crops rotated by any angle, flipped and moved, each wholly inside its chip (paper, section 3.2).

    A square of side c turned by an angle t reaches c (|cos t| + |sin t|) / 2 from its centre, so the centre
    may move by the rest of the half chip. With chips of twice the crop's side every angle is possible.

    Args:
        count: number of chips.
        chip_px: side of the chips.
        crop_px: side of the crops.
        random: source of the angles, flips and shifts.
        max_shift: largest move of the centre in x and in y, as a share of the crop's side; 0.5 keeps the
            chip's centre in every crop.

    Returns:
        The crops.

    Raises:
        InputError: if a crop turned by 45 degrees would not fit into the chip.
    """
    if crop_px * np.sqrt(2) > chip_px:
        raise InputError(
            f"A rotated crop of {crop_px} px does not fit a chip of {chip_px} px: use larger chips."
        )
    angle = random.uniform(0, 2 * np.pi, count)
    cos, sin = np.cos(angle), np.sin(angle)
    mirror = np.where(random.random(count) < 0.5, -1.0, 1.0)
    # A mirrored column axis, then a rotation: with any angle that is every flip there is.
    matrix = np.stack([np.stack([mirror * cos, -sin], -1), np.stack([mirror * sin, cos], -1)], axis=1)
    slack = (chip_px - crop_px * (np.abs(cos) + np.abs(sin))) / 2
    reach = np.minimum(slack, max_shift * crop_px)
    center = chip_px / 2 + random.uniform(-1, 1, (count, 2)) * reach[:, None]
    return Crops(matrix, center, chip_px, crop_px)

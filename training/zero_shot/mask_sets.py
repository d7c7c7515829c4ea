"""Land-cover masks of SatlasPretrain, read as published: the segmentation task of the paper's Table 3.

Labelled images without masks are in datasets.py; how masks are scored, in evaluate_masks.py.
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graft_pipeline.errors import DataError, InputError

logger = logging.getLogger(__name__)

#: Categories of `land_cover.png` by value; 0 is invalid.
SATLAS_CLASSES = (
    "water", "developed", "tree", "shrub", "grass", "crop", "bare", "snow", "wetland", "mangroves", "moss",
)  # fmt: skip
#: Value of mask pixels that are not scored.
UNLABELLED = 255
#: Side of Satlas's images and label files, pixels.
_SIDE_PX = 512
#: High-resolution images lie at zoom 17, labels at zoom 13: a label covers 16 x 16 images.
_IMAGES_PER_LABEL = 16


@dataclass(frozen=True, eq=False)
class MaskSet:
    """Images with a class for every pixel, decoded one at a time.

    Attributes:
        name: of the set.
        classes: names of the classes that occur in its masks.
        ids: one id per image.
        read: image number to (H, W, 3) uint8 RGB and its (h, w) uint8 mask of class numbers, `UNLABELLED` where
            there is no class; the mask may be coarser. Raises DataError if a file cannot be decoded.
        skipped: samples left out while the index was read, by reason.
    """

    name: str
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    read: Callable[[int], tuple[NDArray[np.uint8], NDArray[np.uint8]]]
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids)


def read_satlas(folder: Path, resolution: Literal["high", "low"]) -> MaskSet:
    """Satlas's land-cover task on the test split (Bastani et al., 2023).

    Of each tile the most recent image is used, as its authors say of slow-changing labels, among those that
    `good_images_{lowres,highres}_all.json` lists: the others are cloudy, or black where nothing was taken. Classes that
    no test mask shows are left out (paper, section 4.2: three of eleven).

    Args:
        folder: `satlas_root`, with `metadata/`, `static/` and `naip/` or `sentinel2/`.
        resolution: `high` for NAIP, whose 512 px images have masks of 32 px; `low` for Sentinel-2, whose masks are
            as large as the images.

    Returns:
        The set.

    Raises:
        InputError: if there is no such set, its lists cannot be read, or no test tile has both image and mask.
    """
    images = "naip" if resolution == "high" else "sentinel2"
    listing = folder / "metadata" / f"test_{resolution}res.json"
    try:
        tiles = [tuple(tile) for tile in json.loads(listing.read_text(encoding="utf-8"))]
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise InputError(
            f"{listing} cannot be read ({error}): download the metadata, the static labels and the {images} images "
            "of SatlasPretrain (https://github.com/allenai/satlas/blob/main/SatlasPretrain.md) into one folder."
        ) from error
    skipped: Counter[str] = Counter()
    newest = _newest_images(folder, images, _good_images(folder, resolution))
    per_label = _IMAGES_PER_LABEL if resolution == "high" else 1
    samples: list[tuple[Path, Path, tuple[int, int]]] = []
    present = np.zeros(len(SATLAS_CLASSES) + 1, dtype=bool)
    for column, row in sorted(tiles):
        label = folder / "static" / f"{column}_{row}" / "land_cover.png"
        if not label.exists():
            skipped["tile without land cover"] += 1
            continue
        try:
            values = np.unique(_pixels(label, "L"))
        except DataError as error:
            logger.warning("%s", error)
            skipped["label cannot be decoded"] += 1
            continue
        if values.max() > len(SATLAS_CLASSES):
            skipped["label not in the table"] += 1
            continue
        inside = [
            (x, y)
            for x in range(column * per_label, (column + 1) * per_label)
            for y in range(row * per_label, (row + 1) * per_label)
            if (x, y) in newest
        ]
        if not inside:
            skipped["tile without image"] += 1
            continue
        present[values] = True
        samples += [(newest[place], label, place) for place in inside]
    if not samples:
        raise InputError(
            f"{folder} has no test tile with a {images} image and land_cover.png (left out: {dict(skipped)}): "
            f"download the static labels and the {images} images of SatlasPretrain."
        )
    classes = tuple(name for number, name in enumerate(SATLAS_CLASSES, start=1) if present[number])
    table = np.full(256, UNLABELLED, dtype=np.uint8)
    for number, name in enumerate(classes):
        table[SATLAS_CLASSES.index(name) + 1] = number
    side = _SIDE_PX // per_label

    def read(number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        file, label, (x, y) = samples[number]
        left, top = x % per_label * side, y % per_label * side
        mask = _pixels(label, "L")[top : top + side, left : left + side]
        return _pixels(file, "RGB"), table[mask]

    ids = tuple(f"{file.parent.parent.name}/{file.stem}" for file, _, _ in samples)
    return MaskSet(
        f"satlas_{'naip' if resolution == 'high' else 'sentinel2'}", classes, ids, read, dict(skipped)
    )


#: Readers by the name of the set, as `graft evaluate` takes it.
MASK_READERS: dict[str, Callable[[Path], MaskSet]] = {
    "satlas_naip": lambda folder: read_satlas(folder, "high"),
    "satlas_sentinel2": lambda folder: read_satlas(folder, "low"),
}


def _good_images(folder: Path, resolution: str) -> set[tuple[int, int, str]] | None:
    """(column, row, image) of the images that are neither cloudy nor black; None where no list of them lies."""
    listing = folder / "metadata" / f"good_images_{resolution}res_all.json"
    if not listing.exists():
        logger.warning(
            "%s is missing: cloudy and black images are scored too; download the metadata of SatlasPretrain",
            listing,
        )
        return None
    try:
        return {
            (int(column), int(row), sys.intern(image))
            for column, row, image in json.loads(listing.read_text(encoding="utf-8"))
        }
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{listing} cannot be read ({error}): download the metadata of SatlasPretrain again."
        ) from error


def _newest_images(
    folder: Path, images: str, good: Container[tuple[int, int, str]] | None
) -> dict[tuple[int, int], Path]:
    """The most recent true-colour image of every (column, row), among the good ones if they are known."""
    try:
        times = json.loads((folder / "metadata" / "image_times.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        # NAIP's and Sentinel-2's names hold the date too, at places of their own.
        times = {}
    newest: dict[tuple[int, int], tuple[str, Path]] = {}
    for scene in sorted(path for path in (folder / images).glob("*") if path.is_dir()):
        taken = str(times.get(scene.name) or _date_of(scene.name))
        for file in (scene / "tci").glob("*_*.png"):
            try:
                column, row = (int(part) for part in file.stem.split("_"))
            except ValueError:
                continue
            if good is not None and (column, row, scene.name) not in good:
                continue
            if (column, row) not in newest or newest[column, row][0] <= taken:
                newest[column, row] = (taken, file)
    return {place: file for place, (_, file) in newest.items()}


def _date_of(name: str) -> str:
    """`20151013` of `m_2508008_nw_17_1_20151013`, `20160808T181452` of `S2A_MSIL1C_20160808T181452_...`."""
    parts = name.split("_")
    return parts[2] if name.startswith("S2") and len(parts) > 2 else parts[-1]


def _pixels(file: Path, mode: Literal["L", "RGB"]) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert(mode))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{file} cannot be decoded ({error}): download it again.") from error
    if pixels.shape[:2] != (_SIDE_PX, _SIDE_PX):
        raise DataError(f"{file} is {pixels.shape[:2]}, not {_SIDE_PX} px: download it again.")
    return pixels

"""Contact sheets of stored images, chips and pairs: what a person looks at before any number.

How a sheet is drawn is in previews.py; these functions choose and read what is shown, the same for the same seed.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from graft_pipeline import previews
from graft_pipeline.chips import sample_chips
from graft_pipeline.ground_images import sample_images

#: A region in; its rows of stored items, and the folder of their shards, out.
ReadRows = Callable[[str], tuple[pa.Table, UPath]]

BLANK = np.full((8, 8, 3), 245, np.uint8)
NO_MARKS = np.zeros((0, 2))


def image_sheet(images: pa.Table, folder: UPath, *, seed: int, count: int = 32) -> bytes:
    """Some stored ground images of GROUND_IMAGES rows, as a JPEG."""
    return previews.contact_sheet(
        [array for _, array in sample_images(folder, images, count, seed)], cell_px=84
    )


def outdoor_sheet(images: pa.Table, outdoor: pa.Table, folder: UPath, *, seed: int) -> bytes:
    """Kept photos framed green, dropped photos framed red, as a JPEG."""
    pictures: list[np.ndarray] = []
    frames: list[tuple[int, int, int] | None] = []
    for is_outdoor, colour in ((True, previews.RIGHT), (False, previews.WRONG)):
        ids = outdoor.filter(pc.equal(outdoor["is_outdoor"], is_outdoor))["photo_id"].combine_chunks()
        shown = sample_images(folder, images.filter(pc.is_in(images["photo_id"], ids)), 16, seed)
        pictures += [array for _, array in shown]
        frames += [colour] * len(shown)
    return previews.contact_sheet(pictures, cell_px=84, frames=frames)


def photos_by_id(photo_ids: Sequence[str], regions: Sequence[str], read: ReadRows) -> list[np.ndarray]:
    """Stored ground images of several regions.

    Args:
        photo_ids: which.
        regions: the region of each.
        read: gives a region's GROUND_IMAGES rows and the folder of their shards.

    Returns:
        (H, W, 3) uint8 RGB of each, in the order given.
    """
    shown: dict[str, np.ndarray] = {}
    for region in dict.fromkeys(regions):
        images, folder = read(region)
        ids = pa.array([i for i, r in zip(photo_ids, regions, strict=True) if r == region], pa.string())
        rows = images.filter(pc.is_in(images["photo_id"], ids))
        shown |= dict(sample_images(folder, rows, rows.num_rows))
    return [shown[photo_id] for photo_id in photo_ids]


def chips_by_id(tile_ids: Sequence[str], regions: Sequence[str], read: ReadRows) -> list[np.ndarray | None]:
    """Stored chips of several regions.

    Args:
        tile_ids: which.
        regions: the region of each.
        read: gives a region's CHIPS rows and the folder of their shards.

    Returns:
        (H, W, 3) uint8 RGB of each, in the order given; None where no chip is stored.
    """
    shown: dict[str, np.ndarray] = {}
    for region in dict.fromkeys(regions):
        chips, folder = read(region)
        ids = pa.array([i for i, r in zip(tile_ids, regions, strict=True) if r == region], pa.string())
        rows = chips.filter(pc.is_in(chips["tile_id"], ids))
        shown |= dict(sample_chips(folder, rows, rows.num_rows))
    return [shown.get(tile_id) for tile_id in tile_ids]


def chip_sheet(chips: pa.Table, folder: UPath, *, seed: int, count: int = 24) -> bytes:
    """Some stored chips of CHIPS rows, as a JPEG."""
    shown = sample_chips(folder, chips, count, seed)
    return previews.contact_sheet([array for _, array in shown], cell_px=112, columns=6)


def search_sheet(found: Mapping[str, pa.Table], read: ReadRows, *, crop_px: int, columns: int = 8) -> bytes:
    """What searches answered, best first, with scores: each search starts a row.

    Args:
        found: SEARCH_RESULTS rows by what was searched for.
        read: gives a region's CHIPS rows and the folder of their shards.
        crop_px: side of the central crop that was embedded; only it is shown.
        columns: chips in a row.

    Returns:
        A JPEG; a tile whose chip is not stored is blank.
    """
    pictures: list[np.ndarray] = []
    labels: list[str] = []
    for words, table in found.items():
        shown = chips_by_id(table["tile_id"].to_pylist(), table["region"].to_pylist(), read)
        missing = -len(shown) % columns if len(found) > 1 else 0
        pictures += [BLANK if chip is None else _central(chip, crop_px) for chip in shown] + [BLANK] * missing
        scores = [f"{score:.3f}" for score in table["score"].to_pylist()]
        labels += [f"{words} {score}" if number == 0 else score for number, score in enumerate(scores)]
        labels += [""] * missing
    return previews.contact_sheet(pictures, labels, columns=columns, cell_px=112)


def _central(chip: np.ndarray, crop_px: int) -> np.ndarray:
    top, left = (max(0, side - crop_px) // 2 for side in chip.shape[:2])
    return chip[top : top + crop_px, left : left + crop_px]


def pair_sheet(
    pairs: pa.Table, chips: pa.Table, chip_folder: UPath, images: pa.Table, image_folder: UPath, *, seed: int
) -> bytes:
    """Six tiles: the chip with its photos' positions as dots, and up to five of those photos beside it.

    Args:
        pairs: PAIRS rows of one region.
        chips: CHIPS rows.
        chip_folder: folder of the chip shards.
        images: GROUND_IMAGES rows.
        image_folder: folder of the image shards.
        seed: chooses the tiles.

    Returns:
        A JPEG.
    """
    counts = pairs.group_by("tile_id").aggregate([("photo_id", "count")])
    several = counts.filter(pc.greater_equal(counts["photo_id_count"], 3))
    # Tiles with several photos show best what a pair is.
    ids = (several if several.num_rows else counts)["tile_id"].combine_chunks()
    pictures, marks = [], []
    for tile_id, chip in sample_chips(chip_folder, chips.filter(pc.is_in(chips["tile_id"], ids)), 6, seed):
        of_tile = pairs.filter(pc.equal(pairs["tile_id"], tile_id))
        around = images.filter(pc.is_in(images["photo_id"], of_tile["photo_id"].combine_chunks()))
        photos = [array for _, array in sample_images(image_folder, around, 5, seed)]
        pictures += [chip, *photos, *[BLANK] * (5 - len(photos))]
        marks += [
            np.column_stack([of_tile["col_px"].to_numpy(), of_tile["row_px"].to_numpy()]),
            *[NO_MARKS] * 5,
        ]
    return previews.contact_sheet(pictures, columns=6, cell_px=112, marks=marks)

"""Contact sheets of stored images, chips and pairs: what a person looks at before any number.

How a sheet is drawn is in previews.py; these functions choose and read what is shown, the same for the same seed.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from graft_pipeline import previews
from graft_pipeline.embeddings import read_images

BLANK = np.full((8, 8, 3), 245, np.uint8)
NO_MARKS = np.zeros((0, 2))


def sample_rows(table: pa.Table, count: int, *, seed: int) -> pa.Table:
    """At most `count` rows that are ok and stored, chosen by seed, in the table's order."""
    ok = table.filter(pc.and_(pc.equal(table["status"], "ok"), pc.is_valid(table["shard"])))
    chosen = np.random.default_rng(seed).permutation(ok.num_rows)[:count]
    return ok.take(np.sort(chosen))


def image_sheet(images: pa.Table, folder: UPath, *, seed: int, count: int = 32) -> bytes:
    """Some stored ground images of GROUND_IMAGES rows, as a JPEG."""
    contents = read_images(folder, sample_rows(images, count, seed=seed))
    return previews.contact_sheet([previews.decode(content) for content in contents], cell_px=84)


def outdoor_sheet(images: pa.Table, outdoor: pa.Table, folder: UPath, *, seed: int) -> bytes:
    """Kept photos framed green, dropped photos framed red, as a JPEG."""
    pictures: list[np.ndarray] = []
    frames: list[tuple[int, int, int] | None] = []
    for is_outdoor, colour in ((True, (34, 136, 51)), (False, (204, 51, 17))):
        ids = outdoor.filter(pc.equal(outdoor["is_outdoor"], is_outdoor))["photo_id"].combine_chunks()
        rows = sample_rows(images.filter(pc.is_in(images["photo_id"], ids)), 16, seed=seed)
        pictures += [previews.decode(content) for content in read_images(folder, rows)]
        frames += [colour] * rows.num_rows
    return previews.contact_sheet(pictures, cell_px=84, frames=frames)


def chip_sheet(
    chips: pa.Table, folder: UPath, decode: Callable[[bytes], np.ndarray], *, seed: int, count: int = 24
) -> bytes:
    """Some stored chips of CHIPS rows, as a JPEG; `decode` gives (H, W, 3) uint8."""
    contents = read_images(folder, sample_rows(chips, count, seed=seed))
    return previews.contact_sheet([decode(content) for content in contents], cell_px=112, columns=6)


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
    from graft_pipeline.chips import decode

    counts = pairs.group_by("tile_id").aggregate([("photo_id", "count")])
    # Tiles with several photos show what a pair is; take the fullest of a random few.
    several = counts.filter(pc.greater_equal(counts["photo_id_count"], 3))["tile_id"].combine_chunks()
    candidates = chips.filter(pc.is_in(chips["tile_id"], several if len(several) else counts["tile_id"].combine_chunks()))
    pictures, marks = [], []
    for row in sample_rows(candidates, 6, seed=seed).to_pylist():
        of_tile = pairs.filter(pc.equal(pairs["tile_id"], row["tile_id"]))
        chip = read_images(chip_folder, pa.Table.from_pylist([row], schema=chips.schema))[0]
        pictures.append(decode(chip))
        marks.append(np.column_stack([of_tile["col_px"].to_numpy(), of_tile["row_px"].to_numpy()]))
        stored = images.filter(pc.is_in(images["photo_id"], of_tile["photo_id"].combine_chunks())).slice(0, 5)
        around = [previews.decode(content) for content in read_images(image_folder, stored)]
        pictures += around + [BLANK] * (5 - len(around))
        marks += [NO_MARKS] * 5
    return previews.contact_sheet(pictures, columns=6, cell_px=112, marks=marks)

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
from graft_pipeline.embeddings import vectors_of
from graft_pipeline.ground_images import sample_images

#: A region in; its rows of stored items, and the folder of their shards, out.
ReadRows = Callable[[str], tuple[pa.Table, UPath]]

BLANK = np.full((8, 8, 3), 245, np.uint8)
NO_MARKS = np.zeros((0, 2))
#: Colours that tie a photo to its dot in the chip, one for each photo of a row.
DOTS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0))


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
    return previews.contact_sheet(pictures, labels, columns=columns, cell_px=112, label_lines=2)


def _central(chip: np.ndarray, crop_px: int) -> np.ndarray:
    top, left = (max(0, side - crop_px) // 2 for side in chip.shape[:2])
    return chip[top : top + crop_px, left : left + crop_px]


def pair_sheet(
    pairs: pa.Table,
    chips: pa.Table,
    chip_folder: UPath,
    images: pa.Table,
    image_folder: UPath,
    *,
    seed: int,
    footprint_px: int,
) -> bytes:
    """Six tiles: the chip with its footprint and its photos' positions, and up to five of those photos beside it.

    A photo's frame has the colour of its dot; dots of photos that are not shown are white.

    Args:
        pairs: PAIRS rows of one region.
        chips: CHIPS rows.
        chip_folder: folder of the chip shards.
        images: GROUND_IMAGES rows.
        image_folder: folder of the image shards.
        seed: chooses the tiles.
        footprint_px: side of the footprint.

    Returns:
        A JPEG.
    """
    counts = pairs.group_by("tile_id").aggregate([("photo_id", "count")])
    several = counts.filter(pc.greater_equal(counts["photo_id_count"], 3))
    # Tiles with several photos show best what a pair is.
    ids = (several if several.num_rows else counts)["tile_id"].combine_chunks()
    pictures: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    colours: list[list[tuple[int, int, int]]] = []
    frames: list[tuple[int, int, int] | None] = []
    squares: list[tuple[float, float, float, float] | None] = []
    for tile_id, chip in sample_chips(chip_folder, chips.filter(pc.is_in(chips["tile_id"], ids)), 6, seed):
        of_tile = pairs.filter(pc.equal(pairs["tile_id"], tile_id))
        around = images.filter(pc.is_in(images["photo_id"], of_tile["photo_id"].combine_chunks()))
        photos = dict(sample_images(image_folder, around, len(DOTS), seed))
        pictures += [chip, *photos.values(), *[BLANK] * (len(DOTS) - len(photos))]
        marks += [photo_marks(of_tile, list(photos)), *[NO_MARKS] * len(DOTS)]
        others = of_tile.num_rows - len(photos)
        colours += [[*DOTS[: len(photos)], *[previews.WHITE] * others], *[[]] * len(DOTS)]
        frames += [None, *DOTS[: len(photos)], *[None] * (len(DOTS) - len(photos))]
        squares += [centered_square(chip.shape[0], footprint_px), *[None] * len(DOTS)]
    return previews.contact_sheet(
        pictures,
        columns=1 + len(DOTS),
        cell_px=112,
        marks=marks,
        mark_colours=colours,
        frames=frames,
        squares=squares,
    )


def extreme_rows(embedded: pa.Table, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The most and the least typical rows of a region, by the cosine to its mean embedding.

    Args:
        embedded: rows with an `embedding`, L2-normalised.
        count: of each; fewer where there are not twice as many rows.

    Returns:
        Row numbers of the nearest to the mean, nearest first, and of the farthest, farthest first.
    """
    vectors = vectors_of(embedded)
    count = min(count, len(vectors) // 2)
    if not count:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.argsort(vectors @ vectors.mean(axis=0), kind="stable")
    return order[::-1][:count], order[:count]


def typical_sheet(embedded: pa.Table, stored: pa.Table, folder: UPath, *, count: int = 16) -> bytes:
    """Two rows each of the most typical photos or chips of a region and of the oddest, as a JPEG.

    Args:
        embedded: GROUND_EMBEDDINGS or CHIP_EMBEDDINGS rows.
        stored: GROUND_IMAGES or CHIPS rows.
        folder: folder of their shards.
        count: of each.
    """
    key, sample = (
        ("tile_id", sample_chips) if "tile_id" in stored.column_names else ("photo_id", sample_images)
    )
    nearest, farthest = (
        embedded[key].take(pa.array(rows)).to_pylist() for rows in extreme_rows(embedded, count)
    )
    rows = stored.filter(pc.is_in(stored[key], pa.array([*nearest, *farthest], pa.string())))
    shown = dict(sample(folder, rows, rows.num_rows))
    pictures = [shown[name] for name in (*nearest, *farthest) if name in shown]
    frames = [None] * sum(name in shown for name in nearest)
    return previews.contact_sheet(
        pictures, cell_px=84, frames=[*frames, *[previews.WRONG] * (len(pictures) - len(frames))]
    )


def photo_marks(pairs: pa.Table, first: Sequence[str]) -> np.ndarray:
    """Positions of a tile's photos in its chip.

    Args:
        pairs: PAIRS rows of one tile.
        first: ids of the photos that come first, in their order.

    Returns:
        (M, 2) column and row, pixels.
    """
    known = {photo_id: n for n, photo_id in enumerate(first)}
    order = np.argsort([known.get(i, len(known)) for i in pairs["photo_id"].to_pylist()], kind="stable")
    return np.column_stack([pairs["col_px"].to_numpy(), pairs["row_px"].to_numpy()])[order]


def centered_square(chip_px: int, footprint_px: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a tile's footprint in its chip, pixels."""
    margin = (chip_px - footprint_px) / 2
    return (margin, margin, chip_px - margin, chip_px - margin)


def scene_charts(scenes: pa.Table, title: str) -> bytes:
    """When the scenes of a region were acquired, and how cloudy they are, as a PNG.

    Args:
        scenes: SCENES rows.
        title: heading.
    """
    panels = {"acquired, year": _years(scenes["acquired_at_utc"])}
    clouds = scenes["cloud_pct"].drop_null().to_numpy()
    return previews.histograms(panels | ({"cloud of scene, %": clouds} if len(clouds) else {}), title=title)


def chip_charts(chips: pa.Table, title: str) -> bytes:
    """How far chips are from their centre photo in time, and how cloudy they or their scenes are, as a PNG.

    Args:
        chips: CHIPS rows.
        title: heading.
    """
    names = {
        "time_difference_days": "scene minus centre photo, days",
        "cloud_pct": "cloud of scene, %",
        "chip_cloud_pct": "cloud and shadow of chip, %",
    }
    ok = chips.filter(pc.equal(chips["status"], "ok"))
    values = {label: ok[name].drop_null().to_numpy() for name, label in names.items()}
    first = next(iter(values))
    return previews.histograms(
        {label: found for label, found in values.items() if len(found) or label == first}, title=title
    )


def pair_charts(pairs: pa.Table, title: str) -> bytes:
    """How many photos tiles have, when they were taken and how far from their scene in time, as a PNG.

    Args:
        pairs: PAIRS rows.
        title: heading.
    """
    per_tile = pairs.group_by("tile_id").aggregate([("photo_id", "count")])["photo_id_count"].to_numpy()
    return previews.histograms(
        {
            "photos of a tile": per_tile,
            "photo taken, year": _years(pairs["taken_at_utc"]),
            "scene minus photo, days": pairs["time_difference_days"].drop_null().to_numpy(),
        },
        title=title,
    )


def _years(times: pa.ChunkedArray) -> np.ndarray:
    """Years of the times that are known, as whole numbers."""
    return np.asarray(pc.year(times.drop_null()).to_numpy())

"""Ground images of a region: which photos are to be fetched, what is kept, in which shard each lies.

How bytes are fetched, checked and resized is in resources/images.py; which photos exist, in photos.py.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline.errors import ItemError
from graft_pipeline.fetching import (
    FINAL_REASONS,
    StoredItems,
    changed_requests,
    most_ahead,
    ordered_map,
    pending_rows,
    retry_day,
    sample_rows,
    without_damaged,
)
from graft_pipeline.manifests import read_table
from graft_pipeline.provenance import fingerprint
from graft_pipeline.schemas import FLICKR_PHOTOS, GROUND_IMAGES
from graft_pipeline.shards import read_member
from graft_pipeline.unfinished import Unfinished

if TYPE_CHECKING:
    from upath import UPath

logger = logging.getLogger(__name__)

#: Two images whose 64-bit perceptual hashes differ in at most so many bits count as the same picture.
NEAR_DUPLICATE_BITS = 4
#: Hardly any image is larger whose shorter side is 256 px.
_IMAGE_BYTES = 100_000


@dataclass(frozen=True)
class FetchedImage:
    """One ground image, ready to be stored.

    Attributes:
        content: JPEG as it is stored.
        width_px: its width.
        height_px: its height.
        phash: 64-bit perceptual hash, 16 hexadecimal digits.
    """

    content: bytes
    width_px: int
    height_px: int
    phash: str


#: An image URL in, the image out; ItemError for one that cannot be had.
Fetch = Callable[[str], FetchedImage]


def update(
    photos: pa.Table,
    folder: "UPath | Path",
    fetch: Fetch,
    *,
    concurrency: int,
    max_attempts: int,
    today: date,
    retry_now: bool = False,
    verify: bool = False,
    hosts: Sequence[str] = (),
    shard_size: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[pa.Table, bool]:
    """Fetch the images that a region does not have yet, and store them.

    Fetched are the ok photos without a row and those whose row has failed fewer than `max_attempts` times and
    whose day to be tried again has come, in the order (uploaded_at, photo_id). Whatever its status and attempts, an
    image that could not be had is asked for anew where the photo's address or the allowed hosts are others than
    they were; one that is stored stays. An image nearly equal to one that is kept is rejected and not stored.

    Args:
        photos: FLICKR_PHOTOS rows of the region.
        folder: the partition's folder; the index and its shards are there.
        fetch: gives one image; called from threads.
        concurrency: number of threads.
        max_attempts: tries before a photo is left alone.
        today: UTC day; failed rows say on which they are tried again.
        retry_now: try failed and rejected rows again, whatever their day and attempts; near-duplicates stay.
        verify: read every stored image, and fetch those anew that were damaged on their disk.
        hosts: image hosts that `fetch` allows.
        shard_size: photos after which a shard and the index are written.
        progress: called with (done, total).

    Returns:
        All GROUND_IMAGES rows of the region, sorted by photo_id, and whether any file changed.

    Raises:
        GraftError: whatever but an ItemError `fetch` raises; what was fetched before is stored.
    """
    existing = read_table(folder / f"{GROUND_IMAGES.name}.parquet", GROUND_IMAGES)
    indexed = GROUND_IMAGES.empty() if existing is None else existing
    known = without_damaged(folder, indexed, "photo_id") if verify else indexed
    usable = photos.filter(pc.equal(photos["status"], "ok"))
    usable = usable.sort_by([(name, "ascending") for name in FLICKR_PHOTOS.order])
    usable = usable.select(["photo_id", "image_url"])
    allowed = sorted(hosts)
    requests = {
        row["photo_id"]: fingerprint(row["image_url"], allowed)
        for row in usable.filter(_is_lacking(usable, known)).to_pylist()
    }
    todo, attempts = pending_rows(
        usable,
        known,
        "photo_id",
        max_attempts,
        today,
        retry_now=retry_now,
        changed=changed_requests(known, "photo_id", requests),
    )

    kept = known.filter(pc.equal(known["status"], "ok")).select(["photo_id", "phash"]).to_pylist()
    seen = _NearDuplicates()
    for stored in kept:
        seen.add(stored["photo_id"], stored["phash"])
    store = StoredItems(folder, GROUND_IMAGES, indexed, stem="images", extension="jpg", shard_size=shard_size)

    def outcome(photo: dict[str, str]) -> FetchedImage | ItemError:
        return _kept_or_fetched(photo, requests[photo["photo_id"]], fetch, store.unfinished)

    ahead = most_ahead(concurrency, _IMAGE_BYTES)
    with store, closing(ordered_map(outcome, todo, concurrency, ahead)) as results:
        for done, (photo, result) in enumerate(results, start=1):
            photo_id = photo["photo_id"]
            row: dict[str, Any] = {"photo_id": photo_id, "attempts": attempts.get(photo_id, 0) + 1}
            if isinstance(result, ItemError):
                row["request_id"] = requests[photo_id]
                if result.is_permanent:
                    row["status"] = "rejected"
                else:
                    row |= {"status": "failed", "retry_on": retry_day(row["attempts"], today)}
                store.add({**row, "reason": result.reason})
            else:
                row |= {"width_px": result.width_px, "height_px": result.height_px, "phash": result.phash}
                twin = seen.find(result.phash)
                if twin is None:
                    seen.add(photo_id, result.phash)
                    store.add({**row, "status": "ok"}, result.content)
                else:
                    store.add({**row, "status": "rejected", "reason": "near_duplicate", "duplicate_of": twin})
            if progress:
                progress(done, len(todo))
        table = store.finish()
    return table, store.is_changed


def _is_lacking(usable: pa.Table, known: pa.Table) -> pa.ChunkedArray:
    """Which photos have neither an image nor one that stands for it."""
    is_final = pc.fill_null(pc.is_in(known["reason"], pa.array(FINAL_REASONS)), False)
    had = known.filter(pc.or_(pc.equal(known["status"], "ok"), is_final))
    return pc.invert(pc.is_in(usable["photo_id"], had["photo_id"].combine_chunks()))


def _kept_or_fetched(
    photo: dict[str, str], request: str, fetch: Fetch, unfinished: Unfinished
) -> FetchedImage | ItemError:
    """One photo's image, or why there is none; not fetched if an interrupted run did."""
    photo_id, url = photo["photo_id"], photo["image_url"]
    kept = unfinished.take(photo_id, request)
    if kept is not None:
        values, content = kept
        if "error" in values:
            return ItemError(values["reason"], values["error"], is_permanent=True)
        return FetchedImage(content, **values)
    try:
        image = fetch(url)
    except ItemError as error:
        # What may pass is tried again by the next run, whether this one comes to its end or not.
        if error.is_permanent:
            unfinished.keep(photo_id, request, {"reason": error.reason, "error": str(error)})
        return error
    values = {"width_px": image.width_px, "height_px": image.height_px, "phash": image.phash}
    unfinished.keep(photo_id, request, values, image.content)
    return image


class _NearDuplicates:
    """Perceptual hashes that are kept, searchable within NEAR_DUPLICATE_BITS.

    Of five bands of a hash, one at least is equal when at most four bits differ: only those are compared.
    """

    _BANDS = NEAR_DUPLICATE_BITS + 1

    def __init__(self) -> None:
        self._hashes: list[tuple[int, str]] = []
        self._by_band: dict[tuple[int, int], list[int]] = defaultdict(list)

    def _bands(self, value: int) -> list[tuple[int, int]]:
        width = -(-64 // self._BANDS)
        return [(band, (value >> (band * width)) & ((1 << width) - 1)) for band in range(self._BANDS)]

    def add(self, photo_id: str, phash: str) -> None:
        """Keep a hash."""
        value = int(phash, 16)
        for band in self._bands(value):
            self._by_band[band].append(len(self._hashes))
        self._hashes.append((value, photo_id))

    def find(self, phash: str) -> str | None:
        """The photo kept first among those near a hash, None without any."""
        value = int(phash, 16)
        candidates = {row for band in self._bands(value) for row in self._by_band.get(band, ())}
        near = [
            row for row in candidates if (self._hashes[row][0] ^ value).bit_count() <= NEAR_DUPLICATE_BITS
        ]
        return self._hashes[min(near)][1] if near else None


def decode(content: bytes) -> npt.NDArray[np.uint8]:
    """Decode a stored ground image.

    Args:
        content: JPEG.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    from PIL import Image

    with Image.open(BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)


def sample_images(
    folder: "UPath | Path", table: pa.Table, count: int, seed: int = 0
) -> list[tuple[str, npt.NDArray[np.uint8]]]:
    """A few stored images for people to look at.

    Args:
        folder: the partition's folder.
        table: GROUND_IMAGES rows to choose from; only ok ones are.
        count: how many at most.
        seed: of the choice.

    Returns:
        (photo_id, (H, W, 3) uint8 RGB), in the table's order.
    """
    return [
        (row["photo_id"], decode(read_member(folder, row["shard"], row["offset"], row["size_bytes"])))
        for row in sample_rows(table, count, seed)
    ]

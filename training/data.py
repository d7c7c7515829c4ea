"""The training set as tensors: tiles, their chips in memory or on disk, batches of crops and their photos.

How crops are cut is in augment.py; how a training set is put together, in graft_pipeline/training_sets.py.
"""

import errno
import io
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from isal import isal_zlib
from numpy.typing import NDArray
from upath import UPath

from graft_pipeline.chips import decode
from graft_pipeline.errors import DataError, InputError
from graft_pipeline.manifests import is_local
from graft_pipeline.provenance import fingerprint
from graft_pipeline.schemas import TRAINING_PAIRS
from graft_pipeline.shards import read_member
from training.augment import Crops, central_crops, random_crops
from training.encoders import reduce_chips

logger = logging.getLogger(__name__)

_EMBEDDINGS = "ground_embeddings.npy"
_ALT_TEXTS = "alt_text_embeddings.npy"
_TABLE = "training_set.parquet"

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of one split and their photos, photos in one flat row per tile.

    Attributes:
        tile_id: (T,) str.
        shard: (T,) str, relative to the storage root.
        offset: (T,) int64, bytes.
        size_bytes: (T,) int64.
        first_photo: (T + 1,) int64; photos of tile t are rows first_photo[t]:first_photo[t + 1].
        position: (P, 2) float64, (column, row) of each photo in the chip as stored, pixels.
        embedding_row: (P,) int64, row of each photo in the ground embeddings.
    """

    tile_id: NDArray[np.object_]
    shard: NDArray[np.object_]
    offset: NDArray[np.int64]
    size_bytes: NDArray[np.int64]
    first_photo: NDArray[np.int64]
    position: NDArray[np.float64]
    embedding_row: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tile_id)

    def photos_of(self, tiles: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All photos of some tiles.

        Args:
            tiles: (B,) int64, tile numbers.

        Returns:
            (P,) int64 photo rows, and (P,) int64 position of each photo's tile in `tiles`.
        """
        counts = self.first_photo[tiles + 1] - self.first_photo[tiles]
        tile_of_photo = np.repeat(np.arange(len(tiles)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.first_photo[tiles][tile_of_photo] + within, tile_of_photo


class SideBySide:
    """Matrices of one height as one matrix of all their columns, of which only the rows asked for are made.

    Attributes:
        shape: (rows, columns of all).
    """

    def __init__(self, *matrices: NDArray[np.float32]) -> None:
        self._matrices = matrices
        self.shape = (len(matrices[0]), sum(matrix.shape[1] for matrix in matrices))

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.concatenate([matrix[rows] for matrix in self._matrices], axis=1)


class TrainingSet:
    """A frozen training set as `training_sets.build_training_set` wrote it.

    Attributes:
        fingerprint: content fingerprint, from the snapshot folder's name.
        model_id: fingerprint of the foundation model that embedded the photos; None where an earlier version of
            this project wrote the table.
        embeddings: (P, D) float32, f_G of all photos; a memory map where the storage is local.
        targets: what a batch holds of its photos: the embeddings, or (P, 2 D) f_G and f_T beside each other.
        pair_count: number of (tile, photo) rows, all splits.
    """

    def __init__(self, folder: UPath, storage_root: UPath, *, alt_text: bool = False) -> None:
        """Read the table; chips stay where they are.

        Args:
            folder: folder of the snapshot, with training_set.parquet and ground_embeddings.npy.
            storage_root: root that the table's shard names are relative to.
            alt_text: read alt_text_embeddings.npy too, f_T of the photos' titles and tags, and leave out photos
                without either, whose rows in it are zero.

        Raises:
            InputError: if the folder is no training set.
            DataError: if the table and the embeddings do not fit each other.
        """
        self.folder, self.storage_root = UPath(folder), UPath(storage_root)
        try:
            with (self.folder / _TABLE).open("rb") as file:
                table = pq.read_table(file, schema=TRAINING_PAIRS.schema)
            self.embeddings = _read_embeddings(self.folder / _EMBEDDINGS)
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} is no training set: {error}. Materialise training_set first."
            ) from error
        self.fingerprint = self.folder.name.removeprefix("snapshot=")
        model_ids = pc.unique(table["model_id"]).to_pylist()
        self.model_id: str | None = model_ids[0] if model_ids else None
        if len(table) and pc.max(table["embedding_row"]).as_py() >= len(self.embeddings):
            raise DataError(
                f"{folder} points past its {len(self.embeddings)} embeddings: materialise it again."
            )
        self.targets: NDArray[np.float32] | SideBySide = self.embeddings
        if alt_text:
            texts = _read_alt_texts(self.folder / _ALT_TEXTS, self.embeddings.shape)
            # Not of the pairs' rows: a photo under ten tiles is looked at once, and nothing is copied.
            table = table.filter(pa.array(texts.any(axis=1)[table["embedding_row"].to_numpy()]))
            self.targets = SideBySide(self.embeddings, texts)
        self.pair_count = len(table)
        table = table.sort_by([("tile_id", "ascending"), ("photo_id", "ascending")])
        self._splits = {
            name: _tiles(table.filter(pc.equal(table["split"], name))) for name in ("train", "validation")
        }

    def split(self, name: Literal["train", "validation"]) -> Tiles:
        """The tiles of a split.

        Args:
            name: `train` or `validation`.

        Returns:
            The tiles, in order of their ids; may be empty.
        """
        return self._splits[name]


class Chips:
    """Chips of a split, reduced once to the resolution of the model, kept in memory if they fit.

    Attributes:
        side_px: side of the reduced chips.
        scale: reduced pixels per stored pixel.
        is_in_memory: whether all chips were decoded up front.
    """

    def __init__(
        self,
        tiles: Tiles,
        storage_root: UPath,
        *,
        chip_px: int,
        side_px: int,
        memory_bytes: int,
        threads: int = 0,
        cache_folder: Path | None = None,
    ) -> None:
        """Decode all chips if they fit.

        Args:
            tiles: the tiles whose chips these are.
            storage_root: root that shard names are relative to.
            chip_px: side of the chips as stored.
            side_px: side to reduce them to.
            memory_bytes: most that they may take; above it, chips are decoded for each batch.
            threads: threads that decode; 0: one per core, at most eight.
            cache_folder: folder on a local disk that keeps what was decoded, reduced, for the next time; used for
                chips that do not fit into memory.

        Raises:
            DataError: if a chip cannot be read or decoded, or has another size.
        """
        self._tiles, self._root, self._chip_px = tiles, storage_root, chip_px
        self.side_px, self.scale = side_px, side_px / chip_px
        self._threads = threads or min(8, os.cpu_count() or 1)
        self.is_in_memory = len(tiles) * side_px * side_px * 3 <= memory_bytes
        is_cached = cache_folder is not None and not self.is_in_memory
        self._cache = ChipCache(cache_folder, tiles, side_px) if is_cached else None
        self._all = self._gather(np.arange(len(tiles))) if self.is_in_memory else None

    def take(self, tiles: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The chips of some tiles.

        Args:
            tiles: (B,) int64, tile numbers.

        Returns:
            (B, side_px, side_px, 3) uint8, RGB.

        Raises:
            DataError: if a chip cannot be read or decoded, or has another size.
        """
        return self._gather(tiles) if self._all is None else self._all[tiles]

    def _gather(self, tiles: NDArray[np.int64]) -> NDArray[np.uint8]:
        out = np.empty((len(tiles), self.side_px, self.side_px, 3), dtype=np.uint8)

        def fill(row: int) -> None:
            if self._cache is None:
                out[row] = self._decode(tiles[row])
            elif not self._cache.get(tiles[row], out[row]):
                out[row] = self._decode(tiles[row])
                self._cache.put(tiles[row], out[row])

        with ThreadPoolExecutor(self._threads, thread_name_prefix="chips") as pool:
            # list() raises the first error of a worker.
            list(pool.map(fill, range(len(tiles))))
        return out

    def _decode(self, tile: int) -> NDArray[np.uint8]:
        """A chip from its shard, (side_px, side_px, 3) uint8."""
        tile_id, shard = self._tiles.tile_id[tile], self._tiles.shard[tile]
        offset, size_bytes = int(self._tiles.offset[tile]), int(self._tiles.size_bytes[tile])
        try:
            chip = decode(read_member(self._root, shard, offset, size_bytes))
        except DataError as error:
            raise DataError(
                f"Chip {tile_id}, at byte {offset} of {shard}: {error} Then start the training again; it goes on "
                "at its last checkpoint."
            ) from error
        if chip.shape != (self._chip_px, self._chip_px, 3):
            raise DataError(
                f"Chip {tile_id} in {shard} is {chip.shape}, not {self._chip_px} px: materialise the chips and "
                "the training set again."
            )
        return reduce_chips(chip[None], self.side_px)[0]


class ChipCache:
    """Decoded chips of a split in one sparse file, which all processes of a machine fill and read.

    Inflating is most of what a chip costs, and a later epoch shows the same chips again. Each chip has a checksum,
    written after it: one that a dying machine left half written is decoded again. A disk that is full keeps what
    it has; the other chips are decoded each time.
    """

    def __init__(self, folder: Path, tiles: Tiles, side_px: int) -> None:
        """Open the cache of these tiles, or make it.

        Args:
            folder: where it lies.
            tiles: the tiles; others have another file.
            side_px: side of their reduced chips.
        """
        name = fingerprint(tiles.tile_id, tiles.shard, tiles.offset, tiles.size_bytes, side_px)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._is_full = folder, False
        self._chips_file, self._chips = self._open(
            folder / f"{name}.chips", np.uint8, (len(tiles), side_px, side_px, 3)
        )
        self._checksums_file, self._checksums = self._open(
            folder / f"{name}.checksums", np.uint32, (len(tiles),)
        )

    @staticmethod
    def _open(path: Path, dtype: type, shape: tuple[int, ...]) -> tuple[io.FileIO, NDArray[Any]]:
        # Growing an empty file takes no space; another process that does the same does no harm.
        with path.open("ab") as file:
            file.truncate(max(1, math.prod(shape)) * np.dtype(dtype).itemsize)
        # Read through memory, written through the file: a full disk is an error there, and a dead process here.
        return path.open("r+b", buffering=0), np.memmap(path, dtype, mode="r", shape=shape)

    def get(self, tile: int, out: NDArray[np.uint8]) -> bool:
        """Copy a chip, if it is there.

        Args:
            tile: its number.
            out: (side_px, side_px, 3) uint8, written to.

        Returns:
            Whether it is there, whole.
        """
        expected = int(self._checksums[tile])
        if not expected:
            return False
        out[:] = self._chips[tile]
        return _checksum(out) == expected

    def put(self, tile: int, chip: NDArray[np.uint8]) -> None:
        """Keep a chip, if the disk has space for it.

        Args:
            tile: its number.
            chip: (side_px, side_px, 3) uint8.
        """
        if self._is_full:
            return
        checksum = np.uint32(_checksum(chip)).tobytes()
        try:
            written = os.pwrite(self._chips_file.fileno(), chip, int(tile) * chip.nbytes)
            if written == chip.nbytes:
                os.pwrite(self._checksums_file.fileno(), checksum, int(tile) * len(checksum))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._is_full = True
            logger.warning(
                "chip_cache %s is full: the chips that it lacks are decoded each time", self._folder
            )


def _checksum(chip: NDArray[np.uint8]) -> int:
    # 0 says that there is no chip.
    return isal_zlib.crc32(chip) or 1


@dataclass(frozen=True, eq=False)
class Batch:
    """Tiles and the photos inside their crops.

    Attributes:
        chips: (B, C, C, 3) uint8, reduced chips.
        crops: the crop of each chip.
        photos: (P, D) float32, f_G of the photos.
        photo_row: (P,) int64, photo rows of the split.
        identity: (P,) int64, row of each photo in the ground embeddings: equal for equal photos.
        tile_of_photo: (P,) int64, chip of the batch that each photo belongs to.
        position: (P, 2) float64, (column, row) of each photo in its crop, pixels; all inside.
        others: (Q, D) float32, f_G of the photos of tiles that other processes or parts have.
        others_identity: (Q,) int64, row of each of them in the ground embeddings.
        share: tiles with a photo here, as a share of those of all processes; 1 for a process alone.
    """

    chips: NDArray[np.uint8]
    crops: Crops
    photos: NDArray[np.float32]
    photo_row: NDArray[np.int64]
    identity: NDArray[np.int64]
    tile_of_photo: NDArray[np.int64]
    position: NDArray[np.float64]
    others: NDArray[np.float32]
    others_identity: NDArray[np.int64]
    share: float

    def part(self, rows: slice) -> "Batch":
        """Some of the tiles, and their photos.

        Args:
            rows: which tiles of the batch.

        Returns:
            A batch of them; photos of the other tiles become `others`.
        """
        own = slice(*np.searchsorted(self.tile_of_photo, [rows.start, rows.stop]))
        with_photo = len(np.unique(self.tile_of_photo[own]))
        return Batch(
            chips=self.chips[rows],
            crops=self.crops.part(rows),
            photos=self.photos[own],
            photo_row=self.photo_row[own],
            identity=self.identity[own],
            tile_of_photo=self.tile_of_photo[own] - rows.start,
            position=self.position[own],
            others=np.concatenate([self.others, self.photos[: own.start], self.photos[own.stop :]]),
            others_identity=np.concatenate(
                [self.others_identity, self.identity[: own.start], self.identity[own.stop :]]
            ),
            share=self.share * with_photo / max(1, len(np.unique(self.tile_of_photo))),
        )

    def parts(self, count: int) -> list["Batch"]:
        """The batch cut up, so that not all of its activations are in memory at once.

        Every part keeps the photos of the others in its denominators: losses times shares, and their gradients,
        add up to those of the whole batch.

        Args:
            count: number of parts; fewer if there are fewer tiles.

        Returns:
            The parts, alike in size to one tile; the batch itself for one.
        """
        if count == 1:
            return [self]
        rows = np.array_split(np.arange(len(self.chips)), min(count, len(self.chips)))
        return [self.part(slice(some[0], some[-1] + 1)) for some in rows]


class Batches:
    """Training batches, each a pure function of seed and step, so that a run can go on anywhere.

    Photos that leave a crop drop out at both levels: the paper's photos of a tile are those inside the square
    that the model sees, and a photo outside it would ask the encoder for what is not in its image.
    """

    def __init__(
        self,
        tiles: Tiles,
        chips: Chips,
        embeddings: NDArray[np.float32] | SideBySide,
        *,
        crop_px: int,
        batch_tiles: int,
        photos_per_tile: int,
        max_shift: float,
        seed: int,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        """Prepare to draw batches.

        Args:
            tiles: tiles of the training split.
            chips: their chips.
            embeddings: (N, D) float32, ground embeddings.
            crop_px: side of the crops, in pixels of the reduced chips.
            batch_tiles: tiles per batch; fewer if the split has fewer.
            photos_per_tile: at most so many photos of a tile, drawn anew each time.
            max_shift: see `augment.random_crops`.
            seed: seed of everything that is drawn.
            rank: number of this process.
            size: number of processes; each has an equal part of every batch, and draws all of it but the chips.
                Embeddings are a file that all processes see and what is drawn depends on seed and step alone, so
                each process reads the very rows, in the very order, that gathering them from all processes
                (without gradient: they are frozen) would give it, and no photo is sent around.

        Raises:
            DataError: if there are fewer tiles than processes.
            InputError: if a batch has.
        """
        if len(tiles) < size:
            raise DataError(
                f"The training split has {len(tiles)} tiles for {size} processes: scrape more regions, or lower "
                "validation_fraction."
            )
        if batch_tiles < size:
            raise InputError(
                f"A batch of {batch_tiles} tiles is less than one for each of {size} processes: raise batch_tiles, or "
                "start fewer processes."
            )
        self._tiles, self._chips, self._embeddings = tiles, chips, embeddings
        self._crop_px, self._photos_per_tile, self._max_shift = crop_px, photos_per_tile, max_shift
        self._seed, self._rank = seed, rank
        self._own_tiles = min(batch_tiles, len(tiles)) // size
        self.batch_tiles = self._own_tiles * size
        #: The last tiles of an epoch that fill no batch are left out of it; the next epoch's order is
        # another.
        self.per_epoch = len(tiles) // self.batch_tiles

    def draw(self, step: int) -> Batch:
        """The batch of a step.

        Args:
            step: number of the step, from 0.

        Returns:
            The batch; its photos are inside their crops and at most `photos_per_tile` per tile.
        """
        epoch, place = divmod(step, self.per_epoch)
        order = np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._tiles))
        tiles = order[place * self.batch_tiles : (place + 1) * self.batch_tiles]
        random = np.random.default_rng([self._seed, 1, step])
        crops = random_crops(
            len(tiles), self._chips.side_px, self._crop_px, random, max_shift=self._max_shift
        )
        own = slice(self._rank * self._own_tiles, (self._rank + 1) * self._own_tiles)
        return assemble(
            self._tiles, self._chips, self._embeddings, tiles, crops, self._photos_per_tile, random, own
        )

    def stream(self, first: int, last: int, place: Callable[[Batch], T], prefetch: int = 1) -> Iterator[T]:
        """Batches of the steps `first` to `last - 1`, prepared beside the work on their predecessors.

        Args:
            first: first step.
            last: one more than the last step.
            place: what is done with each batch at last, on the thread that prepares it, such as copying it to a
                device.
            prefetch: batches that are prepared ahead of the one in use.

        Yields:
            What `place` made of the batches.

        Raises:
            DataError: if a chip cannot be read or decoded, or has another size.
        """

        def prepare(step: int) -> T:
            return place(self.draw(step))

        steps = iter(range(first, last))
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            coming = deque(pool.submit(prepare, step) for step in islice(steps, prefetch))
            try:
                while coming:
                    ready = coming.popleft().result()
                    coming.extend(pool.submit(prepare, step) for step in islice(steps, 1))
                    yield ready
            finally:
                # Whoever stops early does not wait for batches that nobody will use.
                pool.shutdown(cancel_futures=True)


def assemble(
    tiles: Tiles,
    chips: Chips,
    embeddings: NDArray[np.float32],
    chosen: NDArray[np.int64],
    crops: Crops,
    photos_per_tile: int,
    random: np.random.Generator,
    own: slice | None = None,
) -> Batch:
    """Put chips, crops and the photos inside them together.

    Args:
        tiles: tiles of a split.
        chips: their chips.
        embeddings: (N, D) float32, ground embeddings.
        chosen: (B,) int64, tiles of the batch.
        crops: one crop per tile of the batch.
        photos_per_tile: at most so many photos of a tile.
        random: draws which.
        own: rows of `chosen` that this process has; None: all. Only their chips are read.

    Returns:
        The batch, photos ordered by tile.
    """
    photo_row, tile_of_photo = tiles.photos_of(chosen)
    position = crops.to_crop(tiles.position[photo_row] * chips.scale, tile_of_photo)
    inside = crops.holds(position)
    photo_row, tile_of_photo, position = photo_row[inside], tile_of_photo[inside], position[inside]
    # A random order within each tile; the first ones of it stay.
    order = np.lexsort((random.random(len(photo_row)), tile_of_photo))
    counts = np.bincount(tile_of_photo, minlength=len(chosen))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = order[rank < photos_per_tile]
    own = own or slice(0, len(chosen))
    whole = Batch(
        chips=np.empty((len(chosen), 0)),
        crops=crops,
        photos=np.asarray(embeddings[tiles.embedding_row[photo_row[kept]]], dtype=np.float32),
        photo_row=photo_row[kept],
        identity=tiles.embedding_row[photo_row[kept]],
        tile_of_photo=tile_of_photo[kept],
        position=position[kept],
        others=np.empty((0, embeddings.shape[1]), dtype=np.float32),
        others_identity=np.empty(0, dtype=np.int64),
        share=1.0,
    )
    return replace(whole.part(own), chips=chips.take(chosen[own]))


def validation_batch(
    tiles: Tiles,
    chips: Chips,
    embeddings: NDArray[np.float32],
    *,
    crop_px: int,
    photos_per_tile: int,
    seed: int,
) -> Batch:
    """All tiles of the validation split in one batch of central crops.

    Args:
        tiles: tiles of the validation split.
        chips: their chips.
        embeddings: (N, D) float32, ground embeddings.
        crop_px: side of the crops, in pixels of the reduced chips.
        photos_per_tile: at most so many photos of a tile.
        seed: draws which.

    Returns:
        The batch.
    """
    chosen = np.arange(len(tiles))
    crops = central_crops(len(tiles), chips.side_px, crop_px)
    return assemble(
        tiles, chips, embeddings, chosen, crops, photos_per_tile, np.random.default_rng([seed, 2])
    )


def first_tiles(tiles: Tiles, count: int, seed: int) -> Tiles:
    """A random part of a split.

    Args:
        tiles: the split.
        count: how many tiles at most.
        seed: draws which.

    Returns:
        The part, in the split's order; the split itself if it is small enough.
    """
    if len(tiles) <= count:
        return tiles
    chosen = np.sort(np.random.default_rng([seed, 3]).permutation(len(tiles))[:count])
    photo_row, tile_of_photo = tiles.photos_of(chosen)
    counts = np.bincount(tile_of_photo, minlength=count)
    return Tiles(
        tile_id=tiles.tile_id[chosen],
        shard=tiles.shard[chosen],
        offset=tiles.offset[chosen],
        size_bytes=tiles.size_bytes[chosen],
        first_photo=np.concatenate([[0], np.cumsum(counts)]),
        position=tiles.position[photo_row],
        embedding_row=tiles.embedding_row[photo_row],
    )


def _tiles(table: pa.Table) -> Tiles:
    """Tiles of one split from its rows, ordered by tile."""
    tile_id = table["tile_id"].combine_chunks()
    # Columns are compared in Arrow: ten million Python strings would take gigabytes.
    is_first = pc.not_equal(tile_id.slice(1), tile_id.slice(0, max(len(tile_id) - 1, 0)))
    first = np.flatnonzero(
        np.concatenate([np.ones(min(len(tile_id), 1), bool), is_first.to_numpy(zero_copy_only=False)])
    )
    head = table.take(pa.array(first, pa.int64()))
    return Tiles(
        tile_id=head["tile_id"].to_numpy().astype(object),
        shard=head["chip_shard"].to_numpy().astype(object),
        offset=head["chip_offset"].to_numpy(),
        size_bytes=head["chip_size_bytes"].to_numpy(),
        first_photo=np.append(first, len(table)).astype(np.int64),
        position=np.stack([table["col_px"].to_numpy(), table["row_px"].to_numpy()], axis=1),
        embedding_row=table["embedding_row"].to_numpy(),
    )


def _read_alt_texts(path: UPath, shape: tuple[int, ...]) -> NDArray[np.float32]:
    try:
        texts = _read_embeddings(path)
    except FileNotFoundError as error:
        raise InputError(
            f"Alt-text is to be learned from, but {path} is not there: materialise the sensor's ablations."
        ) from error
    if texts.shape != shape:
        raise DataError(f"{path} is {texts.shape}, not {shape}: materialise the sensor's ablations again.")
    return texts


def _read_embeddings(path: UPath) -> NDArray[np.float32]:
    if is_local(path):
        return np.load(os.fspath(path), mmap_mode="r")
    with path.open("rb") as file:
        return np.load(file)

"""Tar shards: how images and chips lie in storage, byte-deterministic and readable as WebDataset.

Which rows point into a shard is kept by ground_images.py and chips.py.
"""

import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self, cast

import pyarrow.compute as pc

from graft_pipeline.errors import DataError
from graft_pipeline.manifests import atomic_local_file, is_local, write_bytes_atomic

if TYPE_CHECKING:
    import pyarrow as pa
    from upath import UPath

#: Name of a member whose content was removed; WebDataset passes over names of this form.
BLANK_NAME = "__purged__"

#: What to do where a stored item was damaged on its disk; ends a message.
MEND = "materialise its region with `verify: true` in the run config, which fetches anew what is damaged"

#: File of a partition that says which numbers of shards are spent; there only where its index does not tell.
SPENT_NUMBERS = "spent_shards.json"

_MEMBER_NAME = re.compile(r"[A-Za-z0-9_\-]+\.[a-z0-9]+")


@dataclass(frozen=True)
class StoredItem:
    """Where one member lies; the columns of `schemas._stored_item`.

    Attributes:
        shard: file name of the shard.
        offset: byte offset of the content in the shard.
        size_bytes: length of the content.
        sha256: its SHA-256, hexadecimal.
    """

    shard: str
    offset: int
    size_bytes: int
    sha256: str


def shard_name(stem: str, number: int) -> str:
    """File name of a numbered shard, e.g. `chips-00003.tar`.

    Args:
        stem: `chips` or `images`.
        number: from 0.

    Returns:
        The name.
    """
    return f"{stem}-{number:05d}.tar"


def next_shard_number(stem: str, shards: Iterable[str | None], spent: int = 0) -> int:
    """Number of the first shard that no row of an index points into, and none ever did.

    A shard beyond it was written by a process that died before its index: it is overwritten.

    Args:
        stem: `chips` or `images`.
        shards: the index's `shard` column.
        spent: numbers below it were in earlier versions of the index, see `spent_numbers`.

    Returns:
        The number, from 0.
    """
    pattern = re.compile(re.escape(stem) + r"-(\d+)\.tar")
    numbers = [int(match[1]) for name in set(shards) if name and (match := pattern.fullmatch(name))]
    return max(max(numbers, default=-1) + 1, spent)


def spent_numbers(folder: "UPath | Path") -> dict[str, int]:
    """Shard numbers of a partition that are not to be used again, though no row names a shard of so high a number.

    Args:
        folder: the partition's folder.

    Returns:
        By stem: numbers below it are spent. Stems of which the index alone tells are left out.

    Raises:
        DataError: if the file that says it is damaged.
    """
    try:
        content = (folder / SPENT_NUMBERS).read_bytes()
        return {str(stem): int(number) for stem, number in json.loads(content).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        path = folder / SPENT_NUMBERS
        raise DataError(
            f"{path} is damaged ({error}): restore it, or write the highest number of a shard beside it plus one by "
            'stem, such as {"chips": 12}.'
        ) from error


def spend_numbers(folder: "UPath | Path", before: "pa.Table", after: "pa.Table") -> None:
    """Keep the numbers of shards that an index is about to lose from being used again; to be called before it does.

    Training sets and other indexes may point into these shards for as long as they lie there. A number that the
    index keeps on telling is not written down: so a run that was killed leaves what an undisturbed one does.

    Args:
        folder: the partition's folder.
        before: the index's rows, with `shard` columns.
        after: what takes their place.
    """
    spent = spent_numbers(folder)
    found = dict(spent)
    for column in before.column_names:
        if column.endswith("shard"):
            stems = {name.rpartition("-")[0] for name in pc.unique(before[column]).to_pylist() if name}
            for stem in stems:
                first = next_shard_number(stem, pc.unique(before[column]).to_pylist(), spent.get(stem, 0))
                if next_shard_number(stem, pc.unique(after[column]).to_pylist()) < first:
                    found[stem] = first
    if found != spent:
        write_bytes_atomic(folder / SPENT_NUMBERS, json.dumps(found, sort_keys=True).encode() + b"\n")


class ShardWriter:
    """Writes one shard; it appears under its name, whole, when the `with` block ends well.

    Members are written as they come, not held in memory. Same members, same bytes.
    """

    def __init__(self, folder: "UPath | Path", name: str) -> None:
        self._path = folder / name
        self._name = name
        self._stack = ExitStack()
        self._size = 0

    def __enter__(self) -> Self:
        # On an object store the shard is first whole on the local disk, then put in one go.
        if is_local(self._path):
            self._partial = self._stack.enter_context(atomic_local_file(self._path))
        else:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory())
            self._partial = Path(folder) / self._name
        file = self._partial.open("xb")
        self._stack.callback(file.close)
        self._file: BinaryIO = cast(BinaryIO, file)
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, name: str, content: bytes) -> StoredItem:
        """Append a member.

        Args:
            name: `{id}.{extension}`; an id without dots, as WebDataset cuts names at the first.
            content: the member's bytes.

        Returns:
            Where it lies.

        Raises:
            DataError: if the name would break the archive or leave its folder.
        """
        if _MEMBER_NAME.fullmatch(name) is None:
            raise DataError(
                f"{name!r} cannot name a shard's member: use letters, digits, - and _, one extension."
            )
        info = tarfile.TarInfo(name)
        # Whatever TarInfo fills in otherwise differs between machines: mtime, owner and mode are fixed.
        info.size, info.mtime, info.mode = len(content), 0, 0o644
        header = self._tar.offset
        self._tar.addfile(info, BytesIO(content))
        offset = header + tarfile.BLOCKSIZE
        return StoredItem(self._name, offset, len(content), hashlib.sha256(content).hexdigest())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            if not is_local(self._path):
                path = cast("UPath", self._path)
                path.fs.put_file(str(self._partial), path.path)


def blank_members(folder: "UPath | Path", shard: str, keys: Collection[str]) -> int:
    """Take members out of a shard for good, atomically; all others stay where they are, byte for byte.

    A member taken out becomes zeros of its length, under BLANK_NAME: so every index and every training set
    that points into the shard stays right. Members that no row points to any more are found as well.

    Args:
        folder: folder of the shard.
        shard: its file name.
        keys: names of the members, without extensions.

    Returns:
        Number of members taken out; without any, nothing is written.

    Raises:
        DataError: if the shard is no tar file.
    """
    path = folder / shard
    with ExitStack() as stack:
        if is_local(path):
            copy = Path(str(path))
        else:
            copy = Path(stack.enter_context(tempfile.TemporaryDirectory())) / shard
            remote = cast("UPath", path)
            remote.fs.get_file(remote.path, str(copy))
        try:
            with tarfile.open(copy, mode="r:") as tar:
                found = [member for member in tar if member.name.partition(".")[0] in keys]
        except tarfile.TarError as error:
            raise DataError(f"Shard {path} cannot be read ({error}): restore it from a backup.") from error
        if not found:
            return 0
        if is_local(path):
            partial = stack.enter_context(atomic_local_file(path))
            copy = Path(shutil.copyfile(copy, partial))
        with copy.open("r+b") as file:
            for member in found:
                blank = tarfile.TarInfo(BLANK_NAME)
                blank.size, blank.mtime, blank.mode = member.size, 0, 0o644
                file.seek(member.offset)
                file.write(blank.tobuf(tarfile.USTAR_FORMAT) + bytes(member.size))
            file.flush()
            os.fsync(file.fileno())
        if not is_local(path):
            remote.fs.put_file(str(copy), remote.path)
    return len(found)


def read_member(folder: "UPath | Path", shard: str, offset: int, size_bytes: int) -> bytes:
    """Read one member's content by its place, without reading the rest of the shard.

    Args:
        folder: folder of the shard.
        shard: its file name.
        offset: byte offset of the content.
        size_bytes: its length.

    Returns:
        The content.

    Raises:
        DataError: if the shard is missing or too short.
    """
    path = folder / shard
    try:
        if is_local(path):
            with Path(str(path)).open("rb") as file:
                file.seek(offset)
                content = file.read(size_bytes)
        else:
            remote = cast("UPath", path)
            content = remote.fs.cat_file(remote.path, start=offset, end=offset + size_bytes)
    except FileNotFoundError as error:
        raise DataError(f"Shard {path} is missing: restore it, or {MEND}.") from error
    if len(content) != size_bytes:
        raise DataError(f"Shard {path} ends {size_bytes - len(content)} bytes early: restore it, or {MEND}.")
    return bytes(content)


def is_whole(folder: "UPath | Path", item: StoredItem) -> bool:
    """Whether an item's bytes are still those that were stored.

    Args:
        folder: folder of the shard.
        item: where it lies.

    Returns:
        False if the shard is gone or too short, or other bytes lie there.
    """
    try:
        content = read_member(folder, item.shard, item.offset, item.size_bytes)
    except DataError:
        return False
    return hashlib.sha256(content).hexdigest() == item.sha256

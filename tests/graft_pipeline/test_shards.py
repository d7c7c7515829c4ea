import hashlib
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from upath import UPath

from graft_pipeline.errors import DataError
from graft_pipeline.shards import (
    SPENT_NUMBERS,
    ShardWriter,
    next_shard_number,
    read_member,
    shard_name,
    spend_numbers,
    spent_numbers,
)

MEMBERS = {"7_a-1.jpg": b"first", "8.jpg": b"", "9.jpg": bytes(range(256)) * 41}


def write(folder: UPath, name: str = "images-00000.tar") -> dict[str, Any]:
    with ShardWriter(folder, name) as shard:
        return {member: shard.add(member, content) for member, content in MEMBERS.items()}


def test_members_are_found_where_the_writer_says(root: UPath) -> None:
    items = write(root)
    for name, item in items.items():
        assert read_member(root, item.shard, item.offset, item.size_bytes) == MEMBERS[name]
        assert item.sha256 == hashlib.sha256(MEMBERS[name]).hexdigest()


def test_tar_and_webdataset_read_the_same(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    write(UPath(tmp_path))
    with tarfile.open(tmp_path / "images-00000.tar") as tar:
        assert {info.name: tar.extractfile(info).read() for info in tar} == MEMBERS  # type: ignore[union-attr]
        assert {(info.mtime, info.uid, info.gid, info.uname, info.mode) for info in tar} == {
            (0, 0, 0, "", 0o644)
        }
    samples = list(webdataset.WebDataset(str(tmp_path / "images-00000.tar"), shardshuffle=False))
    assert {f"{sample['__key__']}.jpg": sample["jpg"] for sample in samples} == MEMBERS


def test_same_members_same_bytes(tmp_path: Path) -> None:
    write(UPath(tmp_path / "a"))
    write(UPath(tmp_path / "b"))
    a, b = (tmp_path / folder / "images-00000.tar" for folder in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_an_unfinished_shard_never_appears(root: UPath) -> None:
    def write_half() -> None:
        with ShardWriter(root, "images-00000.tar") as shard:
            shard.add("1.jpg", b"x" * 10_000)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert not root.exists() or not list(root.iterdir())


def test_an_orphan_is_overwritten(root: UPath) -> None:
    with ShardWriter(root, "images-00000.tar") as shard:
        shard.add("1.jpg", b"from a process that died")
    item = write(root)["9.jpg"]
    assert read_member(root, item.shard, item.offset, item.size_bytes) == MEMBERS["9.jpg"]


@pytest.mark.parametrize("name", ["../1.jpg", "a/b.jpg", "1", "1.2.jpg", "", "1 .jpg"])
def test_names_that_break_archives_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError), ShardWriter(UPath(tmp_path), "images-00000.tar") as shard:
        shard.add(name, b"x")
    assert not list(tmp_path.iterdir())


def test_missing_and_cut_shards_are_named(root: UPath) -> None:
    with pytest.raises(DataError, match=r"images-00009\.tar is missing"):
        read_member(root, "images-00009.tar", 0, 1)
    item = write(root)["9.jpg"]
    path = root / item.shard
    path.write_bytes(path.read_bytes()[: item.offset + 100])
    with pytest.raises(DataError, match="early"):
        read_member(root, item.shard, item.offset, item.size_bytes)


def test_shards_are_numbered_after_those_of_the_index() -> None:
    assert next_shard_number("chips", []) == 0
    assert next_shard_number("chips", [None, shard_name("chips", 3), "images-00009.tar"]) == 4
    assert next_shard_number("chips", [shard_name("chips", 3)], 7) == 7


def test_numbers_that_an_index_loses_are_spent_and_others_written_nowhere(root: UPath) -> None:
    def index(*numbers: int) -> pa.Table:
        names = [shard_name("chips", number) for number in numbers]
        return pa.table({"shard": names, "raw_shard": pa.nulls(len(names), pa.string()), "status": names})

    spend_numbers(root, index(0, 1), index(0, 1, 2))
    spend_numbers(root, index(0, 1, 2), index(2))
    assert not (root / SPENT_NUMBERS).exists()
    spend_numbers(root, index(0, 1, 2), index(0))
    assert spent_numbers(root) == {"chips": 3}
    spend_numbers(root, index(0), index())
    spend_numbers(root, index(0, 3), index(0, 4))
    assert spent_numbers(root) == {"chips": 3}
    (root / SPENT_NUMBERS).write_bytes(b"{")
    with pytest.raises(DataError, match="damaged"):
        spent_numbers(root)

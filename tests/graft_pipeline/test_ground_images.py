import io
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from upath import UPath

from graft_pipeline import ground_images
from graft_pipeline.errors import ItemError, ServiceError, SettingsError
from graft_pipeline.ground_images import FetchedImage
from graft_pipeline.manifests import conform, read_table, write_table
from graft_pipeline.schemas import FLICKR_PHOTOS, GROUND_IMAGES
from graft_pipeline.shards import read_member

TODAY = date(2024, 2, 28)
FEW = {"concurrency": 4, "max_attempts": 3, "shard_size": 10, "today": TODAY}


def phash(number: int) -> str:
    """Hashes far apart from one another."""
    return f"{np.random.default_rng(number).integers(2**63):016x}"


class Host:
    """An image host of a test: answers by photo id, counts what it is asked."""

    def __init__(self, faults: dict[str, BaseException] | None = None) -> None:
        self.asked: Counter[str] = Counter()
        self.faults = faults or {}
        self.twins: dict[str, str] = {}
        self._lock = threading.Lock()

    def fetch(self, url: str) -> FetchedImage:
        photo_id = url.rsplit("/")[-1].split("_")[0]
        with self._lock:
            self.asked[photo_id] += 1
        if photo_id in self.faults:
            raise self.faults[photo_id]
        return FetchedImage(
            f"image {photo_id}".encode(), 341, 256, self.twins.get(photo_id) or phash(int(photo_id))
        )


@pytest.fixture
def photos(make_photos: Callable[..., pa.Table]) -> pa.Table:
    return make_photos([{} for _ in range(35)] + [{"status": "rejected", "reason": "burst"}])


def stored(folder: UPath, table: pa.Table) -> dict[str, bytes]:
    ok = [row for row in table.to_pylist() if row["status"] == "ok"]
    return {
        row["photo_id"]: read_member(folder, row["shard"], row["offset"], row["size_bytes"]) for row in ok
    }


def test_all_ok_photos_are_stored_once(root: UPath, photos: pa.Table, snapshot_of: Any) -> None:
    host, seen = Host(), []
    table, _ = ground_images.update(photos, root, host.fetch, **FEW, progress=lambda *at: seen.append(at))
    assert conform(table, GROUND_IMAGES).equals(table)
    expected = {row["photo_id"]: f"image {row['photo_id']}".encode() for row in photos.to_pylist()[:35]}
    assert stored(root, table) == expected
    assert seen == [(done, 35) for done in range(1, 36)]
    assert Counter(table["shard"].to_pylist()) == {
        f"images-0000{n}.tar": size for n, size in enumerate([10, 10, 10, 5])
    }
    before = snapshot_of(root)
    again, changed = ground_images.update(photos, root, host.fetch, **FEW)
    assert not changed
    assert again.equals(table)
    assert snapshot_of(root) == before
    assert set(host.asked.values()) == {1}


def test_results_do_not_depend_on_threads(tmp_path: Path, photos: pa.Table, snapshot_of: Any) -> None:
    trees = []
    for concurrency in (1, 16):
        folder = UPath(tmp_path / str(concurrency))
        bounds = {**FEW, "concurrency": concurrency}
        ground_images.update(photos, folder, Host().fetch, **bounds)
        trees.append({Path(name).name: content for name, content in snapshot_of(folder).items()})
    assert trees[0] == trees[1]


def test_failures_are_rows_and_are_tried_again_up_to_the_limit(tmp_path: Path, photos: pa.Table) -> None:
    folder = UPath(tmp_path)
    host = Host(
        {
            "1003": ItemError("timeout", "It timed out.", is_permanent=False),
            "1004": ItemError("not_an_image", "It is a page.", is_permanent=True),
        }
    )
    columns = ("status", "reason", "attempts", "retry_on")
    day = TODAY
    for attempt, wait_days in ((1, 1), (2, 2), (3, 4)):
        table, changed = ground_images.update(photos, folder, host.fetch, **{**FEW, "today": day})
        assert changed
        rows = {row["photo_id"]: row for row in table.to_pylist()}
        due = day + timedelta(days=wait_days)
        assert [rows["1003"][name] for name in columns] == ["failed", "timeout", attempt, due]
        assert [rows["1004"][name] for name in columns] == ["rejected", "not_an_image", 1, None]
        early = {**FEW, "today": due - timedelta(days=1)}
        again, changed = ground_images.update(photos, folder, host.fetch, **early)
        assert (again.equals(table), changed, host.asked["1003"]) == (True, False, attempt)
        day = due
    _, changed = ground_images.update(photos, folder, host.fetch, **{**FEW, "today": day})
    assert not changed
    assert host.asked["1003"] == 3
    assert host.asked["1004"] == 1


def test_a_failure_that_passes_is_repaired(tmp_path: Path, photos: pa.Table) -> None:
    folder = UPath(tmp_path)
    host = Host({"1003": ItemError("timeout", "It timed out.", is_permanent=False)})
    ground_images.update(photos, folder, host.fetch, **FEW)
    host.faults.clear()
    table, _ = ground_images.update(photos, folder, host.fetch, **FEW, retry_now=True)
    (row,) = [row for row in table.to_pylist() if row["photo_id"] == "1003"]
    columns = ("status", "reason", "attempts", "retry_on", "shard")
    assert [row[name] for name in columns] == ["ok", None, 2, None, "images-00004.tar"]
    assert len(stored(folder, table)) == 35


def test_what_could_not_be_had_is_asked_for_anew_when_the_request_is_another(
    tmp_path: Path, photos: pa.Table, snapshot_of: Any
) -> None:
    """A changed address, other hosts, or a run that asks for it; only then."""
    gone = ItemError("gone", "It is gone.", is_permanent=True)
    timeout = ItemError("timeout", "It timed out.", is_permanent=False)
    faults = {"1003": gone, "1004": timeout, "1005": gone}

    def asked(taken: pa.Table, **options: Any) -> tuple[Counter[str], dict[str, Any]]:
        host = Host(faults)
        host.twins = {"1010": phash(1002)}
        bounds = FEW | {"max_attempts": 1, "hosts": ["a.example"], "today": TODAY + timedelta(days=99)}
        table, _ = ground_images.update(taken, UPath(tmp_path), host.fetch, **{**bounds, **options})
        assert conform(table, GROUND_IMAGES).equals(table)
        return host.asked, {row["photo_id"]: row for row in table.to_pylist()}

    asked(photos)
    files = snapshot_of(UPath(tmp_path))
    assert asked(photos)[0] == {}
    assert snapshot_of(UPath(tmp_path)) == files
    rows = photos.to_pylist()
    # Of a rejected, a failed and tried too often, a stored, and a near-duplicate one.
    for place in (3, 4, 6, 10):
        rows[place]["image_url"] = rows[place]["image_url"].replace("_a_n", "_b_n")
    changed = pa.Table.from_pylist(rows, schema=FLICKR_PHOTOS.schema)
    again, found = asked(changed)
    assert again == {"1003": 1, "1004": 1}
    assert found["1004"]["attempts"] == 1
    assert asked(changed)[0] == {}
    faults.clear()
    assert asked(changed, retry_now=True)[0] == {"1003": 1, "1004": 1, "1005": 1}
    faults["1007"] = ItemError("url_not_allowed", "It is elsewhere.", is_permanent=True)
    (tmp_path / "ground_images.parquet").unlink()
    assert asked(changed)[1]["1007"]["status"] == "rejected"
    del faults["1007"]
    again, found = asked(changed, hosts=["b.example", "a.example"])
    assert (again, found["1007"]["status"], found["1007"]["request_id"]) == ({"1007": 1}, "ok", None)
    assert asked(changed, hosts=["a.example", "b.example"])[0] == {}


def test_near_duplicates_keep_the_first_and_store_no_bytes(tmp_path: Path, photos: pa.Table) -> None:
    host, original = Host(), int(phash(1002), 16)
    for photo_id, bits in (("1010", 1), ("1011", 4), ("1012", 5), ("1030", 2)):
        # Bits spread over the hash, so that most bands differ.
        host.twins[photo_id] = f"{original ^ sum(1 << (13 * bit) for bit in range(bits)):016x}"
    table, _ = ground_images.update(photos.slice(0, 20), UPath(tmp_path), host.fetch, **FEW)
    table, _ = ground_images.update(photos, UPath(tmp_path), host.fetch, **FEW)
    rows = {row["photo_id"]: row for row in table.to_pylist()}
    for photo_id in ("1010", "1011"):
        assert (rows[photo_id]["status"], rows[photo_id]["reason"]) == ("rejected", "near_duplicate")
        assert rows[photo_id]["duplicate_of"] == "1002"
        assert rows[photo_id]["shard"] is None
    assert rows["1012"]["status"] == "ok"
    assert rows["1030"]["status"] == "rejected", "also when the first was stored by an earlier run"
    assert rows["1002"]["status"] == "ok"


@pytest.mark.parametrize(
    "error", [ServiceError("Down. Wait."), SettingsError("No key. Set it."), KeyboardInterrupt()]
)
def test_an_abort_keeps_what_was_fetched_and_changes_no_byte(
    root: UPath, tmp_path: Path, photos: pa.Table, error: BaseException, snapshot_of: Any
) -> None:
    gone = ItemError("gone", "It is gone.", is_permanent=True)
    host = Host({"1017": error, "1012": gone})
    host.twins = {"1014": phash(1002)}
    with pytest.raises(type(error)):
        ground_images.update(photos, root, host.fetch, **FEW)
    table = read_table(root / "ground_images.parquet", GROUND_IMAGES)
    assert table is not None
    assert sorted(stored(root, table)) == [f"{1000 + n}" for n in range(10)], "a shard is whole or not there"
    asked = Counter(host.asked)
    del host.faults["1017"]
    table, _ = ground_images.update(photos, root, host.fetch, **FEW)
    assert len(stored(root, table)) == 33
    assert {key: count for key, count in host.asked.items() if count > 1} == {"1017": 2}
    assert sum(asked.values()) >= 17
    undisturbed = UPath(tmp_path / "undisturbed")
    other = Host({"1012": gone})
    other.twins = host.twins
    ground_images.update(photos, undisturbed, other.fetch, **FEW)
    names = [
        {Path(name).name: content for name, content in snapshot_of(f).items()} for f in (root, undisturbed)
    ]
    assert names[0] == names[1]


def fetch_until_killed(folder: UPath, photos: pa.Table, limit: int) -> None:
    host = Host()

    def fetch(url: str) -> FetchedImage:
        if sum(host.asked.values()) >= limit:
            # Not before what was fetched is stored, where it fills shards.
            while limit > 8 and not (folder / "ground_images.parquet").exists():
                time.sleep(0.01)
            os._exit(9)
        return host.fetch(url)

    ground_images.update(photos, folder, fetch, concurrency=2, max_attempts=3, shard_size=4, today=TODAY)


def test_a_killed_process_leaves_nothing_broken(tmp_path: Path, photos: pa.Table) -> None:
    table_file = tmp_path.with_suffix(".parquet")
    write_table(table_file, photos, FLICKR_PHOTOS)
    for limit in ("7", "22"):
        # This file, run as a program: see below.
        done = subprocess.run([sys.executable, __file__, str(tmp_path), str(table_file), limit], check=False)
        assert done.returncode == 9
    table = read_table(UPath(tmp_path) / "ground_images.parquet", GROUND_IMAGES)
    assert table is not None
    finished = stored(UPath(tmp_path), table)
    assert finished
    host = Host()
    table, _ = ground_images.update(photos, UPath(tmp_path), host.fetch, **FEW)
    assert len(stored(UPath(tmp_path), table)) == 35
    assert not set(host.asked) & set(finished)
    assert all(file.suffix in (".tar", ".parquet") for file in tmp_path.iterdir())


def test_what_was_damaged_on_its_disk_is_fetched_anew_when_asked(root: UPath, photos: pa.Table) -> None:
    host = Host()
    host.twins = {"1014": phash(1002)}
    table, _ = ground_images.update(photos, root, host.fetch, **FEW)
    (row,) = (row for row in table.to_pylist() if row["photo_id"] == "1002")
    content = (root / row["shard"]).read_bytes()
    (root / row["shard"]).write_bytes(content[: row["offset"]] + b"\0" + content[row["offset"] + 1 :])
    host.asked.clear()
    _, changed = ground_images.update(photos, root, host.fetch, **FEW)
    assert (changed, host.asked) == (False, {})
    again, changed = ground_images.update(photos, root, host.fetch, verify=True, **FEW)
    assert (changed, host.asked) == (True, {"1002": 1})
    assert again.drop_columns(["shard", "offset"]).equals(table.drop_columns(["shard", "offset"]))
    assert sorted(stored(root, again)) == sorted(set(again["photo_id"].to_pylist()) - {"1014"})


def test_an_orphan_shard_is_overwritten(tmp_path: Path, photos: pa.Table) -> None:
    (tmp_path / "images-00000.tar").write_bytes(b"of a process that died before its index")
    table, _ = ground_images.update(photos, UPath(tmp_path), Host().fetch, **FEW)
    assert len(stored(UPath(tmp_path), table)) == 35


def test_a_region_without_photos_gets_an_empty_index(tmp_path: Path, photos: pa.Table) -> None:
    table, changed = ground_images.update(photos.slice(0, 0), UPath(tmp_path), Host().fetch, **FEW)
    assert changed
    assert table.num_rows == 0
    assert read_table(tmp_path / "ground_images.parquet", GROUND_IMAGES) is not None


def test_samples_are_decoded_ok_images(tmp_path: Path, photos: pa.Table) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(buffer, "JPEG")

    def fetch(url: str) -> FetchedImage:
        return FetchedImage(buffer.getvalue(), 40, 30, phash(int(url.rsplit("/")[-1].split("_")[0])))

    table, _ = ground_images.update(photos, UPath(tmp_path), fetch, **FEW)
    sample = ground_images.sample_images(UPath(tmp_path), table, 5, seed=1)
    assert len(sample) == 5
    assert all(array.shape == (30, 40, 3) for _, array in sample)
    again = ground_images.sample_images(UPath(tmp_path), table, 5, seed=1)
    assert [photo_id for photo_id, _ in sample] == [photo_id for photo_id, _ in again]


if __name__ == "__main__":
    stored_photos = read_table(Path(sys.argv[2]), FLICKR_PHOTOS)
    assert stored_photos is not None
    fetch_until_killed(UPath(sys.argv[1]), stored_photos, int(sys.argv[3]))

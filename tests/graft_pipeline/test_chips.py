import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import rasterio
import shapely
from hypothesis import given
from hypothesis import strategies as st
from rasterio.io import MemoryFile
from upath import UPath

from graft_pipeline import chips, rules, sampling, scenes
from graft_pipeline.errors import DataError, ItemError, ServiceError
from graft_pipeline.geometry import Grid
from graft_pipeline.imagery import NAIP, SENTINEL2, Sensor
from graft_pipeline.manifests import conform
from graft_pipeline.regions import Region
from graft_pipeline.schemas import CHIPS, SCENES
from graft_pipeline.shards import ShardWriter, read_member
from graft_pipeline.unfinished import FOLDER

REGION = Region.parse("N42.25W071.75", 0.25)
#: Small chips: what is tested does not depend on their size.
SMALL = Sensor(name="small", collection="X", bands=("R", "G", "B"), gsd_m=10.0, chip_px=32, crop_px=16)
TIME = datetime(2015, 6, 1, tzinfo=UTC)


class Imagery:
    """Scenes of a test: colours by scene and place; `answers` replaces what a scene gives."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, float]] = Counter()
        self.answers: dict[str, Any] = {}
        self._lock = threading.Lock()

    def fetch(self, sensor: Sensor, scene_id: str, grid: Grid) -> npt.NDArray[Any]:
        with self._lock:
            self.asked[scene_id, grid.x0_m] += 1
        answer = self.answers.get(scene_id)
        if isinstance(answer, BaseException):
            raise answer
        pixels = np.random.default_rng([int(grid.x0_m), int(grid.y0_m), ord(scene_id)]).integers(
            1, 256, (grid.height_px, grid.width_px, 3), dtype=np.uint8
        )
        if answer == "nodata":
            pixels[3, 5] = 0
        return pixels


def scene_table(*scene_ids: str) -> pa.Table:
    rows = [
        {
            "scene_id": scene_id,
            "acquired_at_utc": TIME - timedelta(days=number),
            "cloud_pct": 0.25,
            "crs": "EPSG:32619",
            "x_min_m": 2e5,
            "y_min_m": 4.6e6,
            "x_max_m": 4e5,
            "y_max_m": 4.8e6,
            "footprint_wkb": shapely.box(-73, 41, -70, 44).wkb,
        }
        for number, scene_id in enumerate(scene_ids)
    ]
    return pa.Table.from_pylist(rows, schema=SCENES.schema)


@pytest.fixture
def photos(make_photos: Callable[..., pa.Table]) -> pa.Table:
    return make_photos([{"lon_deg": -71.74 + 0.01 * n} for n in range(23)])


@pytest.fixture
def tiles(photos: pa.Table) -> pa.Table:
    return sampling.sample_tiles(photos, REGION, SMALL, None)


TODAY = date(2024, 2, 28)
FEW = {"concurrency": 4, "max_attempts": 3, "shard_size": 10, "today": TODAY}


def row_of(table: pa.Table, tile_id: str) -> dict[str, Any]:
    (row,) = [row for row in table.to_pylist() if row["tile_id"] == tile_id]
    return dict(row)


def test_chips_are_stored_georeferenced_and_once(
    root: UPath, tiles: pa.Table, photos: pa.Table, snapshot_of: Any
) -> None:
    imagery, listed = Imagery(), scene_table("A", "B")
    table, changed = chips.update(tiles, listed, photos, SMALL, root, imagery.fetch, **FEW)
    assert changed
    assert conform(table, CHIPS).equals(table)
    assert table.num_rows == tiles.num_rows == 23
    assert set(table["status"].to_pylist()) == {"ok"}
    assert {scene for scene, _ in imagery.asked} == {"A"}
    by_id = {tile["tile_id"]: tile for tile in tiles.to_pylist()}
    taken = dict(zip(photos["photo_id"].to_pylist(), photos["taken_at_utc"].to_pylist(), strict=True))
    for row in table.to_pylist():
        tile = by_id[row["tile_id"]]
        grid = Grid(row["epsg"], row["x0_m"], row["y0_m"], row["gsd_m"], row["chip_px"], row["chip_px"])
        content = read_member(root, row["shard"], row["offset"], row["size_bytes"])
        with MemoryFile(content) as memory, memory.open() as file:
            assert file.crs.to_epsg() == 32619
            assert file.transform == grid.affine
            assert file.dtypes == ("uint8",) * 3
        np.testing.assert_array_equal(chips.decode(content), Imagery().fetch(SMALL, "A", grid))
        assert row["time_difference_days"] == pytest.approx(
            (TIME - taken[tile["center_photo_id"]]).total_seconds() / 86_400
        )
        assert (row["scenes_tried"], row["cloud_pct"], row["acquired_at_utc"]) == (1, 0.25, TIME)
    before = snapshot_of(root)
    again, changed = chips.update(tiles, listed, photos, SMALL, root, imagery.fetch, **FEW)
    assert (changed, again.equals(table), snapshot_of(root) == before) == (False, True, True)
    assert set(imagery.asked.values()) == {1}


def test_results_do_not_depend_on_threads(
    tmp_path: Path, tiles: pa.Table, photos: pa.Table, snapshot_of: Any
) -> None:
    trees = []
    for concurrency in (1, 16):
        folder = UPath(tmp_path / str(concurrency))
        bounds = {"concurrency": concurrency, "max_attempts": 3, "shard_size": 10, "today": TODAY}
        chips.update(tiles, scene_table("A"), photos, SMALL, folder, Imagery().fetch, **bounds)
        trees.append({Path(name).name: content for name, content in snapshot_of(folder).items()})
    assert trees[0] == trees[1]


def test_missing_pixels_take_the_next_scene(tmp_path: Path, tiles: pa.Table, photos: pa.Table) -> None:
    imagery = Imagery()
    imagery.answers = {"A": "nodata", "B": ItemError("scene_gone", "404", is_permanent=True)}
    table, _ = chips.update(
        tiles, scene_table("A", "B", "C"), photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW
    )
    assert set(table["scene_id"].to_pylist()) == {"C"}
    assert set(table["scenes_tried"].to_pylist()) == {3}
    assert set(table["acquired_at_utc"].to_pylist()) == {TIME - timedelta(days=2)}


def test_no_more_scenes_than_useful_are_asked(tmp_path: Path, tiles: pa.Table, photos: pa.Table) -> None:
    imagery, names = Imagery(), "ABCDEFGHIJKL"
    imagery.answers = dict.fromkeys(names, "nodata")
    table, _ = chips.update(tiles, scene_table(*names), photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW)
    assert set(zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True)) == {
        ("failed", "nodata")
    }
    assert set(table["scenes_tried"].to_pylist()) == {scenes.MAX_CANDIDATES}
    assert not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize(("is_permanent", "status", "asked"), [(True, "rejected", 1), (False, "failed", 3)])
def test_failures_are_rows_and_passing_ones_are_tried_again(
    tmp_path: Path, tiles: pa.Table, photos: pa.Table, is_permanent: bool, status: str, asked: int
) -> None:
    imagery = Imagery()
    imagery.answers = {"A": ItemError("too_bad", "It is bad.", is_permanent=is_permanent)}
    # Days 1 and 3 are those on which the rows are due; the others come too early, or after the last attempt.
    for later in (0, 0, 1, 2, 3, 90):
        day = {**FEW, "today": TODAY + timedelta(days=later)}
        table, changed = chips.update(
            tiles, scene_table("A"), photos, SMALL, UPath(tmp_path), imagery.fetch, **day
        )
    assert not changed
    row = row_of(table, tiles["tile_id"][0].as_py())
    assert (row["status"], row["reason"], row["attempts"]) == (status, "too_bad", asked)
    assert set(imagery.asked.values()) == {asked}


def test_a_passing_failure_does_not_change_the_scene(
    tmp_path: Path, tiles: pa.Table, photos: pa.Table
) -> None:
    imagery, listed = Imagery(), scene_table("A", "B")
    imagery.answers = {"A": ItemError("timeout", "It timed out.", is_permanent=False)}
    table, _ = chips.update(tiles, listed, photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW)
    assert set(table["status"].to_pylist()) == {"failed"}
    assert set(table["retry_on"].to_pylist()) == {TODAY + timedelta(days=1)}
    imagery.answers = {}
    again, changed = chips.update(tiles, listed, photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW)
    assert (again.equals(table), changed) == (True, False)
    table, _ = chips.update(
        tiles, listed, photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW, retry_now=True
    )
    assert set(table["scene_id"].to_pylist()) == {"A"}
    assert set(table["attempts"].to_pylist()) == {2}
    assert set(table["retry_on"].to_pylist()) == {None}


def test_without_a_scene_nothing_is_asked_until_there_is_one(
    tmp_path: Path, tiles: pa.Table, photos: pa.Table, snapshot_of: Any
) -> None:
    imagery = Imagery()
    for _ in range(5):
        table, changed = chips.update(
            tiles, SCENES.empty(), photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW
        )
    assert set(zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True)) == {
        ("failed", "no_scene")
    }
    assert set(table["retry_on"].to_pylist()) == {None}
    assert not changed
    assert not imagery.asked
    table, _ = chips.update(tiles, scene_table("A"), photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW)
    assert set(table["status"].to_pylist()) == {"ok"}


def test_an_abort_keeps_what_was_fetched_and_changes_no_byte(
    root: UPath, tmp_path: Path, tiles: pa.Table, photos: pa.Table, snapshot_of: Any
) -> None:
    imagery, bad = Imagery(), tiles["x0_m"][13].as_py()

    def fetch(sensor: Sensor, scene_id: str, grid: Grid) -> npt.NDArray[Any]:
        if grid.x0_m == bad:
            raise ServiceError("Earth Engine is down. Wait.")
        return imagery.fetch(sensor, scene_id, grid)

    with pytest.raises(ServiceError):
        chips.update(tiles, scene_table("A"), photos, SMALL, root, fetch, **FEW)
    kept = {tile["x0_m"] for tile in tiles.to_pylist()[:13]}
    table, _ = chips.update(tiles, scene_table("A"), photos, SMALL, root, imagery.fetch, **FEW)
    assert set(table["status"].to_pylist()) == {"ok"}
    assert set(imagery.asked.values()) == {1}
    assert kept < {x for _, x in imagery.asked}
    undisturbed = UPath(tmp_path / "undisturbed")
    chips.update(tiles, scene_table("A"), photos, SMALL, undisturbed, imagery.fetch, **FEW)
    names = [
        {Path(name).name: content for name, content in snapshot_of(f).items()} for f in (root, undisturbed)
    ]
    assert names[0] == names[1]


def test_what_an_abort_left_of_another_scene_is_not_used(
    root: UPath, tiles: pa.Table, photos: pa.Table
) -> None:
    imagery, calls = Imagery(), Counter()

    def fetch(sensor: Sensor, scene_id: str, grid: Grid) -> npt.NDArray[Any]:
        calls["all"] += 1
        if calls["all"] == 6:
            raise ServiceError("Earth Engine is down. Wait.")
        return imagery.fetch(sensor, scene_id, grid)

    with pytest.raises(ServiceError):
        chips.update(tiles, scene_table("A"), photos, SMALL, root, fetch, **FEW)
    assert any(FOLDER in str(file) for file in root.rglob("*"))
    table, _ = chips.update(tiles, scene_table("B"), photos, SMALL, root, imagery.fetch, **FEW)
    assert set(table["scene_id"].to_pylist()) == {"B"}
    assert not any(FOLDER in str(file) for file in root.rglob("*"))


def test_later_tiles_only_append(tmp_path: Path, tiles: pa.Table, photos: pa.Table) -> None:
    imagery, listed = Imagery(), scene_table("A")
    before, _ = chips.update(tiles.slice(0, 12), listed, photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW)
    shards = {file.name: file.read_bytes() for file in tmp_path.glob("*.tar")}
    after, _ = chips.update(tiles, listed, photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW)
    rows = {row["tile_id"]: row for row in after.to_pylist()}
    assert all(rows[row["tile_id"]] == row for row in before.to_pylist())
    assert all((tmp_path / name).read_bytes() == content for name, content in shards.items())


def test_chips_of_tiles_that_are_gone_stay_in_the_index(
    tmp_path: Path, tiles: pa.Table, photos: pa.Table
) -> None:
    imagery, listed = Imagery(), scene_table("A")
    chips.update(tiles, listed, photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW)
    fewer, _ = chips.update(tiles.slice(0, 5), listed, photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW)
    assert fewer.num_rows == 5
    again, changed = chips.update(tiles, listed, photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW)
    assert (again.num_rows, changed) == (23, False)
    assert set(imagery.asked.values()) == {1}


def test_a_tile_on_another_grid_is_fetched_anew(tmp_path: Path, tiles: pa.Table, photos: pa.Table) -> None:
    imagery, listed = Imagery(), scene_table("A")
    chips.update(tiles, listed, photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW)
    moved = tiles.set_column(
        tiles.schema.get_field_index("x0_m"),
        tiles.schema.field("x0_m"),
        pa.array(tiles["x0_m"].to_numpy() + 10),
    )
    table, _ = chips.update(moved, listed, photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW)
    assert set(table["x0_m"].to_pylist()) == set(moved["x0_m"].to_pylist())
    assert set(table["status"].to_pylist()) == {"ok"}


def test_a_client_that_gives_another_size_is_refused(
    tmp_path: Path, tiles: pa.Table, photos: pa.Table
) -> None:
    with pytest.raises(DataError, match="32 px"):
        chips.update(
            tiles,
            scene_table("A"),
            photos,
            SMALL,
            UPath(tmp_path),
            lambda *_: np.ones((4, 4, 3), np.uint8),
            **FEW,
        )


@pytest.mark.parametrize("is_permanent", [True, False])
@pytest.mark.parametrize("repair", ["sensor", "scenes", "retry_now"])
def test_what_was_given_up_is_tried_anew_after_a_repair(
    tmp_path: Path, tiles: pa.Table, photos: pa.Table, is_permanent: bool, repair: str
) -> None:
    imagery, listed = Imagery(), scene_table("A", "B")
    imagery.answers = dict.fromkeys("AB", ItemError("bad_request", "It is bad.", is_permanent=is_permanent))
    for later in (0, 1, 3, 90):
        day = {**FEW, "today": TODAY + timedelta(days=later)}
        table, changed = chips.update(tiles, listed, photos, SMALL, UPath(tmp_path), imagery.fetch, **day)
    assert not changed
    assert "ok" not in table["status"].to_pylist()
    imagery.answers, before = {}, dict(imagery.asked)
    again, changed = chips.update(tiles, listed, photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW)
    assert (changed, imagery.asked) == (False, before), "nothing is asked while nothing is repaired"
    sensor = replace(SMALL, display_range=(0.0, 255.0)) if repair == "sensor" else SMALL
    scenes_now = scene_table("A", "B", "C") if repair == "scenes" else listed
    bounds = {**FEW, "retry_now": repair == "retry_now"}
    again, _ = chips.update(tiles, scenes_now, photos, sensor, UPath(tmp_path), imagery.fetch, **bounds)
    assert set(again["status"].to_pylist()) == {"ok"}
    attempts = 1 if repair != "retry_now" else table["attempts"][0].as_py() + 1
    assert set(again["attempts"].to_pylist()) == {attempts}
    assert again["request_id"].null_count == again.num_rows


def test_clouds_under_an_old_rule_do_not_count_as_attempts(
    tmp_path: Path, tiles: pa.Table, photos: pa.Table
) -> None:
    sky, one = Sky(A={9: 30}, B={9: 30}), {**FEW, "max_attempts": 1}
    table, _ = chips.update(tiles, scene_table("A"), photos, CLOUDY, UPath(tmp_path), sky.fetch, **one)
    assert set(table["reason"].to_pylist()) == {"cloudy"}
    assert not chips.update(tiles, scene_table("A"), photos, CLOUDY, UPath(tmp_path), sky.fetch, **one)[1]
    table, _ = chips.update(tiles, scene_table("A", "B"), photos, CLOUDY, UPath(tmp_path), sky.fetch, **one)
    assert sky.asked == {"A": 2 * 23, "B": 23}
    loose = replace(CLOUDY, max_cloud_pct=5.0)
    table, _ = chips.update(tiles, scene_table("A", "B"), photos, loose, UPath(tmp_path), sky.fetch, **one)
    assert set(table["status"].to_pylist()) == {"ok"}


@pytest.mark.parametrize(("other", "outcome"), [(None, "B"), ("nodata", "truncated")])
def test_the_last_attempt_goes_on_to_the_next_scene(
    tmp_path: Path, tiles: pa.Table, photos: pa.Table, other: str | None, outcome: str
) -> None:
    imagery, listed = Imagery(), scene_table("A", "B")
    imagery.answers = {"A": ItemError("truncated", "It is cut.", is_permanent=False), "B": other}
    for later in (0, 1, 3):
        day = {**FEW, "today": TODAY + timedelta(days=later)}
        table, _ = chips.update(tiles, listed, photos, SMALL, UPath(tmp_path), imagery.fetch, **day)
        assert set(table["scenes_tried"].to_pylist()) == {2 if later == 3 else 1}
    assert set(table["scene_id" if other is None else "reason"].to_pylist()) == {outcome}
    assert set(table["attempts"].to_pylist()) == {3}


@pytest.mark.parametrize("later", ["BC", "", "A"])
def test_a_chip_of_a_scene_that_is_listed_no_more_stays_and_obeys_the_rule(
    tmp_path: Path, tiles: pa.Table, photos: pa.Table, later: str
) -> None:
    imagery = Imagery()
    sensor = replace(SMALL, cloud_property="CLOUD", max_cloud_pct=1.0)
    table, _ = chips.update(
        tiles, scene_table("A", "B"), photos, sensor, UPath(tmp_path), imagery.fetch, **FEW
    )
    listed = scene_table(*later)
    # What the listing says of a scene by now is not what it was when it served.
    clouds = pa.array([80.0] * listed.num_rows, pa.float64())
    listed = listed.set_column(2, listed.schema.field("cloud_pct"), clouds)
    again, changed = chips.update(tiles, listed, photos, sensor, UPath(tmp_path), imagery.fetch, **FEW)
    assert (again.equals(table), changed) == (True, False)
    finding = rules.cloud_and_time(again, tiles, photos, listed, sensor)
    assert finding.passed, finding.message
    assert finding.evidence["unlisted_scenes"] == (0 if later == "A" else 23)
    assert finding.evidence["first_choice"] == 0
    strict = replace(sensor, max_cloud_pct=0.25)
    assert rules.cloud_and_time(again, tiles, photos, listed, strict).violations == 23
    undated = again.set_column(
        again.schema.get_field_index("acquired_at_utc"),
        again.schema.field("acquired_at_utc"),
        pa.nulls(23, again.schema.field("acquired_at_utc").type),
    )
    assert rules.cloud_and_time(undated, tiles, photos, listed, sensor).violations == 23


def test_a_listed_scene_holds_its_chips_or_they_are_fetched_anew(
    tmp_path: Path, tiles: pa.Table, photos: pa.Table
) -> None:
    listed = scene_table("A")
    table, _ = chips.update(tiles, listed, photos, SMALL, UPath(tmp_path), Imagery().fetch, **FEW)
    elsewhere = pa.array([shapely.box(10, 41, 11, 42).wkb])
    moved = listed.set_column(
        listed.schema.get_field_index("footprint_wkb"), listed.schema.field("footprint_wkb"), elsewhere
    )
    assert rules.cloud_and_time(table, tiles, photos, moved, SMALL).violations == 23
    # Its chips come from another that does, at the next time; without one they say so.
    imagery, nearer = Imagery(), pa.concat_tables([moved, scene_table("B")])
    again, _ = chips.update(tiles, nearer, photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW)
    assert set(again["scene_id"].to_pylist()) == {scene for scene, _ in imagery.asked} == {"B"}
    assert rules.cloud_and_time(again, tiles, photos, nearer, SMALL).passed
    gone, _ = chips.update(tiles, moved, photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW)
    assert gone.equals(again), "of a scene that is listed no more"
    shrunk = moved.set_column(0, "scene_id", pa.array(["B"]))
    gone, _ = chips.update(tiles, shrunk, photos, SMALL, UPath(tmp_path), imagery.fetch, **FEW)
    assert set(gone["reason"].to_pylist()) == {"no_scene"}


def test_what_was_damaged_on_its_disk_is_fetched_anew_when_asked(
    root: UPath, tiles: pa.Table, photos: pa.Table
) -> None:
    sensor, listed = replace(SMALL, raw_bands=("R",)), scene_table("A")
    table, _ = chips.update(tiles, listed, photos, sensor, root, Imagery().fetch, **FEW)
    by_shard = {
        name: table.filter(pc.equal(table["shard"], name)).to_pylist()
        for name in set(table["shard"].to_pylist())
    }
    first, second, last = (by_shard[f"chips-{number:05d}.tar"] for number in range(3))
    (root / "chips-00000.tar").unlink()
    for row, name in ((second[3], ""), (last[0], "raw_")):
        content = bytearray((root / row[f"{name}shard"]).read_bytes())
        content[row[f"{name}offset"] + row[f"{name}size_bytes"] // 2] ^= 1
        (root / row[f"{name}shard"]).write_bytes(bytes(content))
    damaged = {row["tile_id"] for row in (*first, second[3], last[0])}
    with pytest.raises(DataError, match="verify"):
        read_member(root, first[0]["shard"], first[0]["offset"], first[0]["size_bytes"])

    imagery = Imagery()
    _, changed = chips.update(tiles, listed, photos, sensor, root, imagery.fetch, **FEW)
    assert (changed, imagery.asked.total()) == (False, 0)
    again, changed = chips.update(tiles, listed, photos, sensor, root, imagery.fetch, verify=True, **FEW)
    assert (changed, imagery.asked.total()) == (True, len(damaged))
    for before, row in zip(table.to_pylist(), again.to_pylist(), strict=True):
        assert (row["shard"] in by_shard) == (row["tile_id"] not in damaged), "a shard's number is used once"
        assert row["sha256"] == before["sha256"]
        for name in ("", "raw_"):
            content = read_member(root, row[f"{name}shard"], row[f"{name}offset"], row[f"{name}size_bytes"])
            assert hashlib.sha256(content).hexdigest() == row[f"{name}sha256"]
    _, changed = chips.update(tiles, listed, photos, sensor, root, imagery.fetch, verify=True, **FEW)
    assert (changed, imagery.asked.total()) == (False, len(damaged))


# --- clouds and raw bands ------------------------------------------------------------------------------------------

CLOUDY = replace(
    SMALL,
    display_range=(0.0, 3000.0),
    cloud_rule="chip",
    mask_band="SCL",
    max_cloud_pct=1.0,
    raw_bands=("N", "R"),
)


class Sky:
    """Sixteen-bit scenes of a test, with a mask of classes: of each scene so many pixels have a class."""

    def __init__(self, **classes: dict[int, int]) -> None:
        self.classes = classes
        self.asked: Counter[str] = Counter()

    def fetch(self, sensor: Sensor, scene_id: str, grid: Grid) -> npt.NDArray[Any]:
        self.asked[scene_id] += 1
        generator = np.random.default_rng([int(grid.x0_m), int(grid.y0_m), ord(scene_id)])
        size = (grid.height_px, grid.width_px, len(sensor.requested_bands))
        pixels = generator.integers(1, 4000, size, dtype=np.uint16)
        if "SCL" in sensor.requested_bands:
            mask = np.full(grid.height_px * grid.width_px, 4, dtype=np.uint16)
            start = 0
            for value, count in self.classes.get(scene_id, {}).items():
                mask[start : start + count] = value
                start += count
            pixels[..., sensor.requested_bands.index("SCL")] = mask.reshape(size[:2])
        return pixels


def test_under_the_rule_by_chip_its_own_clouds_decide(
    tmp_path: Path, tiles: pa.Table, photos: pa.Table
) -> None:
    # 1024 pixels: ten are less than a percent, eleven more; shadow and cirrus count, water and snow do not.
    sky = Sky(A={9: 11}, B={3: 4, 8: 4, 10: 3}, C={9: 10, 6: 500, 11: 300})
    listed = scene_table("A", "B", "C")
    table, _ = chips.update(tiles, listed, photos, CLOUDY, UPath(tmp_path), sky.fetch, **FEW)
    assert set(table["scene_id"].to_pylist()) == {"C"}
    assert set(table["scenes_tried"].to_pylist()) == {3}
    assert set(table["chip_cloud_pct"].to_pylist()) == {100 * 10 / 1024}
    assert set(table["nodata_px"].to_pylist()) == {0}
    assert sum(sky.asked.values()) == 3 * 23, "the mask comes with the chip"
    finding = rules.cloud_and_time(table, tiles, photos, listed, CLOUDY)
    assert finding.passed, finding.message
    assert (
        rules.cloud_and_time(table, tiles, photos, listed, replace(CLOUDY, max_cloud_pct=0.9)).violations
        == 23
    )
    scenes_too = replace(CLOUDY, cloud_property="CLOUD", max_scene_cloud_pct=0.2)
    assert rules.cloud_and_time(table, tiles, photos, listed, scenes_too).violations == 23


def test_scenes_are_tried_from_the_nearest_whatever_their_clouds(
    tmp_path: Path, tiles: pa.Table, photos: pa.Table
) -> None:
    names = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    sky = Sky(**{name: {9: 100} for name in names})
    cloudy = scene_table(*names)
    cloudy = cloudy.set_column(2, cloudy.schema.field("cloud_pct"), pa.array([None, 99.0] * 13, pa.float64()))
    table, _ = chips.update(tiles, cloudy, photos, CLOUDY, UPath(tmp_path), sky.fetch, **FEW)
    outcomes = set(
        zip(*(table[name].to_pylist() for name in ("status", "reason", "scenes_tried")), strict=True)
    )
    assert outcomes == {("failed", "cloudy", scenes.MAX_CLOUDY_CANDIDATES)}
    assert set(table["chip_cloud_pct"].to_pylist()) == {100 * 100 / 1024}
    assert set(sky.asked) == set(names[:24])
    bounded = replace(CLOUDY, cloud_property="CLOUD", max_scene_cloud_pct=99.0)
    table, _ = chips.update(tiles, cloudy, photos, bounded, UPath(tmp_path / "b"), sky.fetch, **FEW)
    assert set(table["reason"].to_pylist()) == {"no_scene"}


def test_another_rule_fetches_what_does_not_obey_it(
    tmp_path: Path, tiles: pa.Table, photos: pa.Table
) -> None:
    sky, listed = Sky(A={9: 50}), scene_table("A", "B")
    by_scene = replace(CLOUDY, cloud_rule="scene", cloud_property="CLOUD", raw_bands=())
    table, _ = chips.update(tiles, listed, photos, by_scene, UPath(tmp_path), sky.fetch, **FEW)
    assert set(table["scene_id"].to_pylist()) == {"A"}
    assert table["chip_cloud_pct"].null_count == 23
    table, _ = chips.update(tiles, listed, photos, CLOUDY, UPath(tmp_path), sky.fetch, **FEW)
    assert set(table["scene_id"].to_pylist()) == {"B"}
    assert not chips.update(tiles, listed, photos, CLOUDY, UPath(tmp_path), sky.fetch, **FEW)[1]
    strict = replace(by_scene, max_cloud_pct=0.25)
    table, _ = chips.update(tiles, scene_table("A"), photos, strict, UPath(tmp_path), sky.fetch, **FEW)
    assert set(table["reason"].to_pylist()) == {"no_scene"}


def test_raw_bands_are_kept_beside_the_chips(
    root: UPath, tiles: pa.Table, photos: pa.Table, snapshot_of: Any
) -> None:
    sky, listed = Sky(), scene_table("A")
    plain = replace(CLOUDY, raw_bands=())
    chips.update(tiles, listed, photos, plain, root, sky.fetch, **FEW)
    assert not list(root.glob("raw-*"))
    table, _ = chips.update(tiles, listed, photos, CLOUDY, root, sky.fetch, **FEW)
    assert sum(sky.asked.values()) == 2 * 23, "the same request gives both"
    assert {path.name for path in root.glob("raw-*")} == {f"raw-0000{n}.tar" for n in range(3)}
    for row in table.to_pylist():
        grid = Grid(row["epsg"], row["x0_m"], row["y0_m"], row["gsd_m"], row["chip_px"], row["chip_px"])
        source = sky.fetch(CLOUDY, "A", grid)
        content = read_member(root, row["raw_shard"], row["raw_offset"], row["raw_size_bytes"])
        assert hashlib.sha256(content).hexdigest() == row["raw_sha256"]
        with MemoryFile(content) as memory, memory.open() as file:
            assert (file.crs.to_epsg(), file.transform) == (32619, grid.affine)
            assert (file.descriptions, file.dtypes) == (("N", "R"), ("uint16", "uint16"))
            np.testing.assert_array_equal(np.moveaxis(file.read(), 0, -1), source[..., [3, 0]])
        chip = chips.decode(read_member(root, row["shard"], row["offset"], row["size_bytes"]))
        np.testing.assert_array_equal(chip, chips.to_uint8(source[..., :3], CLOUDY))
    before = snapshot_of(root)
    assert not chips.update(tiles, listed, photos, CLOUDY, root, sky.fetch, **FEW)[1]
    assert snapshot_of(root) == before


def test_an_abort_keeps_raw_bands_too(
    root: UPath, tiles: pa.Table, photos: pa.Table, snapshot_of: Any
) -> None:
    sky, listed, bad = Sky(), scene_table("A"), tiles["x0_m"][13].as_py()

    def fetch(sensor: Sensor, scene_id: str, grid: Grid) -> npt.NDArray[Any]:
        if grid.x0_m == bad:
            raise ServiceError("Earth Engine is down. Wait.")
        return sky.fetch(sensor, scene_id, grid)

    with pytest.raises(ServiceError):
        chips.update(tiles, listed, photos, CLOUDY, root / "killed", fetch, **FEW)
    again, _ = chips.update(tiles, listed, photos, CLOUDY, root / "killed", sky.fetch, **FEW)
    calm, _ = chips.update(tiles, listed, photos, CLOUDY, root / "calm", Sky().fetch, **FEW)
    assert again.equals(calm)
    assert sum(sky.asked.values()) == 23
    files = [
        {Path(name).name: content for name, content in snapshot_of(root / part).items()}
        for part in ("killed", "calm")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("change", "is_other"),
    [
        ({"collection": "Y"}, True),
        ({"bands": ("G", "R", "B")}, True),
        ({"display_range": (0.0, 4000.0)}, True),
        ({"offset": -1000}, True),
        ({"cloud_classes": (9,)}, True),
        ({"mask_band": "QA", "bands": ("R", "G", "SCL")}, True),
        ({"raw_bands": ("N", "R2")}, True),
        ({"raw_bands": ("R",)}, False),
        ({"raw_bands": ()}, False),
        ({"display_range": (0, 3000)}, False),
        ({"max_cloud_pct": 2.0}, False),
        ({"listed_from": "2020-01-01", "scene_choice": "closest", "token_url": "https://token"}, False),
        ({"max_scene_cloud_pct": 50.0, "cloud_property": "CLOUD"}, False),
        ({"max_scene_cloud_pct": 0.2, "cloud_property": "CLOUD"}, True),
    ],
)
def test_chips_of_another_sensor_are_fetched_anew(
    tmp_path: Path, tiles: pa.Table, photos: pa.Table, change: dict[str, Any], is_other: bool
) -> None:
    sky, listed, few = Sky(), scene_table("A"), tiles.slice(0, 3)
    before, _ = chips.update(few, listed, photos, CLOUDY, UPath(tmp_path), sky.fetch, **FEW)
    sensor = replace(CLOUDY, **change)
    after, changed = chips.update(few, listed, photos, sensor, UPath(tmp_path), sky.fetch, **FEW)
    assert (changed, after.equals(before)) == (is_other, not is_other)
    asked = sum(sky.asked.values())
    assert not chips.update(few, listed, photos, sensor, UPath(tmp_path), sky.fetch, **FEW)[1]
    assert sum(sky.asked.values()) == asked


@pytest.mark.parametrize("is_killed", [False, True])
def test_shards_that_no_row_names_any_more_stay_as_they_are(
    root: UPath, tiles: pa.Table, photos: pa.Table, snapshot_of: Any, is_killed: bool
) -> None:
    sky, strict = Sky(A={9: 30}), CLOUDY
    loose, bad = replace(CLOUDY, max_cloud_pct=5.0), tiles["x0_m"][13].as_py()
    first, _ = chips.update(tiles, scene_table("A"), photos, loose, root, sky.fetch, **FEW)
    before = snapshot_of(root)
    failed, _ = chips.update(tiles, scene_table("A"), photos, strict, root, sky.fetch, **FEW)
    assert set(failed["reason"].to_pylist()) == {"cloudy"}

    def fetch(sensor: Sensor, scene_id: str, grid: Grid) -> npt.NDArray[Any]:
        if grid.x0_m == bad:
            raise ServiceError("Earth Engine is down. Wait.")
        return sky.fetch(sensor, scene_id, grid)

    if is_killed:
        # A shard is whole, its index is not: what a process that dies in between leaves.
        with pytest.raises(ServiceError):
            chips.update(tiles, scene_table("B"), photos, strict, root, fetch, **FEW, retry_now=True)
        index = (root / "chips.parquet").read_bytes()
        with ShardWriter(root, "chips-00004.tar") as shard:
            shard.add("left-over.tif", b"of a process that died")
        assert (root / "chips.parquet").read_bytes() == index
    again, _ = chips.update(tiles, scene_table("B"), photos, strict, root, sky.fetch, **FEW, retry_now=True)
    assert {name.rpartition("-")[2] for name in again["shard"].to_pylist()} == {
        f"0000{n}.tar" for n in (3, 4, 5)
    }
    after = snapshot_of(root)
    assert all(after[name] == content for name, content in before.items() if name.endswith(".tar"))
    assert len([name for name in after if name.endswith(".tar")]) == 2 * 6
    for row in first.to_pylist():
        content = read_member(root, row["shard"], row["offset"], row["size_bytes"])
        assert hashlib.sha256(content).hexdigest() == row["sha256"]


# --- pixels --------------------------------------------------------------------------------------------------------


def test_nodata_is_zero_in_every_band() -> None:
    array = np.ones((4, 4, 3), np.uint16)
    assert chips.quality(array, SMALL) == chips.Quality(0, None)
    array[1, 2, :2] = 0
    assert chips.quality(array, SMALL).suits(SMALL)
    array[1, 2, 2] = 0
    assert chips.quality(array, SMALL) == chips.Quality(1, None)
    assert not chips.quality(array, SMALL).suits(SMALL)


def test_values_that_are_not_finite_are_no_data() -> None:
    array = np.ones((4, 4, 3), np.float32)
    array[0, 0], array[1, 1, 2], array[2, 2] = np.nan, np.inf, 0
    assert chips.quality(array, SMALL) == chips.Quality(3, None)


def test_the_display_range_is_scaled_and_rounded() -> None:
    values = np.array([0, 1, 5, 6, 1500, 2999, 3000, 3001, 65535], dtype=np.uint16)
    scaled = chips.to_uint8(np.stack([values[None]] * 3, axis=-1), SENTINEL2)
    assert scaled.dtype == np.uint8
    assert scaled[0, :, 0].tolist() == [0, 0, 0, 1, 128, 255, 255, 255, 255]
    plain = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    np.testing.assert_array_equal(chips.to_uint8(plain, NAIP), plain)


def test_unfit_arrays_are_refused() -> None:
    with pytest.raises(DataError, match="display_range"):
        chips.to_uint8(np.ones((2, 2, 3), np.uint16), NAIP)
    with pytest.raises(DataError, match=r"\(3, 2, 2\)"):
        chips.to_uint8(np.ones((3, 2, 2), np.uint8), NAIP)
    with pytest.raises(DataError, match="decoded"):
        chips.decode(b"II*\x00 no")


@given(
    seed=st.integers(0, 2**31), gsd=st.sampled_from([0.6, 1.0, 10.0]), epsg=st.sampled_from([32619, 32756])
)
def test_encoding_is_lossless_and_deterministic(seed: int, gsd: float, epsg: int) -> None:
    generator = np.random.default_rng(seed)
    array = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    grid = Grid.snapped(epsg, float(generator.uniform(2e5, 8e5)), float(generator.uniform(0, 9e6)), gsd, 32)
    content = chips.encode(array, grid)
    assert chips.encode(array, grid) == content
    np.testing.assert_array_equal(chips.decode(content), array)
    np.testing.assert_array_equal(chips.decode_all([content, content]), np.stack([array, array]))
    with MemoryFile(content) as memory, memory.open() as file:
        assert (file.crs.to_epsg(), file.transform) == (epsg, grid.affine)
    assert chips.decode_all([]).shape == (0, 0, 0, 3)


@given(where=st.floats(0.15, 1, exclude_max=True))
def test_a_damaged_chip_is_refused(where: float) -> None:
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    content = bytearray(chips.encode(array, Grid.snapped(32619, 5e5, 4.7e6, 1.0, 32)))
    content[int(where * len(content))] ^= 0x10
    with pytest.raises(DataError, match="materialise its region with `verify: true`"):
        chips.decode(bytes(content))


def test_real_naip_pixels_survive(real_data: Path) -> None:
    with rasterio.open(real_data / "naip_5m_2020.tif") as file:
        array = np.ascontiguousarray(np.moveaxis(file.read([1, 2, 3], window=((0, 448), (0, 448))), 0, -1))
    content = chips.encode(array, Grid.snapped(32614, 487_000.0, 5_208_000.0, 5.0, 448))
    np.testing.assert_array_equal(chips.decode(content), array)
    assert len(content) < 0.75 * array.size

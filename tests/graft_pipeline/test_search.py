"""Search: the nearest tiles of a brute-force comparison, whatever the filters, however the index came about."""

import json
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from upath import UPath

from graft_pipeline import search_index
from graft_pipeline.embeddings import to_column, vectors_of
from graft_pipeline.errors import DataError, InputError
from graft_pipeline.manifests import partition_file, read_table, write_table
from graft_pipeline.purging import purge
from graft_pipeline.schemas import CHIP_EMBEDDINGS, CHIPS, SEARCH_RESULTS
from graft_pipeline.search import Filters, SearchIndex, best, write_hits
from resources.storage import Storage

SENSOR, WIDTH = "naip", 8
#: South-west corners of the regions, and how many tiles each has.
REGIONS = {"N41W072": (41, -72, 50), "N42W071": (42, -71, 70), "N42W072": (42, -72, 1)}
FIRST_DAY, DAYS = date(2015, 3, 1), 9


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of what lies on an object store."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def write_region(
    root: UPath, region: str, vectors: np.ndarray, *, corner: tuple[int, int], model_id: str = "m"
) -> None:
    """Chips and chip embeddings; the last chip failed, and was embedded when it was there."""
    rng = np.random.default_rng(len(vectors))
    count, place = len(vectors), {"sensor": SENSOR, "region": region}
    ids = [f"{SENSOR}-{region}{number:05d}" for number in range(count)]
    embedded = {
        "tile_id": ids,
        "center_lon_deg": corner[1] + rng.random(count),
        "center_lat_deg": corner[0] + rng.random(count),
        "embedding": to_column(vectors),
        "model_id": [model_id] * count,
        "chip_sha256": ids,
    }
    write_table(partition_file(root, CHIP_EMBEDDINGS, **place), pa.table(embedded), CHIP_EMBEDDINGS)
    start = datetime.combine(FIRST_DAY, datetime.min.time(), UTC)
    plain = dict.fromkeys(CHIPS.schema.names) | {
        "attempts": 1,
        "scenes_tried": 1,
        "epsg": 32619,
        "chip_px": 448,
    }
    rows = [
        plain
        | {"tile_id": tile_id, "status": "ok", "scene_id": f"scene {number % 3}", "gsd_m": 1.0, "x0_m": 0.0}
        | {"y0_m": 0.0, "acquired_at_utc": start + timedelta(days=number % DAYS, hours=23 * (number % 2))}
        for number, tile_id in enumerate(ids)
    ]
    if count > 1:
        rows[-1] |= {"status": "failed", "reason": "nodata", "scene_id": None, "acquired_at_utc": None}
    write_table(partition_file(root, CHIPS, **place), pa.Table.from_pylist(rows, schema=CHIPS.schema), CHIPS)


def collect(root: UPath, regions: Iterable[str] = REGIONS, *, seed: int = 0, **options: Any) -> None:
    for region in regions:
        south, west, count = REGIONS[region]
        rng = np.random.default_rng([seed, south, -west])
        vectors = unit(rng.standard_normal((count, WIDTH)))
        write_region(root, region, vectors, corner=(south, west), **options)


def brute_force(root: UPath, vector: np.ndarray, filters: Filters) -> list[tuple[str, str, float]]:
    """(tile, region, score) of what filters admit, best first, from the tables as they lie."""
    found = []
    for file in root.glob(f"chip_embeddings/sensor={SENSOR}/*/chip_embeddings.parquet"):
        region = file.parent.name.partition("=")[2]
        embedded = read_table(file, CHIP_EMBEDDINGS)
        stored = read_table(partition_file(root, CHIPS, sensor=SENSOR, region=region), CHIPS)
        chips = {row["tile_id"]: row for row in stored.to_pylist() if row["status"] == "ok"}
        scores = vectors_of(embedded) @ vector
        for row, score in zip(embedded.drop_columns(["embedding"]).to_pylist(), scores, strict=True):
            chip = chips.get(row["tile_id"])
            if chip is None:
                continue
            day = chip["acquired_at_utc"].date()
            place = shapely.Point(row["center_lon_deg"], row["center_lat_deg"])
            fits = filters.area is None or filters.area.intersects(place)
            fits = fits and (filters.since is None or day >= filters.since)
            if fits and (filters.until is None or day < filters.until):
                found.append((row["tile_id"], region, float(score)))
    return sorted(found, key=lambda hit: -hit[2])


def hits(table: pa.Table) -> list[tuple[str, str, float]]:
    assert table.schema.equals(SEARCH_RESULTS.schema)
    return [(row["tile_id"], row["region"], row["score"]) for row in table.to_pylist()]


def assert_same(found: list[tuple[str, str, float]], true: list[tuple[str, str, float]]) -> None:
    assert [hit[:2] for hit in found] == [hit[:2] for hit in true]
    assert [hit[2] for hit in found] == pytest.approx([hit[2] for hit in true], abs=1e-6)


@pytest.fixture(scope="module", params=[search_index.EXACT_ROWS, 0], ids=["exact", "shortlist"])
def indexed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[UPath, SearchIndex]:
    """An index of few tiles; once with a shortlist, which looks into every list of so few."""
    root = UPath(tmp_path_factory.mktemp("indexed"))
    collect(root)
    search_index.update(root, SENSOR, exact_rows=request.param)
    return root, SearchIndex.open(root, SENSOR)


places = st.tuples(st.floats(-72.5, -69.5), st.floats(40.5, 43.5))
days = st.none() | st.integers(-1, DAYS + 1).map(lambda number: FIRST_DAY + timedelta(days=number))


@given(
    seed=st.integers(0, 2**32),
    top=st.integers(1, 200),
    corners=st.none() | st.lists(places, min_size=3, max_size=6),
    since=days,
    until=days,
)
def test_a_search_finds_what_brute_force_finds(
    indexed: tuple[UPath, SearchIndex],
    seed: int,
    top: int,
    corners: list[tuple[float, float]] | None,
    since: date | None,
    until: date | None,
) -> None:
    root, index = indexed
    area = shapely.convex_hull(shapely.MultiPoint(corners)) if corners else None
    filters = Filters(area, since, until)
    vector = unit(np.random.default_rng(seed).standard_normal(WIDTH))
    true = brute_force(root, vector, filters)
    assert_same(hits(index.search(vector, top, filters)), true[:top])
    assert_same(sorted(hits(index.scores(vector, filters)), key=lambda hit: -hit[2]), true)


def test_a_result_says_where_and_when(indexed: tuple[UPath, SearchIndex]) -> None:
    root, index = indexed
    tile_id = f"{SENSOR}-N42W07100003"
    vector = index.vector_of(tile_id)
    (row,) = index.search(vector, 1).to_pylist()
    embedded = read_table(
        partition_file(root, CHIP_EMBEDDINGS, sensor=SENSOR, region="N42W071"), CHIP_EMBEDDINGS
    )
    known = embedded.to_pylist()[3]
    assert row["score"] == pytest.approx(1)
    assert (row["tile_id"], row["region"], row["scene_id"]) == (tile_id, "N42W071", "scene 0")
    assert [row[name] for name in ("center_lon_deg", "center_lat_deg")] == [
        known[name] for name in ("center_lon_deg", "center_lat_deg")
    ]
    assert row["acquired_at_utc"] == datetime(2015, 3, 4, 23, tzinfo=UTC)


def test_bad_questions_are_refused(indexed: tuple[UPath, SearchIndex]) -> None:
    _, index = indexed
    with pytest.raises(InputError, match="8 dimensions"):
        index.search(np.zeros(9, np.float32), 3)
    with pytest.raises(InputError, match="at least one"):
        index.search(np.zeros(8, np.float32), 0)
    with pytest.raises(InputError, match="no tile 'naip-1'"):
        index.vector_of("naip-1")
    with pytest.raises(DataError, match="encoder m, the query is of other"):
        index.check_model("other")
    index.check_model("m")


@given(values=st.lists(st.integers(0, 5), max_size=30), count=st.integers(1, 40))
def test_equal_scores_come_in_the_order_of_their_tiles(values: list[int], count: int) -> None:
    scores = np.array(values, np.float32)
    assert best(scores, count).tolist() == np.argsort(-scores, kind="stable")[:count].tolist()


def test_updates_region_by_region_make_the_index_that_one_update_makes(
    root: UPath, tmp_path: Path, snapshot_of: Callable[[UPath], dict[str, bytes]]
) -> None:
    first, second, third = REGIONS
    collect(root, [second])
    assert search_index.update(root, SENSOR).made == (second,)
    collect(root, [first])
    assert search_index.update(root, SENSOR).made == (first,)
    collect(root, [third], seed=1)
    collect(root, [second], seed=1)
    made = search_index.update(root, SENSOR)
    # The last tile of a region has no stored chip.
    assert (made.made, made.removed, made.without_chip, made.is_changed) == ((second, third), (), 1, True)
    partition_file(root, CHIP_EMBEDDINGS, sensor=SENSOR, region=first).unlink()
    made = search_index.update(root, SENSOR)
    assert (made.made, made.removed) == ((), (first,))
    assert not search_index.update(root, SENSOR).is_changed
    other = UPath(tmp_path / "at once")
    collect(other, [second, third], seed=1)
    search_index.update(other, SENSOR)
    folders = [search_index.index_folder(some, SENSOR) for some in (root, other)]
    of_each = [{Path(name).name: data for name, data in snapshot_of(folder).items()} for folder in folders]
    assert of_each[0] == of_each[1]


def test_a_shortlist_follows_its_regions(root: UPath) -> None:
    collect(root)
    search_index.update(root, SENSOR, exact_rows=0)
    vector = unit(np.random.default_rng(3).standard_normal(WIDTH))
    for number, region in enumerate(REGIONS, start=2):
        collect(root, [region], seed=number)
        assert search_index.update(root, SENSOR, exact_rows=0).made == (region,)
        index = SearchIndex.open(root, SENSOR)
        assert_same(hits(index.search(vector, 20)), brute_force(root, vector, Filters())[:20])
    partition_file(root, CHIP_EMBEDDINGS, sensor=SENSOR, region="N42W071").unlink()
    search_index.update(root, SENSOR, exact_rows=0)
    index = SearchIndex.open(root, SENSOR)
    assert_same(hits(index.search(vector, 100)), brute_force(root, vector, Filters()))
    # Few enough for each to be scored.
    made = search_index.update(root, SENSOR, exact_rows=50)
    assert made.manifest.shortlist is None
    assert not list(search_index.index_folder(root, SENSOR).glob("*.faiss"))


def test_an_index_that_is_loaded_outlives_an_update(root: UPath) -> None:
    collect(root)
    search_index.update(root, SENSOR, exact_rows=0)
    vector = unit(np.ones(WIDTH))
    loaded, opened = SearchIndex.open(root, SENSOR), SearchIndex.open(root, SENSOR)
    loaded.load()
    answer = hits(SearchIndex.open(root, SENSOR).search(vector, 9))
    collect(root, seed=1)
    search_index.update(root, SENSOR, exact_rows=0)
    # Copies of an object store's files are dropped when the new index is opened.
    assert hits(SearchIndex.open(root, SENSOR).search(vector, 9)) != answer
    assert hits(loaded.search(vector, 9)) == answer
    with pytest.raises(DataError, match="is gone"):
        opened.search(vector, 9)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("exact_rows", [search_index.EXACT_ROWS, 0], ids=["exact", "shortlist"])
def test_a_killed_update_leaves_the_old_index_and_is_completed(
    root: UPath, exact_rows: int, snapshot_of: Callable[[UPath], dict[str, bytes]]
) -> None:
    folder = search_index.index_folder(root, SENSOR)
    collect(root)
    search_index.update(root, SENSOR, exact_rows=exact_rows)
    before, vector = snapshot_of(folder), unit(np.ones(WIDTH))
    answer = hits(SearchIndex.open(root, SENSOR).search(vector, 9))
    collect(root, seed=1)

    def kill(done: int, total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        search_index.update(root, SENSOR, exact_rows=exact_rows, progress=kill)
    between = snapshot_of(folder)
    assert before.items() < between.items()
    old = SearchIndex.open(root, SENSOR)
    assert hits(old.search(vector, 9)) == answer
    assert len(old.stale) == 3
    search_index.update(root, SENSOR, exact_rows=exact_rows)
    finished = snapshot_of(folder)
    made = set(between) - set(before)
    assert {name: finished[name] for name in made} == {name: between[name] for name in made}
    assert not SearchIndex.open(root, SENSOR).stale
    assert not (set(finished) & set(before)) - {name for name in before if name.endswith("index.json")}


def test_what_is_stale_is_said(root: UPath, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match="no search index of naip: materialise"):
        SearchIndex.open(root, SENSOR)
    search_index.update(root, SENSOR)
    with pytest.raises(DataError, match="No tile is in the search index"):
        SearchIndex.open(root, SENSOR)
    collect(root, ["N41W072", "N42W071"])
    search_index.update(root, SENSOR)
    assert SearchIndex.open(root, SENSOR).stale == {}
    assert not caplog.records
    collect(root, ["N41W072"], seed=1)
    collect(root, ["N42W072"])
    partition_file(root, CHIP_EMBEDDINGS, sensor=SENSOR, region="N42W071").unlink()
    assert SearchIndex.open(root, SENSOR).stale == {
        "N41W072": "N41W072: its chips or chip embeddings changed",
        "N42W071": "N42W071: its chip embeddings are gone",
        "N42W072": "N42W072: not indexed yet",
    }
    assert "3 regions are stale" in caplog.text
    search_index.update(root, SENSOR)
    collect(root, ["N42W072"], model_id="new")
    assert SearchIndex.open(root, SENSOR).stale == {"N42W072": "N42W072: embedded anew by encoder new"}


def test_an_index_holds_vectors_of_one_encoder(root: UPath) -> None:
    collect(root, ["N41W072", "N42W071"])
    collect(root, ["N42W072"], model_id="new")
    made = search_index.update(root, SENSOR)
    assert (made.manifest.model_id, list(made.manifest.parts)) == ("m", ["N41W072", "N42W071"])
    assert SearchIndex.open(root, SENSOR).stale == {"N42W072": "N42W072: embedded by encoder new, not m"}
    made = search_index.update(root, SENSOR, model_id="new")
    assert (made.manifest.rows, list(made.manifest.left_out)) == (1, ["N41W072", "N42W071"])
    write_region(root, "N41W072", unit(np.ones((3, 5))), corner=(41, -72), model_id="new")
    with pytest.raises(DataError, match="5 dimensions, elsewhere 8"):
        search_index.update(root, SENSOR, model_id="new")


@pytest.mark.parametrize("exact_rows", [search_index.EXACT_ROWS, 0], ids=["exact", "shortlist"])
def test_a_region_without_chips_has_no_tiles(tmp_path: Path, exact_rows: int) -> None:
    root = UPath(tmp_path)
    collect(root)
    partition_file(root, CHIPS, sensor=SENSOR, region="N42W071").unlink()
    made = search_index.update(root, SENSOR, exact_rows=exact_rows)
    # And the last tile of N41W072.
    assert (made.manifest.rows, made.without_chip) == (50, 71)
    assert not search_index.update(root, SENSOR, exact_rows=exact_rows).is_changed
    index = SearchIndex.open(root, SENSOR)
    assert (index.search(unit(np.ones(WIDTH)), 100).num_rows, index.stale) == (50, {})


def test_a_purged_photo_leaves_the_index(
    tmp_path: Path, snapshot_of: Callable[[UPath], dict[str, bytes]]
) -> None:
    root = UPath(tmp_path / "root")
    collect(root)
    search_index.update(root, SENSOR, exact_rows=0)
    before = SearchIndex.open(root, SENSOR).rows
    purge(Storage(root), ["N42W07100003"], reason="asked", now=datetime(2024, 1, 1, tzinfo=UTC))
    index = SearchIndex.open(root, SENSOR)
    assert (index.rows, index.stale) == (before - 1, {})
    files = snapshot_of(search_index.index_folder(root, SENSOR))
    assert not [name for name, content in files.items() if b"N42W07100003" in content]
    assert sum(name.endswith(".faiss") for name in files) == 1


def test_damage_is_said_and_healed(tmp_path: Path) -> None:
    root = UPath(tmp_path)
    collect(root)
    folder = search_index.index_folder(root, SENSOR)
    made = search_index.update(root, SENSOR)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    part = folder / made.manifest.parts["N42W071"].file
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(DataError, match="delete it and materialise"):
        SearchIndex.open(root, SENSOR).search(np.ones(WIDTH, np.float32), 3)
    part.unlink()
    assert search_index.update(root, SENSOR).made == ("N42W071",)
    search_index.update(root, SENSOR, exact_rows=0)
    (shortlist,) = folder.glob("*.faiss")
    shortlist.write_bytes(shortlist.read_bytes()[:1000])
    with pytest.raises(DataError, match="delete it and materialise"):
        SearchIndex.open(root, SENSOR).search(np.ones(WIDTH, np.float32), 3)
    search_index.update(root, SENSOR)
    (folder / "index.json").write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        SearchIndex.open(root, SENSOR)
    (folder / "index.json").unlink()
    search_index.update(root, SENSOR)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
    content = json.loads(whole["index.json"])
    (folder / "index.json").write_text(json.dumps(content | {"version": 0}))
    with pytest.raises(DataError, match="no search index of naip: materialise"):
        SearchIndex.open(root, SENSOR)
    search_index.refresh(root)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchIndex, np.ndarray]:
    """20,000 tiles in clusters, with a shortlist, and queries: images, and words in a cone of their own."""
    rng = np.random.default_rng(5)
    width, count = 64, 20_000
    spread = np.arange(1, width + 1) ** -0.5
    centers = rng.standard_normal((40, width)) * spread
    cones = unit(rng.standard_normal((2, width)))
    kinds = rng.integers(0, 40, count + 20)
    images = unit(cones[0] + centers[kinds] + 0.7 * rng.standard_normal((count + 20, width)) * spread)
    words = unit(3 * cones[1] + unit(centers[:20]) + 0.5 * unit(rng.standard_normal((20, width))))
    root = UPath(tmp_path_factory.mktemp("clustered"))
    for number, some in enumerate(np.array_split(images[:count], 4)):
        write_region(root, f"N42W07{number}", some, corner=(42, -70 - number))
    search_index.update(root, SENSOR, exact_rows=1000)
    return SearchIndex.open(root, SENSOR), np.concatenate([images[count:], words])


@pytest.mark.parametrize(
    "filters",
    [
        Filters(),
        Filters(area=shapely.box(-71.5, 42, -69.7, 43)),
        Filters(since=FIRST_DAY, until=FIRST_DAY + timedelta(days=1)),
    ],
    ids=["none", "area", "day"],
)
def test_a_shortlist_holds_nearly_all_of_the_nearest(
    clustered: tuple[SearchIndex, np.ndarray], filters: Filters, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graft_pipeline import shortlist

    # As of millions: a twelfth of the lists, not all of so few.
    monkeypatch.setattr(shortlist, "LEAST_PROBED", 1500)
    index, queries = clustered
    recall = []
    for vector in queries:
        true = index.search(vector, 20, filters, is_exact=True)
        found = index.search(vector, 20, filters)
        assert found.num_rows == 20
        recall.append(len(set(true["tile_id"].to_pylist()) & set(found["tile_id"].to_pylist())) / 20)
        admitted = set(index.scores(vector, filters)["tile_id"].to_pylist())
        assert admitted.issuperset(found["tile_id"].to_pylist())
    assert np.mean(recall[:20]) >= 0.95
    assert np.mean(recall[20:]) >= 0.95


def test_an_area_whose_tiles_are_far_from_the_words_is_searched_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ground of one region looks alike, and nothing like what is asked for."""
    from graft_pipeline import shortlist

    monkeypatch.setattr(shortlist, "LEAST_PROBED", 500)
    rng, root = np.random.default_rng(0), UPath(tmp_path)
    kinds = unit(rng.standard_normal((10, 32)))
    for number, kind in enumerate(kinds):
        tiles = unit(kind + 0.1 * rng.standard_normal((1000, 32)))
        write_region(root, f"N42W0{70 + number}", tiles, corner=(42, -70 - number))
    search_index.update(root, SENSOR, exact_rows=500)
    index, half = SearchIndex.open(root, SENSOR), Filters(area=shapely.box(-75, 42, -69, 43))
    for kind in kinds:
        assert index.search(kind, 50, half).num_rows == 50


def test_vectors_stay_on_the_disk(clustered: tuple[SearchIndex, np.ndarray]) -> None:
    index, queries = clustered
    before = pa.total_allocated_bytes()
    index.load()
    held = [index.search(vector, 20, is_exact=True) for vector in queries[:2]]
    assert pa.total_allocated_bytes() - before < 0.05 * index.rows * index.width * 4
    assert held


def test_hits_are_written_as_points(indexed: tuple[UPath, SearchIndex], tmp_path: Path) -> None:
    _, index = indexed
    found = index.search(unit(np.ones(WIDTH)), 5)
    for name, read in (("a.geojson", geopandas.read_file), ("a.parquet", geopandas.read_parquet)):
        write_hits(tmp_path / name, found)
        frame = read(tmp_path / name)
        assert frame["tile_id"].tolist() == found["tile_id"].to_pylist()
        assert frame.crs.to_epsg() == 4326
        assert frame.geometry.x.tolist() == pytest.approx(found["center_lon_deg"].to_pylist(), abs=1e-6)
    assert json.loads((tmp_path / "a.geojson").read_text())["name"] == "a"
    with pytest.raises(InputError, match=r"\.geojson"):
        write_hits(tmp_path / "a.shp", found)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.geojson", "a.parquet"]

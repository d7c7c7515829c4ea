import importlib
import itertools
import shutil
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from upath import UPath

from graft_pipeline import manifests, training_sets
from graft_pipeline.errors import DataError
from graft_pipeline.imagery import NAIP, SENTINEL2
from graft_pipeline.manifests import partition_file, read_table, write_table
from graft_pipeline.schemas import (
    CHIPS,
    FLICKR_PHOTOS,
    GROUND_EMBEDDINGS,
    GROUND_IMAGES,
    PAIRS,
    TRAINING_PAIRS,
    Dataset,
)

TIME = datetime(2020, 1, 1, tzinfo=UTC)


def vector(photo_id: str) -> list[float]:
    values = np.random.default_rng(int(photo_id)).normal(size=8).astype(np.float32)
    return [float(value) for value in values]


def write_region(
    root: UPath, region: str, pairs: list[tuple[str, str, str]], embedded: list[str], model_id: str = "m"
) -> None:
    """Store a region: (tile, photo, split) pairs, their chips, embeddings of some photos."""
    base = {
        "scene_id": "S",
        "lon_deg": -71.5,
        "lat_deg": 42.5,
        "col_px": 1.5,
        "row_px": 2.5,
        "acquired_at_utc": TIME,
    }
    rows = [
        dict.fromkeys(PAIRS.schema.names)
        | base
        | {"tile_id": tile, "photo_id": photo, "center_photo_id": tile[5:], "split": split}
        for tile, photo, split in pairs
    ]
    table = pa.Table.from_pylist(rows, schema=PAIRS.schema)
    write_table(partition_file(root, PAIRS, sensor="naip", region=region), table, PAIRS)
    chip_rows = [
        dict.fromkeys(CHIPS.schema.names)
        | {"tile_id": tile, "status": "ok", "attempts": 1, "scenes_tried": 1, "shard": "chips-00000.tar"}
        | {"scene_id": "S", "acquired_at_utc": TIME}
        | {"offset": 512 * number, "size_bytes": 100 + number, "sha256": "0"}
        | {"epsg": 32619, "x0_m": 0.0, "y0_m": 0.0, "gsd_m": 1.0, "chip_px": 448}
        for number, tile in enumerate(sorted({tile for tile, _, _ in pairs}))
    ]
    table = pa.Table.from_pylist(chip_rows, schema=CHIPS.schema)
    write_table(partition_file(root, CHIPS, sensor="naip", region=region), table, CHIPS)
    image_rows = [
        dict.fromkeys(GROUND_IMAGES.schema.names)
        | {"photo_id": photo, "status": "ok", "attempts": 1, "sha256": "0"}
        for photo in embedded
    ]
    table = pa.Table.from_pylist(image_rows, schema=GROUND_IMAGES.schema)
    write_table(partition_file(root, GROUND_IMAGES, region=region), table, GROUND_IMAGES)
    vectors = [{"photo_id": photo, "embedding": vector(photo), "model_id": model_id} for photo in embedded]
    table = pa.Table.from_pylist(vectors, schema=GROUND_EMBEDDINGS.schema)
    write_table(partition_file(root, GROUND_EMBEDDINGS, region=region), table, GROUND_EMBEDDINGS)


@pytest.fixture
def stored(root: UPath) -> UPath:
    write_region(
        root,
        "N42W072",
        [
            ("naip-20", "20", "train"),
            ("naip-20", "3", "train"),
            ("naip-7", "7", "guard"),
            ("naip-8", "9", "validation"),
        ],
        ["20", "3", "7", "9", "11"],
    )
    write_region(root, "N42W071", [("naip-100", "100", "train"), ("naip-100", "5", "train")], ["100"])
    write_region(root, "N41W071", [], [])
    return root


def test_a_snapshot_joins_pairs_chips_and_embeddings(stored: UPath) -> None:
    made = training_sets.build_training_set(stored, NAIP)
    assert (made.tiles, made.photos, made.pairs) == (3, 4, 4)
    assert made.pairs_by_split == {"train": 3, "validation": 1}
    assert (made.guard_pairs, made.unembedded_pairs, made.model_id) == (1, 1, "m")
    assert made.regions == ("N42W071", "N42W072")
    assert (
        made.folder == partition_file(stored, TRAINING_PAIRS, sensor="naip", snapshot=made.fingerprint).parent
    )
    table = training_sets.read(made.folder)
    matrix = np.load(made.folder.joinpath("ground_embeddings.npy").open("rb"))
    assert (matrix.dtype, matrix.shape) == (np.float32, (4, 8))
    for row in table.to_pylist():
        np.testing.assert_array_equal(matrix[row["embedding_row"]], np.float32(vector(row["photo_id"])))
        chips = read_table(stored / row["chip_shard"].replace("chips-00000.tar", "chips.parquet"), CHIPS)
        assert chips is not None
        (chip,) = [chip for chip in chips.to_pylist() if chip["tile_id"] == row["tile_id"]]
        assert (row["chip_offset"], row["chip_size_bytes"]) == (chip["offset"], chip["size_bytes"])
    order = [table["photo_id"].to_pylist()[table["embedding_row"].to_pylist().index(n)] for n in range(4)]
    assert order == ["100", "20", "3", "9"], "by region and photo"
    assert table["split"].to_pylist() == ["train", "train", "train", "validation"]
    assert set(table["model_id"].to_pylist()) == {"m"}
    assert manifests.conform(table, TRAINING_PAIRS).equals(table)
    files = {file.name for file in made.folder.iterdir()}
    assert files == {"training_set.parquet", "ground_embeddings.npy"}
    assert {file.name for file in made.folder.parent.iterdir()} == {made.folder.name, training_sets.LATEST}


def test_same_content_same_snapshot_untouched(stored: UPath, snapshot_of: Any) -> None:
    made = training_sets.build_training_set(stored, NAIP)
    before = snapshot_of(stored)
    again = training_sets.build_training_set(stored, NAIP)
    assert (made.is_new, again.is_new) == (True, False)
    assert again.fingerprint == made.fingerprint
    assert snapshot_of(stored) == before


def test_other_content_another_snapshot_and_the_latest_is_known(stored: UPath) -> None:
    first = training_sets.build_training_set(stored, NAIP)
    assert training_sets.latest(stored, NAIP) == first.folder
    write_region(stored, "N41W071", [("naip-1", "1", "train")], ["1"])
    second = training_sets.build_training_set(stored, NAIP)
    assert second.fingerprint != first.fingerprint
    assert training_sets.latest(stored, NAIP) == second.folder
    assert training_sets.read(first.folder).num_rows == 4, "snapshots stay"
    some = training_sets.build_training_set(stored, NAIP, ["N42W072"])
    assert some.regions == ("N42W072",)
    assert len({first.fingerprint, second.fingerprint, some.fingerprint}) == 3


def test_an_embedding_that_changes_changes_the_snapshot(stored: UPath) -> None:
    first = training_sets.build_training_set(stored, NAIP)
    path = partition_file(stored, GROUND_EMBEDDINGS, region="N42W071")
    row = {"photo_id": "100", "embedding": vector("101"), "model_id": "m"}
    write_table(path, pa.Table.from_pylist([row], schema=GROUND_EMBEDDINGS.schema), GROUND_EMBEDDINGS)
    assert training_sets.build_training_set(stored, NAIP).fingerprint != first.fingerprint


def changed(root: UPath, dataset: Dataset, column: str, value: Any, key: str, **place: str) -> None:
    """Store a table with another value in the row of a key."""
    path = partition_file(root, dataset, **place)
    table = read_table(path, dataset)
    assert table is not None
    rows = [row | ({column: value} if row[dataset.key[0]] == key else {}) for row in table.to_pylist()]
    assert write_table(path, pa.Table.from_pylist(rows, schema=dataset.schema), dataset)


@pytest.mark.parametrize(
    ("dataset", "column", "value", "key"),
    [
        (GROUND_IMAGES, "sha256", "1", "20"),
        (CHIPS, "sha256", "1", "naip-20"),
        (CHIPS, "scene_id", "T", "naip-20"),
        (CHIPS, "acquired_at_utc", TIME + timedelta(days=1), "naip-20"),
        (CHIPS, "offset", 1024, "naip-20"),
        (PAIRS, "col_px", 1.75, "naip-20"),
        (PAIRS, "split", "validation", "naip-20"),
    ],
)
def test_the_fingerprint_covers_rows_photos_and_scenes(
    stored: UPath, dataset: Dataset, column: str, value: Any, key: str
) -> None:
    first = training_sets.build_training_set(stored, NAIP)
    place = {"region": "N42W072"} | ({"sensor": "naip"} if "sensor" in dataset.partitions else {})
    changed(stored, dataset, column, value, key, **place)
    assert training_sets.build_training_set(stored, NAIP).fingerprint != first.fingerprint


def test_what_no_pair_uses_does_not_count(stored: UPath) -> None:
    first = training_sets.build_training_set(stored, NAIP)
    changed(stored, GROUND_IMAGES, "sha256", "1", "11", region="N42W072")
    changed(stored, CHIPS, "sha256", "1", "naip-7", region="N42W072", sensor="naip")
    assert training_sets.build_training_set(stored, NAIP).fingerprint == first.fingerprint


def test_another_version_of_the_code_makes_another_snapshot(
    stored: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = training_sets.build_training_set(stored, NAIP)
    source = Path(training_sets.__file__).read_text()
    (tmp_path / "training_sets_of_tomorrow.py").write_text(f"{source}\n# Changed.\n")
    monkeypatch.syspath_prepend(tmp_path)
    tomorrow = importlib.import_module("training_sets_of_tomorrow")
    monkeypatch.delitem(sys.modules, tomorrow.__name__)
    assert tomorrow.build_training_set(stored, NAIP).fingerprint != first.fingerprint


def test_same_regions_elsewhere_give_the_same_bytes(stored: UPath, tmp_path: Path) -> None:
    made = training_sets.build_training_set(stored, NAIP)
    elsewhere = UPath(tmp_path / "elsewhere")
    for dataset in (PAIRS, CHIPS, GROUND_IMAGES, GROUND_EMBEDDINGS):
        for file in stored.joinpath(dataset.name).rglob("*.parquet"):
            manifests.write_bytes_atomic(
                elsewhere / str(file.path).removeprefix(stored.path).lstrip("/"), file.read_bytes()
            )
    again = training_sets.build_training_set(elsewhere, NAIP)
    assert again.fingerprint == made.fingerprint
    for name in ("training_set.parquet", "ground_embeddings.npy"):
        assert (again.folder / name).read_bytes() == (made.folder / name).read_bytes()


def test_a_killed_build_leaves_nothing_that_counts(stored: UPath, tmp_path: Path) -> None:
    made = training_sets.build_training_set(stored, NAIP)
    if not manifests.is_local(stored):
        # As a put cut off before the table: the snapshot is not complete.
        (made.folder / "training_set.parquet").unlink()
        assert training_sets.build_training_set(stored, NAIP).is_new
        return
    whole = {
        name: (made.folder / name).read_bytes() for name in ("training_set.parquet", training_sets.EMBEDDINGS)
    }
    shutil.rmtree(str(made.folder))
    leftover = Path(str(made.folder.parent)) / ".ground_embeddings.npy.abc.partial"
    leftover.write_bytes(b"half")
    again = training_sets.build_training_set(stored, NAIP)
    assert {name: (again.folder / name).read_bytes() for name in whole} == whole
    assert not leftover.exists()


def write_photo(make_photos: Any, root: UPath, region: str, photo_id: str, **values: Any) -> None:
    table = make_photos([{"photo_id": photo_id, **values}])
    write_table(partition_file(root, FLICKR_PHOTOS, region=region), table, FLICKR_PHOTOS)


OLD, NEW = TIME, TIME + timedelta(days=1)
MOVED = {"status": "rejected", "reason": "moved"}


@pytest.mark.parametrize(
    ("in_west", "in_east", "place"),
    [
        ({"updated_at_utc": NEW}, {"updated_at_utc": OLD}, "N42W072"),
        ({"updated_at_utc": OLD}, {"updated_at_utc": NEW}, "N41W071"),
        # Its new region rejects it: its old place is wrong all the same.
        ({"updated_at_utc": OLD}, {"updated_at_utc": NEW, "status": "rejected"}, "N41W071"),
        ({"updated_at_utc": NEW} | MOVED, {"updated_at_utc": NEW}, "N41W071"),
        ({}, {"updated_at_utc": OLD} | MOVED, "N42W072"),
        ({}, {}, "N42W072"),
    ],
)
def test_a_photo_that_moved_is_used_where_it_lies_now(
    stored: UPath,
    make_photos: Any,
    in_west: dict[str, Any],
    in_east: dict[str, Any],
    place: str,
) -> None:
    """Photo 20 is paired in two regions: as the centre of a tile with another photo, and of one with itself."""
    alone = training_sets.build_training_set(stored, NAIP)
    write_region(stored, "N41W071", [("naip-20", "20", "validation"), ("naip-30", "20", "train")], ["20"])
    write_photo(make_photos, stored, "N42W072", "20", **in_west)
    write_photo(make_photos, stored, "N41W071", "20", **in_east)
    made = training_sets.build_training_set(stored, NAIP)
    table = training_sets.read(made.folder)
    pairs = [tuple(row.values()) for row in table.select(["region", "tile_id", "photo_id"]).to_pylist()]
    if place == "N42W072":
        assert made.moved_pairs == 2
        assert table.equals(training_sets.read(alone.folder))
    else:
        assert made.moved_pairs == 2
        assert {pair for pair in pairs if pair[0] != "N42W071"} == {
            ("N41W071", "naip-20", "20"),
            ("N41W071", "naip-30", "20"),
            ("N42W072", "naip-8", "9"),
        }
    assert made.tiles == len({tile for _, tile, _ in pairs})
    assert len({(tile, photo) for _, tile, photo in pairs}) == len(pairs)
    assert training_sets.build_training_set(stored, NAIP).fingerprint == made.fingerprint


def test_a_photo_that_moved_is_no_centre_of_others_where_it_was(stored: UPath, make_photos: Any) -> None:
    """Its old region knows that it is gone and pairs it no more; its tile stays there."""
    write_region(stored, "N41W071", [("naip-20", "20", "train")], ["20"])
    write_region(stored, "N42W072", [("naip-20", "3", "train"), ("naip-8", "9", "validation")], ["3", "9"])
    write_photo(make_photos, stored, "N42W072", "20", **MOVED)
    write_photo(make_photos, stored, "N41W071", "20")
    made = training_sets.build_training_set(stored, NAIP)
    assert (made.moved_pairs, made.pairs, made.tiles) == (1, 3, 3)


def test_embeddings_of_several_widths_are_refused(stored: UPath) -> None:
    path = partition_file(stored, GROUND_EMBEDDINGS, region="N42W071")
    row = {"photo_id": "100", "embedding": vector("100")[:4], "model_id": "m"}
    write_table(path, pa.Table.from_pylist([row], schema=GROUND_EMBEDDINGS.schema), GROUND_EMBEDDINGS)
    with pytest.raises(DataError, match="wide: materialise"):
        training_sets.build_training_set(stored, NAIP)


def scanned(file: Path, condition: str) -> tuple[int, int, int]:
    """Row groups that DuckDB reads for a condition, of how many, and the rows it finds."""
    connection = duckdb.connect()
    query = f"SELECT * FROM read_parquet('{file}') WHERE {condition}"
    plan = connection.sql(f"EXPLAIN ANALYZE {query}").fetchall()[0][1]
    read, groups = plan.partition("Row Groups Scanned:")[2].partition("│")[0].split("/")
    return int(read), int(groups), len(connection.sql(query).fetchall())


def test_queries_read_few_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "ROW_GROUP_ROWS", 100)
    root = UPath(tmp_path)
    regions = [f"N4{number}W071" for number in range(8)]
    for number, region in enumerate(regions):
        # Photos are numbered by time: those of all regions interleave.
        photos = [f"{10_000 + 8 * photo + number}" for photo in range(120)]
        pairs = [
            (f"naip-{photo}", photo, "validation" if place % 10 == 0 else "train")
            for place, photo in enumerate(photos)
        ]
        write_region(root, region, pairs, photos)
    made = training_sets.build_training_set(root, NAIP)
    file = Path(str(made.folder)) / "training_set.parquet"
    assert scanned(file, "split = 'validation'") == (2, 10, 96)
    read, groups, rows = scanned(file, "region = 'N43W071'")
    assert (groups, rows) == (10, 120)
    assert read <= 4
    for column, value in (("tile_id", "naip-10403"), ("photo_id", "10403")):
        read, _, rows = scanned(file, f"{column} = '{value}'")
        assert rows == 1
        assert read <= 2, "one, and rarely one more that a Bloom filter lets through"
    # A region's own pairs are sorted by tile.
    pairs_file = Path(str(partition_file(root, PAIRS, sensor="naip", region="N43W071")))
    assert scanned(pairs_file, "tile_id = 'naip-10403'")[::2] == (1, 1)


def test_pieces_do_not_change_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "ROW_GROUP_ROWS", 7)
    rows = [
        dict.fromkeys(TRAINING_PAIRS.schema.names, 0)
        | {
            "tile_id": f"naip-{number:02d}",
            "photo_id": "1",
            "region": "R",
            "split": "train",
            "chip_shard": "s",
            "model_id": "m",
        }
        for number in range(30)
    ]
    table = pa.Table.from_pylist(rows, schema=TRAINING_PAIRS.schema)
    contents = []
    for cuts in ([0, 30], [0, 1, 2, 15, 15, 30], [0, 7, 14, 29, 30]):
        path = tmp_path / "file.parquet"
        with manifests.TableWriter(path, TRAINING_PAIRS) as writer:
            for start, end in itertools.pairwise(cuts):
                writer.write(table.slice(start, end - start))
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] == contents[2]
    read = read_table(path, TRAINING_PAIRS)
    assert read is not None
    assert read.equals(table)
    with manifests.TableWriter(path, TRAINING_PAIRS) as writer:
        writer.write(table.slice(5, 5))
        with pytest.raises(DataError, match="not sorted"):
            writer.write(table.slice(9, 5))


def test_embeddings_of_two_models_are_not_mixed(stored: UPath) -> None:
    write_region(stored, "N41W071", [("naip-1", "1", "train")], ["1"], model_id="other")
    with pytest.raises(DataError, match="several foundation models"):
        training_sets.build_training_set(stored, NAIP)


def test_nothing_to_train_with_is_said(stored: UPath) -> None:
    with pytest.raises(DataError, match="materialise pairs"):
        training_sets.build_training_set(stored, SENTINEL2)
    with pytest.raises(DataError, match="materialise training_set"):
        training_sets.latest(stored, NAIP)
    with pytest.raises(DataError, match="materialise training_set"):
        training_sets.read(stored / "nowhere")


def test_pairs_without_their_chip_are_refused(stored: UPath) -> None:
    path = partition_file(stored, CHIPS, sensor="naip", region="N42W072")
    chips = read_table(path, CHIPS)
    assert chips is not None
    write_table(path, chips.slice(0, 1), CHIPS)
    with pytest.raises(DataError, match="no stored chip"):
        training_sets.build_training_set(stored, NAIP)

import errno
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from upath import UPath

from graft_pipeline import manifests, trace
from graft_pipeline.errors import DataError, ServiceError
from graft_pipeline.schemas import (
    CHIP_EMBEDDINGS,
    DATASETS,
    FLICKR_PHOTOS,
    OUTDOOR_PHOTOS,
    REGIONS,
    SEARCH_LOCATIONS,
)

ROWS = [
    {"location_id": 1, "lon_deg": -71.5, "lat_deg": 42.5, "radius_km": 2.0},
    {"location_id": 0, "lon_deg": -71.25, "lat_deg": 42.75, "radius_km": 2.0},
]


def locations(rows: list[dict[str, Any]] = ROWS) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SEARCH_LOCATIONS.schema)


def test_write_read_rewrite(root: UPath) -> None:
    path = manifests.partition_file(root, SEARCH_LOCATIONS, region="N42W072")
    assert manifests.read_table(path, SEARCH_LOCATIONS) is None
    assert manifests.write_table(path, locations(), SEARCH_LOCATIONS)
    table = manifests.read_table(path, SEARCH_LOCATIONS)
    assert table is not None
    assert table.schema.equals(SEARCH_LOCATIONS.schema, check_metadata=True)
    assert table["location_id"].to_pylist() == [0, 1]
    assert not manifests.write_table(path, locations(ROWS[::-1]), SEARCH_LOCATIONS), "same rows"
    assert manifests.write_table(path, locations(ROWS[:1]), SEARCH_LOCATIONS)
    again = manifests.read_table(path, SEARCH_LOCATIONS)
    assert again is not None
    assert again.num_rows == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing is left beside it"


def test_unchanged_content_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    manifests.write_table(path, locations(), SEARCH_LOCATIONS)
    before = path.stat()
    assert not manifests.write_table(path, locations(), SEARCH_LOCATIONS)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_same_rows_same_bytes_whatever_the_chunks() -> None:
    whole = locations()
    chunked = pa.concat_tables([whole.slice(0, 1), whole.slice(1, 1)])
    assert manifests.parquet_bytes(whole) == manifests.parquet_bytes(chunked)


def test_types_are_cast_and_partition_columns_dropped() -> None:
    table = pa.table(
        {
            "region": ["N42W072"],
            "radius_km": pa.array([2], pa.int64()),
            "location_id": pa.array([3], pa.int64()),
            "lat_deg": pa.array([42.5], pa.float32()),
            "lon_deg": [-71.5],
        }
    )
    assert manifests.conform(table, SEARCH_LOCATIONS).schema.equals(SEARCH_LOCATIONS.schema)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["lat_deg"]), "missing columns.*lat_deg"),
        (lambda t: t.append_column("extra", pa.array([1, 2])), "unknown columns.*extra"),
        (lambda t: t.set_column(1, "lon_deg", pa.array([None, 1.0])), "lon_deg"),
        (lambda t: t.set_column(1, "lon_deg", pa.array(["east", "west"])), "lon_deg"),
        (lambda t: t.set_column(0, "location_id", pa.array([2**40, 1])), "location_id"),
        (lambda t: pa.concat_tables([t, t]), "repeat a key"),
    ],
)
def test_tables_against_the_schema_are_refused(
    tmp_path: Path, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    plain = pa.table({name: locations()[name] for name in SEARCH_LOCATIONS.schema.names})
    with pytest.raises(DataError, match=message):
        manifests.write_table(tmp_path / "t.parquet", change(plain), SEARCH_LOCATIONS)
    assert not list(tmp_path.iterdir())


def test_a_pending_status_never_reaches_a_file(make_photos: Callable[..., pa.Table]) -> None:
    with pytest.raises(DataError, match="pending"):
        manifests.conform(make_photos([{"status": "pending"}]), FLICKR_PHOTOS)


def test_broken_and_outdated_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 no it is not")
    with pytest.raises(DataError, match="not a Parquet file"):
        manifests.read_table(path, SEARCH_LOCATIONS)
    path.write_bytes(manifests.parquet_bytes(pa.table({"location_id": [1]})))
    with pytest.raises(DataError, match="lacks the columns"):
        manifests.read_table(path, SEARCH_LOCATIONS)


def test_nullable_columns_of_later_versions_are_null(
    tmp_path: Path, make_photos: Callable[..., pa.Table]
) -> None:
    path, photos = tmp_path / "t.parquet", make_photos([{}, {}])
    path.write_bytes(manifests.parquet_bytes(photos.drop_columns(["title", "reason"])))
    read = manifests.read_table(path, FLICKR_PHOTOS)
    assert read is not None
    assert read.schema.equals(FLICKR_PHOTOS.schema)
    assert read.equals(photos)
    some = manifests.read_table(path, FLICKR_PHOTOS, ["photo_id", "title"])
    assert some is not None
    assert some.to_pydict() == {"photo_id": ["1000", "1001"], "title": [None, None]}


def test_a_failing_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half() -> None:
        with manifests.atomic_local_file(path) as partial:
            partial.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ServiceError, match="Disk full"), manifests.atomic_local_file(path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    with manifests.atomic_local_file(tmp_path / "a.tar") as partial:
        partial.write_bytes(b"x")
        leftover = partial.with_name(partial.name.replace("a.tar", "b.tar"))
        leftover.write_bytes(b"half")
    assert manifests.remove_partial_files(tmp_path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


def test_partitions_must_be_named() -> None:
    with pytest.raises(DataError, match="partitioned by"):
        manifests.partition_file(Path("root"), SEARCH_LOCATIONS, sensor="naip")


def test_summarise_counts_statuses_and_reasons(make_photos: Callable[..., pa.Table]) -> None:
    table = make_photos(
        [{}, {"status": "rejected", "reason": "burst"}, {"status": "rejected", "reason": "burst"}]
    )
    counts = {"rows": 3, "ok": 1, "rejected": 2, "failed": 0, "rejected/burst": 2}
    assert manifests.summarise(table) == counts
    assert manifests.summarise(locations()) == {"rows": 2}


def test_duckdb_sees_every_dataset(root: UPath) -> None:
    for key in ("N42W072", "N00E005"):
        path = manifests.partition_file(root, OUTDOOR_PHOTOS, region=key)
        row = {"photo_id": key, "outdoor_score": 0.5, "is_outdoor": True, "classifier_id": "c"}
        manifests.write_table(path, pa.Table.from_pylist([row]), OUTDOOR_PHOTOS)
    regions = {
        "region": "N42W072", "area": "a", "west_deg": -72.0, "south_deg": 42.0, "east_deg": -71.0,
        "north_deg": 43.0, "epsg": 32619, "covered_pct": 1.0,
    }  # fmt: skip
    manifests.write_table(manifests.partition_file(root, REGIONS), pa.Table.from_pylist([regions]), REGIONS)
    with manifests.connect(root) as connection:
        views = {
            name
            for (name,) in connection.sql(
                "SELECT view_name FROM duckdb_views() WHERE NOT internal"
            ).fetchall()
        }
        assert set(DATASETS) <= views
        found = connection.sql("SELECT photo_id, region FROM outdoor_photos ORDER BY 1").fetchall()
        assert found == [("N00E005", "N00E005"), ("N42W072", "N42W072")]
        assert connection.sql("SELECT epsg FROM regions JOIN outdoor_photos USING (region)").fetchall() == [
            (32619,)
        ]
        for dataset in DATASETS.values():
            columns = connection.sql(f"SELECT * FROM {dataset.name} LIMIT 0").columns
            assert columns == [*dataset.schema.names, *dataset.partitions]
        assert connection.sql("SELECT count(*) FROM pairs").fetchall() == [(0,)]


@pytest.mark.parametrize("older", [(), (0,), (1,), (0, 1)])
def test_duckdb_sees_files_of_earlier_versions(root: UPath, older: tuple[int, ...]) -> None:
    for number, key in enumerate(("N00E005", "N42W072")):
        path = manifests.partition_file(root, CHIP_EMBEDDINGS, sensor="naip", region=key)
        row = {
            "tile_id": key, "center_lon_deg": 5.0, "center_lat_deg": 0.0, "embedding": [1.0, 0.0], "model_id": "m",
            "chip_sha256": "0f",
        }  # fmt: skip
        table = manifests.conform(pa.Table.from_pylist([row]), CHIP_EMBEDDINGS)
        whole = table.drop_columns(["chip_sha256"]) if number in older else table
        manifests.write_bytes_atomic(path, manifests.parquet_bytes(whole))
    with manifests.connect(root) as connection:
        view = connection.sql("SELECT * FROM chip_embeddings ORDER BY tile_id")
        assert view.columns == [*CHIP_EMBEDDINGS.schema.names, "sensor", "region"]
        assert [row[-3] for row in view.fetchall()] == [None if n in older else "0f" for n in (0, 1)]
        tables = {name for (name,) in connection.sql("SHOW TABLES").fetchall()}
    assert tables == set(DATASETS)


@pytest.mark.parametrize("name", ["a [1] b", "it's", "q*x", "a=b"])
def test_duckdb_takes_a_root_of_any_name(tmp_path: Path, name: str) -> None:
    root = UPath(tmp_path / name)
    row = {"photo_id": "1", "outdoor_score": 0.5, "is_outdoor": True, "classifier_id": "c"}
    path = manifests.partition_file(root, OUTDOOR_PHOTOS, region="N42W072")
    manifests.write_table(path, pa.Table.from_pylist([row]), OUTDOOR_PHOTOS)
    with manifests.connect(root) as connection:
        view = connection.sql("SELECT * FROM outdoor_photos")
        assert view.columns == [*OUTDOOR_PHOTOS.schema.names, "region"]
        assert view.fetchall() == [("1", 0.5, True, "c", "N42W072")]
        assert trace.select(connection, path, "photo_id", ["1"]) == [row]


def test_a_query_reads_only_what_it_names(root: UPath) -> None:
    path = manifests.partition_file(root, CHIP_EMBEDDINGS, sensor="naip", region="N42W072")
    manifests.write_bytes_atomic(path, b"PAR1 no it is not")
    with manifests.connect(root, manifests.named_in("FROM Pairs JOIN tiles USING (tile_id)")) as connection:
        assert set(connection.sql("SHOW TABLES").fetchall()) == {("pairs",), ("tiles",)}
    assert manifests.named_in("SHOW TABLES") == list(DATASETS.values())
    with pytest.raises(DataError, match=r"(?s)chip_embeddings.*materialise it again"):
        manifests.connect(root, manifests.named_in('SELECT * FROM "chip_embeddings"'))


def test_timestamps_stay_utc(root: UPath, make_photos: Callable[..., pa.Table]) -> None:
    uploaded = datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC)
    path = manifests.partition_file(root, FLICKR_PHOTOS, region="N42W072")
    manifests.write_table(path, make_photos([{"uploaded_at_utc": uploaded}]), FLICKR_PHOTOS)
    table = manifests.read_table(path, FLICKR_PHOTOS)
    assert table is not None
    assert table["uploaded_at_utc"][0].as_py() == uploaded
    with manifests.connect(root) as connection:
        year, hour = connection.sql(
            "SELECT year(uploaded_at_utc), hour(uploaded_at_utc) FROM flickr_photos"
        ).fetchall()[0]
    assert (year, hour) == (2020, 3)

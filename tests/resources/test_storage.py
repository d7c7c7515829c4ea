import errno
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from graft_pipeline import schemas
from graft_pipeline.errors import DataError, InputError, ServiceError, SettingsError
from graft_pipeline.settings import Settings
from resources.storage import Storage

REGION = "N42W072"


def locations(*numbers):
    rows = [
        {"location_id": n, "lon_deg": -71.5, "lat_deg": 42.0 + n / 100, "radius_km": 2.0} for n in numbers
    ]
    return pa.Table.from_pylist(rows, schema=schemas.SEARCH_LOCATIONS.schema)


@pytest.fixture(params=["folder", "file", "memory"])
def storage(request, tmp_path):
    if request.param == "memory":
        return Storage(f"memory://{tmp_path.name}-{request.node.name.partition('[')[0]}")
    return Storage(str(tmp_path / "root") if request.param == "folder" else (tmp_path / "root").as_uri())


def test_write_read_rewrite(storage):
    assert storage.read(schemas.SEARCH_LOCATIONS, region=REGION).num_rows == 0
    assert not storage.has(schemas.SEARCH_LOCATIONS, region=REGION)
    assert storage.write(schemas.SEARCH_LOCATIONS, locations(2, 1), region=REGION)
    assert storage.has(schemas.SEARCH_LOCATIONS, region=REGION)
    table = storage.read(schemas.SEARCH_LOCATIONS, region=REGION)
    assert table.schema.equals(schemas.SEARCH_LOCATIONS.schema)
    assert table["location_id"].to_pylist() == [1, 2]
    assert not storage.write(schemas.SEARCH_LOCATIONS, locations(1, 2), region=REGION)
    assert storage.write(schemas.SEARCH_LOCATIONS, locations(3), region=REGION)
    assert storage.read(schemas.SEARCH_LOCATIONS, region=REGION)["location_id"].to_pylist() == [3]


def test_broken_table_leaves_the_old_file(storage):
    storage.write(schemas.SEARCH_LOCATIONS, locations(1), region=REGION)
    with pytest.raises(DataError):
        storage.write(schemas.SEARCH_LOCATIONS, locations(2, 2), region=REGION)
    assert storage.read(schemas.SEARCH_LOCATIONS, region=REGION)["location_id"].to_pylist() == [1]


def test_every_dataset_has_its_place(storage):
    for dataset in schemas.DATASETS.values():
        values = dict.fromkeys(dataset.partitions, "x")
        assert storage.write(dataset, dataset.empty(), **values)
        hive = [f"{column}=x" for column in dataset.partitions]
        name = dataset.name
        assert storage.file(dataset, **values).parts[-len(hive) - 2 :] == (name, *hive, f"{name}.parquet")
        assert storage.folder(dataset, **values) == storage.file(dataset, **values).parent
        assert storage.partitions(dataset) == [values]


def test_partitions_are_those_with_a_file(storage):
    assert storage.partitions(schemas.SCENES) == []
    for sensor, region in [("naip", "N42W072"), ("sentinel2", "N41W072"), ("naip", "N41W072")]:
        storage.write(schemas.SCENES, schemas.SCENES.empty(), sensor=sensor, region=region)
    empty = storage.folder(schemas.SCENES, sensor="naip", region="N40W072")
    (empty / "other.txt").parent.mkdir(parents=True, exist_ok=True)
    (empty / "other.txt").write_bytes(b"no table")
    assert storage.partitions(schemas.SCENES) == [
        {"sensor": "naip", "region": "N41W072"},
        {"sensor": "naip", "region": "N42W072"},
        {"sensor": "sentinel2", "region": "N41W072"},
    ]
    assert storage.partitions(schemas.SCENES, region="N42W072") == [{"sensor": "naip", "region": "N42W072"}]
    assert storage.partitions(schemas.SCENES, sensor="naip", region="N00E000") == []
    with pytest.raises(InputError, match="year"):
        storage.partitions(schemas.SCENES, year="2020")


@pytest.mark.parametrize("value", ["", "..", "a/b", "../../etc", "a=b", "*", " ", ".hidden", "a\n"])
def test_values_cannot_leave_their_folder(storage, value):
    with pytest.raises(InputError, match="cannot name a folder"):
        storage.file(schemas.SEARCH_LOCATIONS, region=value)
    with pytest.raises(InputError):
        storage.read(schemas.SEARCH_LOCATIONS, region=value)


def test_partition_columns_must_be_given(storage):
    for values in ({}, {"region": "a", "sensor": "b"}, {"sensor": "b"}):
        with pytest.raises(DataError, match="partitioned by"):
            storage.folder(schemas.SEARCH_LOCATIONS, **values)


def test_check_leaves_nothing(storage):
    storage.check()
    assert list(storage.root.glob("*")) == []


def settings_of(**values):
    return Settings(_env_file=None, **values)


def test_a_root_holds_one_worlds_data(storage):
    keys = {"flickr_key": "k", "flickr_secret": "s", "ee_project": "p"}
    planet, other, real = settings_of(), settings_of(planet={"seed": 7}), settings_of(**keys)
    assert storage.planet_seed() is None
    storage.claim(planet)
    storage.claim(settings_of(**keys, world="planet"))
    assert storage.planet_seed() == 0
    for settings, name in ((real, "talks to the real services"), (other, "talks to the planet of seed 7")):
        with pytest.raises(SettingsError, match=f"holds data of the planet of seed 0, .*{name}.*GRAFT_ROOT"):
            storage.claim(settings)
    storage.write(schemas.SEARCH_LOCATIONS, locations(1), region=REGION)
    assert storage.partitions(schemas.SEARCH_LOCATIONS) == [{"region": REGION}]


def test_real_data_is_nobodys_planet(tmp_path):
    storage = Storage(tmp_path)
    storage.claim(settings_of(flickr_key="k", flickr_secret="s", ee_project="p"))
    assert storage.planet_seed() is None
    with pytest.raises(SettingsError, match="holds data of the real services"):
        storage.claim(settings_of())
    for text in ("", "[]", '{"world": "planet"}'):
        (tmp_path / "world.json").write_text(text)
        with pytest.raises(DataError, match="write into it what its data is"):
            storage.planet_seed()


def test_folders(storage):
    assert storage.areas_folder == storage.root / "areas"
    assert storage.models_folder == storage.root / "models"


def test_what_a_killed_writer_left_is_ignored_and_swept(tmp_path):
    storage = Storage(tmp_path)
    folder = storage.folder(schemas.SEARCH_LOCATIONS, region=REGION)
    folder.mkdir(parents=True)
    leftover = folder / ".search_locations.parquet.0123456789ab.partial"
    leftover.write_bytes(b"PAR1 half a file")
    assert storage.read(schemas.SEARCH_LOCATIONS, region=REGION).num_rows == 0
    assert storage.partitions(schemas.SEARCH_LOCATIONS) == []
    storage.write(schemas.SEARCH_LOCATIONS, locations(1), region=REGION)
    assert [path.name for path in folder.iterdir()] == ["search_locations.parquet"]


def test_damaged_file_is_explained(tmp_path):
    storage = Storage(tmp_path)
    storage.write(schemas.SEARCH_LOCATIONS, locations(1), region=REGION)
    file = storage.file(schemas.SEARCH_LOCATIONS, region=REGION)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="delete it"):
        storage.read(schemas.SEARCH_LOCATIONS, region=REGION)


def test_timestamps_and_nested_columns_survive(storage):
    row = {"photo_id": "1", "embedding": [0.5, 0.25], "model_id": "m"}
    table = pa.Table.from_pylist([row], schema=schemas.GROUND_EMBEDDINGS.schema)
    storage.write(schemas.GROUND_EMBEDDINGS, table, region=REGION)
    assert storage.read(schemas.GROUND_EMBEDDINGS, region=REGION).to_pylist() == [row]
    scene = dict.fromkeys(schemas.SCENES.schema.names, 0.0) | {
        "scene_id": "a", "acquired_at_utc": datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC), "crs": "EPSG:26919",
        "footprint_wkb": b"\0",
    }  # fmt: skip
    table = pa.Table.from_pylist([scene], schema=schemas.SCENES.schema)
    storage.write(schemas.SCENES, table, sensor="naip", region=REGION)
    assert storage.read(schemas.SCENES, sensor="naip", region=REGION).to_pylist() == [scene]


def test_relative_roots_do_not_move_with_the_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = Storage("data")
    monkeypatch.chdir("/")
    assert storage.root == Storage(tmp_path / "data").root
    assert str(storage.root) == str(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(Storage("~/data").root) == str(tmp_path / "data")


@pytest.mark.parametrize("root", ["", "  "])
def test_empty_root_is_a_settings_error(root):
    with pytest.raises(SettingsError, match="GRAFT_ROOT"):
        Storage(root)


@pytest.mark.parametrize("root", ["nosuch://bucket/prefix", "gs://bucket/prefix"])
def test_unknown_and_uninstalled_roots_are_explained(root):
    import fsspec

    try:
        fsspec.get_filesystem_class(root.partition(":")[0])
    except (ValueError, ImportError):
        pass
    else:
        pytest.skip("installed here")
    with pytest.raises(SettingsError, match="GRAFT_ROOT"):
        Storage(root).check()


def test_file_as_root_is_explained(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for storage in (Storage(tmp_path / "file"), Storage(tmp_path / "file" / "below")):
        with pytest.raises(SettingsError, match="must be a folder"):
            storage.check()
        with pytest.raises(SettingsError, match="must be a folder"):
            storage.write(schemas.SEARCH_LOCATIONS, locations(1), region=REGION)


def test_unwritable_root_is_explained(tmp_path):
    folder = Path("/sys")
    if os.getuid():
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o500)
    storage = Storage(folder)
    with pytest.raises(SettingsError, match="GRAFT_ROOT"):
        storage.check()
    with pytest.raises(SettingsError, match="GRAFT_ROOT"):
        storage.write(schemas.SEARCH_LOCATIONS, locations(1), region=REGION)


def test_full_disk_is_explained(tmp_path):
    """/dev/full answers each write as a full disk does."""
    storage = Storage(tmp_path)
    with pytest.raises(ServiceError, match=r"Disk full.*free space"), storage.explained():
        Path("/dev/full").write_bytes(b"x")


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.EDQUOT, ServiceError), (errno.EROFS, SettingsError), (errno.EIO, ServiceError)]
)
def test_other_errors_of_the_system_are_explained(tmp_path, code, kind):
    with pytest.raises(kind) as caught, Storage(tmp_path).explained():
        raise OSError(code, os.strerror(code), "some/file")
    assert "some/file" in str(caught.value)


def test_settings_name_the_root(tmp_path):
    storage = Storage.from_settings(Settings(world="planet", root=str(tmp_path)))
    assert str(storage.root) == str(tmp_path)
    assert str(tmp_path) in repr(storage)


def test_killed_writer_leaves_the_old_file(tmp_path):
    """A process that is killed while it writes a larger table."""
    storage = Storage(tmp_path)
    storage.write(schemas.SEARCH_LOCATIONS, locations(1), region=REGION)
    code = (
        "import os, pathlib, sys\n"
        "import pyarrow as pa\n"
        "from graft_pipeline import schemas\n"
        "from resources.storage import Storage\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), 9)\n"
        "rows = [{'location_id': n, 'lon_deg': 0.0, 'lat_deg': 0.0, 'radius_km': 1.0} for n in range(9999)]\n"
        "table = pa.Table.from_pylist(rows, schema=schemas.SEARCH_LOCATIONS.schema)\n"
        "Storage(sys.argv[1]).write(schemas.SEARCH_LOCATIONS, table, region='N42W072')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert storage.read(schemas.SEARCH_LOCATIONS, region=REGION).num_rows == 1
    storage.write(schemas.SEARCH_LOCATIONS, locations(1, 2), region=REGION)
    assert len(list(storage.folder(schemas.SEARCH_LOCATIONS, region=REGION).iterdir())) == 1


def test_a_bucket_shows_at_once_what_other_processes_write(s3_root):
    import boto3

    storage, bucket = Storage(s3_root), boto3.resource("s3").Bucket("graft")
    storage.check()
    assert storage.partitions(schemas.SEARCH_LOCATIONS) == []
    assert not storage.has(schemas.SEARCH_LOCATIONS, region=REGION)
    assert storage.write(schemas.SEARCH_LOCATIONS, locations(1), region=REGION)
    (file,) = bucket.objects.all()
    assert f"s3://graft/{file.key}" == str(storage.file(schemas.SEARCH_LOCATIONS, region=REGION))
    other = file.key.replace(REGION, "N43W072")
    bucket.Object(other).put(Body=file.get()["Body"].read())
    assert storage.partitions(schemas.SEARCH_LOCATIONS) == [{"region": REGION}, {"region": "N43W072"}]
    assert storage.read(schemas.SEARCH_LOCATIONS, region="N43W072").num_rows == 1
    assert not storage.write(schemas.SEARCH_LOCATIONS, locations(1), region="N43W072")


def test_a_missing_bucket_is_named(s3_root):
    with pytest.raises(SettingsError, match=r"s3://nowhere.*a bucket that exists"):
        Storage("s3://nowhere/data").check()


def test_a_bucket_out_of_reach_is_tried_again(s3_root, free_url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", free_url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(ServiceError, match=r"s3://elsewhere.*start the run again"):
        Storage("s3://elsewhere/data").read(schemas.SEARCH_LOCATIONS, region=REGION)

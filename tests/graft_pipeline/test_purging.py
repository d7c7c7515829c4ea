"""A small region, stored as assets store it; then photos of it are purged, undisturbed and with kills."""

import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from graft_pipeline import (
    ablations,
    chips,
    ground_images,
    pairing,
    photos,
    purging,
    sampling,
    schemas,
    training_sets,
)
from graft_pipeline.errors import DataError, InputError
from graft_pipeline.ground_images import FetchedImage
from graft_pipeline.imagery import Sensor
from graft_pipeline.manifests import connect
from graft_pipeline.regions import Region
from graft_pipeline.schemas import (
    CHIP_EMBEDDINGS,
    CHIPS,
    CONCEPT_MAPS,
    DATASETS,
    FLICKR_PHOTOS,
    GROUND_EMBEDDINGS,
    GROUND_IMAGES,
    OSM_LABELS,
    OUTDOOR_PHOTOS,
    PAIRS,
    PURGED_OWNERS,
    PURGED_PHOTOS,
    SCENES,
    TILES,
)
from graft_pipeline.shards import BLANK_NAME, read_member
from graft_pipeline.unfinished import Unfinished
from resources.storage import Storage

NOW = datetime(2024, 5, 6, 7, 8, tzinfo=UTC)
KEYS = ("N42.25W071.75", "N42.25W071.50")
SMALL = Sensor(name="small", collection="X", bands=("R", "G", "B"), gsd_m=10.0, chip_px=32, crop_px=16)
OWNERS = 5


def fetch_image(url: str) -> FetchedImage:
    photo_id = url.rsplit("/")[-1].split("_")[0]
    # The last photo of each region shows what its first shows.
    number = int(photo_id) - 26 if photo_id in ("1026", "2026") else int(photo_id)
    phash = f"{np.random.default_rng(number).integers(2**63):016x}"
    return FetchedImage(f"image {photo_id} ".encode() * 50, 341, 256, phash)


def fetch_chip(_: Sensor, scene_id: str, grid: Any) -> Any:
    generator = np.random.default_rng([int(grid.x0_m), int(grid.y0_m)])
    return generator.integers(1, 256, (grid.height_px, grid.width_px, 3), dtype=np.uint8)


def scene_table() -> pa.Table:
    scene = {"scene_id": "A", "acquired_at_utc": NOW, "cloud_pct": 0.0, "crs": "EPSG:32619"}
    grid = {"x_min_m": 2e5, "y_min_m": 4.6e6, "x_max_m": 4e5, "y_max_m": 4.8e6}
    footprint = {"footprint_wkb": shapely.box(-73, 41, -70, 44).wkb}
    return pa.Table.from_pylist([scene | grid | footprint], schema=SCENES.schema)


def sample(storage: Storage, key: str) -> None:
    """From stored photos, images and scores to pairs; what is there already stays."""
    region, place = Region.parse(key, 0.25), {"sensor": "small", "region": key}
    taken = storage.read(FLICKR_PHOTOS, region=key)
    images, outdoor = storage.read(GROUND_IMAGES, region=key), storage.read(OUTDOOR_PHOTOS, region=key)
    usable = photos.eligible(taken, images, outdoor)
    known = storage.read(TILES, **place)
    tiles = sampling.sample_tiles(usable, region, SMALL, known, validation_fraction=0.01)
    storage.write(TILES, tiles, **place)
    storage.write(SCENES, scene_table(), **place)
    folder = storage.folder(CHIPS, **place)
    made, _ = chips.update(
        tiles, scene_table(), taken, SMALL, folder, fetch_chip,
        concurrency=2, max_attempts=3, shard_size=4, today=date(2024, 1, 1),
    )  # fmt: skip
    storage.write(PAIRS, pairing.make_pairs(tiles, made, usable, region, SMALL, 25), **place)
    rows = [
        {"tile_id": tile["tile_id"], "center_lon_deg": tile["center_lon_deg"], "model_id": "s"}
        | {"center_lat_deg": tile["center_lat_deg"], "embedding": [0.0, 1.0]}
        for tile in tiles.to_pylist()
    ]
    storage.write(CHIP_EMBEDDINGS, pa.Table.from_pylist(rows, schema=CHIP_EMBEDDINGS.schema), **place)
    labels = [{"tile_id": name, "labels": ["lake"], "shares": [1.0]} for name in tiles["tile_id"].to_pylist()]
    storage.write(OSM_LABELS, pa.Table.from_pylist(labels, schema=OSM_LABELS.schema), **place)


def collect(storage: Storage, make_photos: Callable[..., pa.Table]) -> None:
    """Two regions: nine places with three photos each, and one photo that gave way to another of its burst."""
    for number, key in enumerate(KEYS):
        first = 1000 * (number + 1)
        rows = [
            {
                "photo_id": f"{first + n}",
                "owner_id": f"{n % OWNERS}@N00",
                "lon_deg": -71.70 + 0.25 * number + 0.004 * (n // 3) + 0.0002 * (n % 3),
            }
            for n in range(27)
        ]
        burst = {"photo_id": f"{first + 30}", "owner_id": "0@N00", "status": "rejected", "reason": "burst"}
        table = make_photos([*rows, burst | {"duplicate_of": f"{first}"}])
        storage.write(FLICKR_PHOTOS, table, region=key)
        folder = storage.folder(GROUND_IMAGES, region=key)
        images, _ = ground_images.update(
            table, folder, fetch_image, concurrency=2, max_attempts=3, shard_size=8, today=date(2024, 1, 1)
        )
        ids = images.filter(pc.equal(images["status"], "ok"))["photo_id"].to_pylist()
        embedded = [{"photo_id": name, "embedding": [1.0, float(name)], "model_id": "m"} for name in ids]
        storage.write(
            GROUND_EMBEDDINGS, pa.Table.from_pylist(embedded, schema=GROUND_EMBEDDINGS.schema), region=key
        )
        scores = [
            {"photo_id": name, "outdoor_score": 0.9, "is_outdoor": True, "classifier_id": "c"} for name in ids
        ]
        storage.write(OUTDOOR_PHOTOS, pa.Table.from_pylist(scores, schema=OUTDOOR_PHOTOS.schema), region=key)
        sample(storage, key)
    training_sets.build_training_set(storage.root, SMALL)
    tiles = pa.concat_tables([storage.read(TILES, **place) for place in storage.partitions(TILES)])
    maps = [
        {"concept": "lake", "cell_id": tile_id, "best_tile_id": tile_id, "outline_wkb": b""}
        | dict.fromkeys(("center_lon_deg", "center_lat_deg", "share", "mean_score", "mean_contrast"), 0.5)
        | {"tiles": 1, "hits": 1, "threshold": 1.0, "best_score": 0.5}
        for tile_id in tiles["tile_id"].to_pylist()
    ]
    storage.write(CONCEPT_MAPS, pa.Table.from_pylist(maps, schema=CONCEPT_MAPS.schema), sensor="small")
    (storage.folder(CONCEPT_MAPS, sensor="small") / "concept_maps.html").write_text("pictures")


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory, make_photos: Callable[..., pa.Table]) -> Path:
    """A storage root; copied by tests, never changed."""
    folder = tmp_path_factory.mktemp("collected")
    collect(Storage(folder), make_photos)
    return folder


@pytest.fixture
def copy(collected: Path, tmp_path: Path) -> Callable[[], Storage]:
    """Makes copies of the storage."""
    number = 0

    def make() -> Storage:
        nonlocal number
        number += 1
        return Storage(shutil.copytree(collected, tmp_path / f"copy-{number}"))

    return make


def mentions(storage: Storage, *photo_ids: str) -> list[str]:
    """Datasets and shards that name any of some photos, the list of purged ones aside."""
    pattern = rf"\b({'|'.join(photo_ids)})\b"
    found = []
    with closing(connect(storage.root)) as database:
        for dataset in DATASETS.values():
            # Digits of a hash may spell an id.
            names = {field.name for field in dataset.schema if pa.types.is_string(field.type)}
            texts = sorted(names - {"sha256", "phash"})
            if dataset is PURGED_PHOTOS or not texts:
                continue
            columns = " || ' ' || ".join(f"coalesce({name}, '')" for name in texts)
            query = f"SELECT count(*) FROM {dataset.name} WHERE regexp_matches({columns}, '{pattern}')"
            found += [dataset.name] if database.execute(query).fetchall()[0][0] else []
    for shard in storage.root.rglob("*.tar"):
        content = shard.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            text = " ".join(tar.getnames()) + str(re.findall(rb"image \d+", content))
        found += [str(shard)] if re.search(pattern, text) else []
    return found


def check_what_is_left(storage: Storage) -> None:
    """Every row that says where content lies is right."""
    for dataset in (GROUND_IMAGES, CHIPS):
        for place in storage.partitions(dataset):
            folder = storage.folder(dataset, **place)
            for row in storage.read(dataset, **place).to_pylist():
                if row["shard"] is None:
                    continue
                content = read_member(folder, row["shard"], row["offset"], row["size_bytes"])
                key = row[dataset.key[0]]
                if dataset is GROUND_IMAGES:
                    assert content == f"image {key} ".encode() * 50
                else:
                    assert chips.decode(content).shape == (32, 32, 3)
            assert not list(folder.glob(".*"))


def purge(storage: Storage, *photo_ids: str, owners: tuple[str, ...] = (), **options: Any) -> Any:
    return purging.purge(storage, photo_ids, owners, reason="asked", now=NOW, **options)


def test_a_purged_photo_is_nowhere_and_all_else_is_as_it_was(copy: Callable[[], Storage]) -> None:
    storage = copy()
    latest = training_sets.latest(storage.root, SMALL)
    before = {
        (dataset.name, *place.values()): storage.read(dataset, **place)
        for dataset in DATASETS.values()
        if "region" in dataset.partitions
        for place in storage.partitions(dataset)
    }
    # A centre, another photo of a tile, and one that Flickr is yet to find.
    centre, other = "1003", "1007"
    assert f"small-{centre}" in before[TILES.name, "small", KEYS[0]]["tile_id"].to_pylist()
    assert f"small-{other}" not in before[TILES.name, "small", KEYS[0]]["tile_id"].to_pylist()
    assert mentions(storage, centre)
    seen: list[tuple[int, int]] = []
    report = purge(storage, centre, other, "777", progress=lambda *at: seen.append(at))
    assert (report.photos, report.owners, report.regions, report.training_sets) == (3, 0, 1, 1)
    expected = {"flickr_photos": 2, "ground_images": 2, "ground_embeddings": 2, "outdoor_photos": 2}
    assert report.rows == {
        **expected,
        "tiles": 1,
        "chips": 1,
        "chip_embeddings": 1,
        "pairs": 4,
        "osm_labels": 1,
    }
    assert seen == [(1, 1)]
    assert not mentions(storage, centre, other)
    assert not list(storage.folder(CONCEPT_MAPS, sensor="small").iterdir())
    assert not latest.exists()
    with pytest.raises(DataError, match="materialise training_set"):
        training_sets.latest(storage.root, SMALL)
    check_what_is_left(storage)
    for (name, *values), table in before.items():
        dataset = DATASETS[name]
        rows = storage.read(dataset, **dict(zip(dataset.partitions, values, strict=True))).to_pylist()
        kept = [row for row in table.to_pylist() if not ({centre, other} & ids_of(row))]
        assert rows == kept
    assert storage.read(PURGED_PHOTOS).to_pylist() == [
        {"photo_id": photo_id, "reason": "asked", "purged_at_utc": NOW} for photo_id in (centre, other, "777")
    ]
    made = training_sets.build_training_set(storage.root, SMALL)
    table = training_sets.read(made.folder)
    assert table.num_rows
    assert not {centre, other} & set(table["photo_id"].to_pylist())
    assert not mentions(storage, centre)


def ids_of(row: dict[str, Any]) -> set[str]:
    """Photos that a row names as its own."""
    tile = str(row.get("tile_id") or "").removeprefix("small-")
    return {tile, str(row.get("photo_id")), str(row.get("center_photo_id"))}


def test_every_dataset_that_names_photos_is_looked_into() -> None:
    of_photos = [
        value
        for value in vars(schemas).values()
        if isinstance(value, schemas.Dataset)
        and {"photo_id", "tile_id"} & set(value.schema.names)
        # What a search answers lies nowhere.
        and value is not schemas.SEARCH_RESULTS
    ]
    assert len(of_photos) > 10
    assert not [dataset.name for dataset in of_photos if dataset.name not in DATASETS]
    # A tile's id starts with its sensor.
    assert all("sensor" in value.partitions for value in of_photos if "tile_id" in value.schema.names)


def test_a_dry_run_counts_the_same_and_changes_nothing(
    copy: Callable[[], Storage], snapshot_of: Callable[[UPath], dict[str, bytes]]
) -> None:
    storage = copy()
    files = snapshot_of(storage.root)
    planned = purge(storage, "1003", owners=("1@N00",), dry_run=True)
    assert snapshot_of(storage.root) == files
    assert purge(storage, "1003", owners=("1@N00",)) == planned
    assert planned.rows["flickr_photos"] > 2
    again = purge(storage, "1003", owners=("1@N00",))
    assert (again.photos, again.owners, again.regions, sum(again.rows.values())) == (0, 0, 0, 0)


def test_all_photos_of_an_owner_go_and_later_ones_do_not_come(
    copy: Callable[[], Storage], make_photos: Callable[..., pa.Table]
) -> None:
    storage = copy()
    report = purge(storage, owners=("2@N00",))
    assert report.regions == 2
    for key in KEYS:
        assert "2@N00" not in storage.read(FLICKR_PHOTOS, region=key)["owner_id"].to_pylist()
    assert storage.read(PURGED_OWNERS)["owner_id"].to_pylist() == ["2@N00"]
    found = make_photos(
        [
            {"photo_id": "1002", "owner_id": "9@N00"},
            {"photo_id": "50", "owner_id": "2@N00"},
            {"photo_id": "51"},
        ]
    )
    wanted = purging.keep_out(found, storage.read(PURGED_PHOTOS), storage.read(PURGED_OWNERS))
    assert wanted["photo_id"].to_pylist() == ["51"]
    nobody = purging.keep_out(found, PURGED_PHOTOS.empty(), PURGED_OWNERS.empty())
    assert nobody.equals(found)


def test_duplicates_of_a_purged_photo_stay_out_without_its_name(copy: Callable[[], Storage]) -> None:
    storage = copy()
    images = storage.read(GROUND_IMAGES, region=KEYS[0])
    assert images.filter(pc.equal(images["photo_id"], "1026"))["duplicate_of"].to_pylist() == ["1000"]
    purge(storage, "1000")
    assert not mentions(storage, "1000")
    for dataset, photo_id in ((FLICKR_PHOTOS, "1030"), (GROUND_IMAGES, "1026")):
        table = storage.read(dataset, region=KEYS[0])
        (row,) = table.filter(pc.equal(table["photo_id"], photo_id)).to_pylist()
        assert (row["status"], row["duplicate_of"]) == ("rejected", None)
        assert row["reason"] in ("burst", "near_duplicate")


def test_the_ground_of_a_purged_centre_gets_another_tile(copy: Callable[[], Storage]) -> None:
    storage = copy()
    place = {"sensor": "small", "region": KEYS[0]}
    before = storage.read(TILES, **place)["tile_id"].to_pylist()
    purge(storage, "1003")
    sample(storage, KEYS[0])
    after = storage.read(TILES, **place)["tile_id"].to_pylist()
    assert after == [*(name for name in before if name != "small-1003"), "small-1004"]
    pairs = storage.read(PAIRS, **place)
    assert set(pairs.filter(pc.equal(pairs["tile_id"], "small-1004"))["photo_id"].to_pylist()) == {
        "1004",
        "1005",
    }
    check_what_is_left(storage)


def test_what_interrupted_runs_left_goes_too(copy: Callable[[], Storage]) -> None:
    storage = copy()
    images = storage.folder(GROUND_IMAGES, region=KEYS[0])
    Unfinished(images).keep("1003", "url", {}, b"bytes of 1003")
    Unfinished(images).keep("1004", "url", {}, b"bytes of 1004")
    search = storage.folder(FLICKR_PHOTOS, region=KEYS[1])
    Unfinished(search).keep("location-7", "search", {"photos": ["1003"]})
    (storage.root / "training_set" / "sensor=small" / "snapshot=half").mkdir()
    (storage.root / "training_set" / "sensor=small" / "snapshot=half" / "ground_embeddings.npy").touch()
    (images / ".images-00000.tar.0a.partial").write_bytes(b"image 1003")
    # Of first writes, where no table is yet, and of tables that are not replaced.
    first = storage.folder(PAIRS, sensor="other", region=KEYS[0])
    for folder in (first, storage.root / "training_set" / "sensor=small", storage.root / "search_index"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".table.parquet.0a.partial").write_bytes(b"of 1003")
    (storage.folder(OUTDOOR_PHOTOS, region=KEYS[1]) / ".outdoor.0a.partial").write_bytes(b"of 1003")
    purge(storage, "1003")
    left = [file.read_bytes() for file in storage.root.rglob("*") if file.is_file()]
    assert not [content for content in left if b"bytes of 1003" in content or b'["1003"]' in content]
    assert [content for content in left if b"bytes of 1004" in content]
    assert not list(storage.root.rglob("*half*"))
    assert not list(storage.root.rglob("*.partial"))


class KilledError(Exception):
    """Stands for kill -9: nothing handles it."""


class Killed(Storage):
    """A storage that dies at one of its writes, before or after it reaches the disk."""

    def __init__(self, root: UPath, *, at: int, after: bool) -> None:
        super().__init__(root)
        self._at, self._after = at, after

    def write(self, dataset: Any, table: pa.Table, **values: str) -> bool:
        self._at -= 1
        if self._at < 0 and not self._after:
            raise KilledError
        changed = super().write(dataset, table, **values)
        if self._at < 0:
            raise KilledError
        return changed


def test_a_killed_purge_is_completed_by_the_next(
    copy: Callable[[], Storage], snapshot_of: Callable[[UPath], dict[str, bytes]]
) -> None:
    def files(storage: Storage) -> dict[str, bytes]:
        root = str(storage.root)
        return {name.removeprefix(root): data for name, data in snapshot_of(storage.root).items()}

    undisturbed = copy()
    purge(undisturbed, "1003", owners=("2@N00",))
    expected = files(undisturbed)
    kills = 0
    for at in range(100):
        storage = copy()
        try:
            purge(Killed(storage.root, at=at, after=at % 2 == 1), "1003", owners=("2@N00",))
        except KilledError:
            kills += 1
        else:
            break
        # Once the owner is listed, whatever is asked next completes it.
        purge(storage, "1003", owners=() if at else ("2@N00",))
        assert files(storage) == expected, f"killed at write {at}"
        shutil.rmtree(str(storage.root))
    assert kills > 10


@settings(max_examples=12)
@given(chosen=st.sets(st.integers(0, 26), max_size=8), owners=st.sets(st.integers(0, OWNERS - 1), max_size=1))
def test_any_photos_can_be_purged(collected: Path, chosen: set[int], owners: set[int]) -> None:
    storage = Storage(collected.with_name("any"))
    shutil.rmtree(str(storage.root), ignore_errors=True)
    shutil.copytree(collected, str(storage.root))
    ids = {f"{1000 + n}" for n in chosen}
    report = purge(storage, *ids, owners=tuple(f"{n}@N00" for n in owners))
    ids |= {f"{1000 + n}" for n in range(27) if n % OWNERS in owners}
    assert not ids or not mentions(storage, *ids)
    left = {row for key in KEYS for row in storage.read(FLICKR_PHOTOS, region=key)["photo_id"].to_pylist()}
    assert report.rows["flickr_photos"] == 56 - len(left)
    check_what_is_left(storage)
    # What follows is made of the rest by the same rules, and no tile that is left moves.
    place = {"sensor": "small", "region": KEYS[0]}
    tiles = storage.read(TILES, **place)
    sample(storage, KEYS[0])
    assert storage.read(TILES, **place).slice(0, tiles.num_rows).equals(tiles)
    made = training_sets.build_training_set(storage.root, SMALL)
    assert not ids & set(training_sets.read(made.folder)["photo_id"].to_pylist())


def test_what_ablations_made_of_the_photos_goes_too(copy: Callable[[], Storage]) -> None:
    """Their data lie below the root, with shards that are links to the main ones."""
    storage = copy()
    root = Path(str(storage.root))
    below = root / "ablations" / "sensor=small" / "data=other"
    for name in ("tiles", "chips", "pairs", "ground_images", "ground_embeddings", "training_set"):
        shutil.copytree(root / name, below / name, copy_function=os.link)
    (variant,) = map(Storage, ablations.variant_roots(storage.root))
    planned = purge(storage, "1003", copies=[variant], dry_run=True)
    assert (planned.regions, planned.training_sets, planned.rows["tiles"]) == (2, 2, 2)
    assert purge(storage, "1003", copies=[variant]) == planned
    for at in (storage, variant):
        assert not mentions(at, "1003")
        check_what_is_left(at)
    assert not list(root.rglob("*.npy"))


def test_on_an_object_store_as_on_disk(collected: Path) -> None:
    root = UPath("memory://purging")
    for file in collected.rglob("*"):
        if file.is_file():
            target = root / str(file.relative_to(collected))
            target.fs.pipe_file(target.path, file.read_bytes())
    try:
        storage = Storage(root)
        purge(storage, "1003", owners=("2@N00",))
        assert not mentions(storage, "1003")
        check_what_is_left(storage)
        assert not list((root / "training_set").rglob("*.npy"))
    finally:
        root.fs.rm(root.path, recursive=True)


def test_shards_keep_their_length_and_readers_pass_over_blanks(copy: Callable[[], Storage]) -> None:
    webdataset = pytest.importorskip("webdataset")
    storage = copy()
    shard = storage.folder(GROUND_IMAGES, region=KEYS[0]) / "images-00000.tar"
    before = shard.read_bytes()
    purge(storage, "1003")
    after = shard.read_bytes()
    assert len(after) == len(before)
    with tarfile.open(str(shard)) as tar:
        names = tar.getnames()
        assert names.count(BLANK_NAME) == 1
        assert tar.extractfile(BLANK_NAME).read().strip(b"\0") == b""  # type: ignore[union-attr]
    samples = webdataset.WebDataset(str(shard), shardshuffle=False)
    assert [sample["__key__"] for sample in samples] == [
        name.removesuffix(".jpg") for name in names if name != BLANK_NAME
    ]


def test_what_is_no_id_is_refused(copy: Callable[[], Storage]) -> None:
    storage = copy()
    with pytest.raises(InputError, match="https"):
        purge(storage, "https://www.flickr.com/photos/x/1003")
    with pytest.raises(InputError, match="owner"):
        purge(storage, owners=("some one",))
    assert not storage.has(PURGED_PHOTOS)


def test_a_tile_is_no_photo_and_its_centre_is_named(copy: Callable[[], Storage]) -> None:
    storage = copy()
    tile = storage.read(TILES, sensor=SMALL.name, region=KEYS[0]).slice(0, 1).to_pylist()[0]
    with pytest.raises(InputError, match=f"{tile['tile_id']} is a tile.* {tile['center_photo_id']}\\."):
        purging.purge(storage, ["1001", tile["tile_id"]], reason="x", now=NOW)
    assert storage.read(PURGED_PHOTOS).num_rows == 0


def test_a_damaged_shard_is_named(copy: Callable[[], Storage]) -> None:
    storage = copy()
    shard = storage.folder(GROUND_IMAGES, region=KEYS[0]) / "images-00001.tar"
    shard.write_bytes(b"no archive" * 200)
    with pytest.raises(DataError, match=r"images-00001\.tar"):
        purge(storage, "1003")

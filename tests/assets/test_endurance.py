"""One region among faults, a month later, and on an object store: the dataset is the same, byte for byte."""

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from typer.testing import CliRunner
from upath import UPath

from graft_pipeline import schemas
from graft_pipeline.cli import app
from graft_pipeline.imagery import NAIP
from graft_pipeline.training_sets import build_training_set, latest

Deploy = Callable[..., Any]
REGION = "N42.00W071.50"
AREA = (-71.34, 42.18, -71.28, 42.24)
OPTIONS = {"search_radius_km": "2", "search_locations_per_region": "6"}
SENSORS = ("naip", "sentinel2")


@pytest.fixture(scope="module")
def undisturbed(planet: Any, deploy_for_module: Deploy) -> Any:
    """The region, collected in peace; only read by tests."""
    deployment = deploy_for_module(planet_url=planet.url, **OPTIONS)
    deployment.register(*AREA)
    deployment.collect(REGION, *SENSORS)
    return deployment


def test_one_answer_in_ten_failing_changes_no_byte(
    make_planet: Callable[..., Any], undisturbed: Any, deploy: Deploy
) -> None:
    shaky = make_planet(fault_rate=0.1, stall_s=4)
    # Images time out where an answer stalls; Earth Engine and Flickr are waited for.
    deployment = deploy(planet_url=shaky.url, image_timeout_s="2.5", **OPTIONS)
    deployment.start_like(undisturbed)
    deployment.collect(REGION, *SENSORS)
    stats = shaky.stats()
    assert sum(count for name, count in stats.items() if name.startswith("fault_")) > 15
    assert deployment.contents() == undisturbed.contents()


def test_permanent_failures_are_rows_with_reasons(undisturbed: Any) -> None:
    images = undisturbed.storage.read(schemas.GROUND_IMAGES, region=REGION)
    bad = images.filter(pc.not_equal(images["status"], "ok")).to_pylist()
    reasons = {(row["status"], row["reason"]) for row in bad}
    assert reasons >= {("rejected", "animated"), ("failed", "not_an_image"), ("failed", "truncated")}
    assert all(
        row["attempts"] == 1 and (row["retry_on"] is None) == (row["status"] == "rejected") for row in bad
    )


def by_key(table: pa.Table, dataset: schemas.Dataset) -> dict[Any, dict[str, Any]]:
    return {tuple(row[name] for name in dataset.key): row for row in table.to_pylist()}


def test_a_month_later_only_the_news_is_asked_for_and_nothing_old_changes(
    planet: Any, make_planet: Callable[..., Any], undisturbed: Any, deploy: Deploy, monkeypatch: Any
) -> None:
    earlier = make_planet(now=datetime(2023, 12, 1, tzinfo=UTC))
    deployment = deploy(planet_url=earlier.url, **OPTIONS)
    deployment.start_like(undisturbed)
    deployment.collect(REGION, *SENSORS)
    places = [
        (dataset, {"region": REGION} | ({} if sensor is None else {"sensor": sensor}))
        for sensor, datasets in (
            (None, (schemas.FLICKR_PHOTOS, schemas.GROUND_IMAGES, schemas.OUTDOOR_PHOTOS)),
            *((sensor, (schemas.TILES, schemas.CHIPS, schemas.PAIRS)) for sensor in SENSORS),
        )
        for dataset in datasets
    ]
    before = [deployment.storage.read(dataset, **values) for dataset, values in places]
    shards = {name: content for name, content in deployment.contents().items() if name.endswith(".tar")}

    monkeypatch.setenv("GRAFT_PLANET__URL", planet.url)
    planet.reset_stats()
    deployment.collect(REGION, *SENSORS)
    stats = planet.stats()
    after = [deployment.storage.read(dataset, **values) for dataset, values in places]
    news: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (dataset, values), old, new in zip(places, before, after, strict=True):
        known, rows = by_key(old, dataset), by_key(new, dataset)
        assert {key: rows[key] for key in known} == known, dataset.name
        news[dataset.name, values.get("sensor", "")] = [rows[key] for key in rows.keys() - known.keys()]
    contents = deployment.contents()
    assert {name: contents[name] for name in shards} == shards, "a shard once written is never touched"

    photos = news["flickr_photos", ""]
    assert 0 < len(photos) < 0.1 * before[0].num_rows
    assert stats["image"] == len(news["ground_images", ""]) == sum(row["status"] == "ok" for row in photos)
    chips = [row for sensor in SENSORS for row in news["chips", sensor]]
    assert 0 < len(chips) <= 2 * len(photos)
    assert stats["get_pixels"] == sum(row["scenes_tried"] for row in chips)
    # What asks for news costs the same each time: a page a search location, and each sensor's list of scenes.
    assert stats["search"] == int(OPTIONS["search_locations_per_region"])
    assert stats["list_assets"] == len(SENSORS)
    # In the order of uploads the tiles are those of a region that is collected at once.
    for sensor in SENSORS:
        tables = [
            d.storage.read(schemas.TILES, sensor=sensor, region=REGION) for d in (deployment, undisturbed)
        ]
        assert tables[0].equals(tables[1])


def test_on_an_object_store_lies_what_lies_on_a_disk(
    planet: Any, undisturbed: Any, s3_root: str, deploy: Deploy, tmp_path: Path
) -> None:
    deployment = deploy(planet_url=planet.url, root=s3_root, **OPTIONS)
    deployment.start_like(undisturbed)
    deployment.collect(REGION, *SENSORS)
    assert deployment.contents() == undisturbed.contents()
    deployment.collect(REGION, *SENSORS)
    assert not deployment.metadata("naip/chips")["is_changed"].value

    deployment.materialise("naip/training_set", "naip/image_encoder")
    on_disk = UPath(tmp_path / "copy")
    shutil.copytree(undisturbed.folder / "data", on_disk)
    snapshot = build_training_set(on_disk, NAIP)
    stored = [
        {file.name: file.read_bytes() for file in folder.iterdir()}
        for folder in (snapshot.folder, latest(deployment.storage.root, NAIP))
    ]
    assert stored[0] == stored[1]
    assert deployment.metadata("naip/image_encoder")

    run = CliRunner().invoke(
        app, ["query", "--csv", "SELECT sensor, count(*) FROM pairs GROUP BY 1 ORDER BY 1"]
    )
    counts = [deployment.storage.read(schemas.PAIRS, sensor=s, region=REGION).num_rows for s in SENSORS]
    assert run.output.split() == ["sensor,count_star()", f"naip,{counts[0]}", f"sentinel2,{counts[1]}"]
    assert REGION in CliRunner().invoke(app, ["status"]).output

"""Regions from search to pairs as Dagster runs them, against a planet over HTTP; the odd ones too."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from assets.history import history
from graft_pipeline import schemas
from graft_pipeline.chips import decode, to_uint8
from graft_pipeline.embeddings import read_images
from graft_pipeline.errors import ServiceError
from graft_pipeline.geometry import Grid
from graft_pipeline.imagery import SENTINEL2
from graft_pipeline.photo_search import Searched, keep_searched, last_searched
from graft_pipeline.provenance import code_version
from graft_pipeline.settings import Settings
from graft_pipeline.trace import trace
from resources.earth_engine import EarthEngine

Deploy = Callable[..., Any]
REGION = "N42.00W071.50"
SMALL = (-71.45, 42.05, -71.35, 42.15)


@pytest.fixture(scope="module")
def collected(planet: Any, deploy_for_module: Deploy) -> Any:
    """One region, collected for both sensors; only read by tests."""
    deployment = deploy_for_module(planet_url=planet.url)
    deployment.register(-71.45, 42.05, -71.3, 42.2)
    deployment.collect(REGION, "naip", "sentinel2")
    return deployment


def test_every_table_has_rows_and_every_check_passed(collected: Any) -> None:
    for dataset in (
        schemas.FLICKR_PHOTOS,
        schemas.GROUND_IMAGES,
        schemas.GROUND_EMBEDDINGS,
        schemas.OUTDOOR_PHOTOS,
    ):
        assert collected.storage.read(dataset, region=REGION).num_rows > 20
    for sensor in ("naip", "sentinel2"):
        for dataset in (schemas.SCENES, schemas.TILES, schemas.CHIPS, schemas.PAIRS):
            assert collected.storage.read(dataset, sensor=sensor, region=REGION).num_rows > 5
    records = collected.instance.event_log_storage.get_event_records(
        dg.EventRecordsFilter(dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    )
    evaluations = [record.event_log_entry.dagster_event.asset_check_evaluation_data for record in records]
    assert {e.check_name for e in evaluations} >= {
        "schema",
        "center_spacing",
        "footprint_membership",
        "photo_cap",
        "chip_georeference",
        "cloud_and_time",
        "split_disjointness",
    }
    assert all(e.passed for e in evaluations), [
        (e.asset_key, e.check_name, e.description) for e in evaluations if not e.passed
    ]


def test_all_that_failed_or_was_rejected_says_why(collected: Any) -> None:
    photos = collected.storage.read(schemas.FLICKR_PHOTOS, region=REGION)
    reasons = set(photos.filter(pc.not_equal(photos["status"], "ok"))["reason"].to_pylist())
    assert {"accuracy_below_16", "no_usable_url", "burst"} & reasons
    assert None not in reasons
    assert photos["updated_at_utc"].null_count == 0


def test_metadata_has_counts_and_a_picture(collected: Any) -> None:
    for key in ("flickr_photos", "ground_images", "outdoor_photos", "naip/tiles", "naip/chips", "naip/pairs"):
        metadata = collected.metadata(key)
        assert metadata["dagster/row_count"].value > 0
        assert "data:image/" in metadata["preview"].value


def test_every_materialisation_says_what_it_cost_and_stays_small(collected: Any) -> None:
    events = collected.instance.event_log_storage.get_event_records(
        dg.EventRecordsFilter(dg.DagsterEventType.ASSET_MATERIALIZATION)
    )
    sizes = {}
    for event in (record.event_log_entry for record in events):
        made = event.dagster_event.step_materialization_data.materialization
        assert made.metadata["seconds"].value >= 0
        sizes["/".join(made.asset_key.path)] = len(dg.serialize_value(event))
    assert max(sizes.values()) < 200_000, sizes
    assert collected.metadata("flickr_photos")["flickr_calls"].value >= 4
    assert collected.metadata("ground_images")["image_requests"].value > 20
    for key in ("flickr_photos", "ground_images", "naip/scenes", "naip/chips"):
        assert collected.metadata(key)["downloaded_bytes"].value > 10_000
    # Twenty chips of 448 px do not fit into less, however well they compress.
    assert collected.metadata("naip/chips")["downloaded_bytes"].value > 1_000_000


def test_materialisations_carry_the_lineage_of_their_columns(collected: Any) -> None:
    lineage = collected.metadata("naip/pairs")["dagster/column_lineage"].column_lineage
    assert set(lineage.deps_by_column) == set(schemas.PAIRS.schema.names)
    (scene,) = lineage.deps_by_column["scene_id"]
    assert (scene.asset_key.to_user_string(), scene.column_name) == ("naip/chips", "scene_id")


def test_a_tile_is_traced_back_to_the_runs_that_made_it(collected: Any) -> None:
    pairs = collected.storage.read(schemas.PAIRS, sensor="naip", region=REGION)
    found = trace(collected.storage.root, pairs["tile_id"][0].as_py())
    steps = {step.asset: step for step in history(collected.instance, found)}
    assert list(steps) == [
        "regions",
        "openclip/foundation",
        *("search_locations", "flickr_photos", "ground_images", "ground_embeddings", "outdoor_photos"),
        *("naip/scenes", "naip/tiles", "naip/chips", "naip/pairs"),
    ]
    made = steps["naip/pairs"]
    assert made.run_id == steps["flickr_photos"].run_id != steps["regions"].run_id
    assert made.code_version == code_version("graft_pipeline.pairing")
    assert made.seconds is not None
    assert {check.name: check.outcome for check in made.checks} == dict.fromkeys(
        ("schema", "footprint_membership", "photo_cap", "split_disjointness", "not_empty"), "passed"
    )


def test_a_region_that_no_area_covers_warns(planet: Any, deploy: Deploy) -> None:
    deployment = deploy(planet_url=planet.url)
    deployment.register(*SMALL)
    deployment.instance.add_dynamic_partitions("region", ["N10.00E010.00"])
    result = deployment.materialise("search_locations", partition="N10.00E010.00")
    (warning,) = [e for e in result.get_asset_check_evaluations() if not e.passed]
    assert warning.check_name == "not_empty"
    assert warning.severity == dg.AssetCheckSeverity.WARN
    assert "graft areas add" in (warning.description or "")


def test_sentinel_chips_of_the_same_zone_are_the_scenes_own_pixels(collected: Any, planet: Any) -> None:
    """A chip equals the same pixels cut out of another, larger window of the scene's native grid."""
    place = {"sensor": "sentinel2", "region": REGION}
    chips = collected.storage.read(schemas.CHIPS, **place)
    own_crs = {
        row["scene_id"]: row["crs"] for row in collected.storage.read(schemas.SCENES, **place).to_pylist()
    }
    ok = chips.filter(pc.equal(chips["status"], "ok"))
    same_zone = [own_crs[r["scene_id"]] == f"EPSG:{r['epsg']}" for r in ok.to_pylist()]
    ok = ok.filter(pa.array(same_zone)).slice(0, 4)
    assert ok.num_rows
    settings = Settings(_env_file=None, world="planet", ee_url=planet.url, ee_project="planet")
    earth_engine = EarthEngine.from_settings(settings)
    contents = read_images(collected.storage.folder(schemas.CHIPS, **place), ok)
    for row, content in zip(ok.to_pylist(), contents, strict=True):
        grid = Grid(row["epsg"], row["x0_m"] - 70, row["y0_m"] + 130, 10.0, 470, 480)
        around = earth_engine.get_chip(SENTINEL2, row["scene_id"], grid)
        assert np.array_equal(decode(content), to_uint8(around[13 : 13 + 448, 7 : 7 + 448], SENTINEL2))


def test_a_second_materialisation_downloads_nothing_and_changes_no_byte(planet: Any, deploy: Deploy) -> None:
    deployment = deploy(planet_url=planet.url)
    deployment.register(*SMALL)
    deployment.collect(REGION, "naip")
    files, traffic = deployment.files(), planet.stats()
    deployment.collect(REGION, "naip")
    later = planet.stats()
    assert deployment.files() == files
    assert later.get("image", 0) == traffic.get("image", 0)
    assert later.get("get_pixels", 0) == traffic.get("get_pixels", 0)


def test_ground_that_an_area_gains_is_searched_from_the_beginning(planet: Any, deploy: Deploy) -> None:
    wide, grown = (-71.45, 42.05, -71.26, 42.24), deploy(planet_url=planet.url)
    grown.register(*SMALL)
    grown.materialise("search_locations", "flickr_photos", partition=REGION)
    small = grown.storage.read(schemas.FLICKR_PHOTOS, region=REGION)
    grown.register(*wide)
    grown.materialise("search_locations", "flickr_photos", partition=REGION)
    assert grown.metadata("flickr_photos")["is_whole_search"].value
    at_once = deploy(planet_url=planet.url)
    at_once.start_like(grown)
    at_once.materialise("search_locations", "flickr_photos", partition=REGION)
    found, known = (
        set(deployment.storage.read(schemas.FLICKR_PHOTOS, region=REGION)["photo_id"].to_pylist())
        for deployment in (at_once, grown)
    )
    assert known == found | set(small["photo_id"].to_pylist())
    assert len(known) > small.num_rows
    grown.materialise("flickr_photos", partition=REGION)
    assert not grown.metadata("flickr_photos")["is_whole_search"].value


def test_a_region_is_searched_whole_again_after_months(planet: Any, deploy: Deploy) -> None:
    deployment = deploy(planet_url=planet.url)
    deployment.register(*SMALL)
    deployment.materialise("search_locations", "flickr_photos", partition=REGION)
    folder = deployment.storage.folder(schemas.FLICKR_PHOTOS, region=REGION)
    searched, files = last_searched(folder), deployment.contents()
    assert searched.whole_on is not None
    for days, is_whole in ((178, False), (180, True), (0, False)):
        keep_searched(folder, Searched(searched.scope, searched.whole_on - timedelta(days=days)))
        deployment.materialise("flickr_photos", partition=REGION)
        assert deployment.metadata("flickr_photos")["is_whole_search"].value is is_whole
    assert deployment.contents() == files


def test_imagery_is_asked_about_once_a_chip(collected: Any) -> None:
    metadata = collected.metadata("naip/chips")
    assert metadata["imagery_requests"].value <= 1.05 * metadata["dagster/row_count"].value


def test_a_region_without_photos_ends_well(planet: Any, deploy: Deploy) -> None:
    deployment = deploy(planet_url=planet.url, uploaded_from="2030-01-01")
    deployment.register(*SMALL)
    deployment.collect(REGION, "naip")
    for dataset in (schemas.TILES, schemas.CHIPS, schemas.PAIRS):
        assert deployment.storage.has(dataset, sensor="naip", region=REGION)
        assert deployment.storage.read(dataset, sensor="naip", region=REGION).num_rows == 0


def test_a_region_with_one_photo_has_one_tile_with_it(collected: Any, planet: Any, deploy: Deploy) -> None:
    photos = collected.storage.read(schemas.PAIRS, sensor="naip", region=REGION)
    taken = collected.storage.read(schemas.FLICKR_PHOTOS, region=REGION)
    paired = taken.filter(pc.is_in(taken["photo_id"], photos["center_photo_id"].combine_chunks()))
    # The day of the last upload that became a centre: everything earlier is not asked for.
    last_day = max(paired["uploaded_at_utc"].to_pylist()).strftime("%Y-%m-%d")
    deployment = deploy(planet_url=planet.url, uploaded_from=last_day)
    deployment.register(-71.45, 42.05, -71.3, 42.2)
    deployment.collect(REGION, "naip")
    pairs = deployment.storage.read(schemas.PAIRS, sensor="naip", region=REGION)
    assert 1 <= pairs.num_rows <= 3
    assert pairs["center_photo_id"].to_pylist()[0] in pairs["photo_id"].to_pylist()


def test_a_sensor_without_scenes_there_gives_rows_with_a_reason(planet: Any, deploy: Deploy) -> None:
    deployment = deploy(planet_url=planet.url)
    deployment.register(8.05, 47.05, 8.15, 47.15)
    region = "N47.00E008.00"
    deployment.collect(region, "naip", "sentinel2")
    chips = deployment.storage.read(schemas.CHIPS, sensor="naip", region=region)
    assert chips.num_rows > 0
    assert set(zip(chips["status"].to_pylist(), chips["reason"].to_pylist(), strict=True)) == {
        ("failed", "no_scene")
    }
    assert deployment.storage.read(schemas.PAIRS, sensor="naip", region=region).num_rows == 0
    assert deployment.storage.read(schemas.PAIRS, sensor="sentinel2", region=region).num_rows > 0


def test_without_an_area_the_message_says_how_to_register_one(planet: Any, deploy: Deploy) -> None:
    with pytest.raises(dg.Failure, match="graft areas add"):
        deploy(planet_url=planet.url).materialise("regions")


def test_an_unreachable_planet_is_named(deploy: Deploy) -> None:
    with pytest.raises(dg.DagsterError) as caught:
        deploy(planet_url="http://127.0.0.1:9").materialise("regions")
    assert isinstance(caught.value.__cause__, ServiceError)
    assert "http://127.0.0.1:9" in str(caught.value.__cause__)


def test_a_refused_flickr_key_stops_the_run_and_keeps_what_was_there(
    planet: Any, deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(planet_url=planet.url)
    deployment.register(*SMALL)
    deployment.materialise("search_locations", partition=REGION)
    # Production settings that point at the planet, with a key that it refuses.
    (deployment.folder / "data" / "world.json").write_text('{"world": "production"}')
    files = deployment.files()
    for name, value in {
        "GRAFT_WORLD": "production",
        "GRAFT_FLICKR_KEY": "invalid",
        "GRAFT_FLICKR_SECRET": "s3cret-nowhere",
        "GRAFT_EE_PROJECT": "p",
        "GRAFT_FLICKR_URL": f"{planet.url}/services/rest/",
    }.items():
        monkeypatch.setenv(name, value)
    result = deployment.materialise("flickr_photos", partition=REGION, raise_on_error=False)
    assert not result.success
    (event,) = result.get_step_failure_events()
    failure = event.event_specific_data.error.to_string()
    assert "GRAFT_FLICKR_KEY" in failure
    assert "s3cret-nowhere" not in failure
    assert deployment.files() == files

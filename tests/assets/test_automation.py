"""What starts by itself, on a real instance: regions that are due, new areas, what changed data asks for, backfills."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

# Not public: what the daemon makes of a backfill.
from dagster._core.definitions.automation_tick_evaluation_context import (
    build_run_requests_with_backfill_policies,
)
from dagster._core.definitions.events import AssetKeyPartitionKey
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.storage.tags import PARTITION_NAME_TAG
from typer.testing import CliRunner

from graft_pipeline import automation, backfills, schemas
from graft_pipeline.cli import app
from graft_pipeline.errors import InputError, SettingsError
from graft_pipeline.instance import partitions_of_backfills
from graft_pipeline.manifests import write_bytes_atomic
from graft_pipeline.purging import purge

Deploy = Callable[..., Any]
ROOT = Path(__file__).parents[2]
#: One sensor: half the graph to evaluate.
NAIP = [{"name": "naip"}]
REGION = "N42.00W071.50"
#: What a region is made of beyond its images, and what is an event alone in a test that needs no model.
LATER = {
    "ground_embeddings",
    "outdoor_photos",
    *(f"naip/{name}" for name in ("scenes", "tiles", "chips", "pairs")),
}
SMALL = (-71.45, 42.05, -71.35, 42.15)
TICK = datetime(2030, 1, 1, tzinfo=UTC)


def box(deployment: Any, name: str, *bounds: float) -> None:
    """Register an area as `graft areas add` does, and nothing else."""
    from shapely.geometry import box as polygon

    from graft_pipeline import areas

    areas.register_area(deployment.storage.areas_folder, areas.Area(name, polygon(*bounds)))


def report(
    deployment: Any, key: str, partition: str | None = None, version: str = "1", **metadata: Any
) -> None:
    """A materialisation, as an event alone."""
    deployment.instance.report_runless_asset_event(
        dg.AssetMaterialization(
            dg.AssetKey(key.split("/")),
            partition=partition,
            metadata=metadata,
            tags={"dagster/data_version": version},
        )
    )


def cover(deployment: Any, *regions: str) -> None:
    """Regions of the only area, as the asset `regions` leaves them."""
    from shapely import union_all

    from graft_pipeline import areas
    from graft_pipeline.regions import Region

    cells = [Region.parse(region, 0.25).polygon.buffer(-0.01) for region in regions]
    deployment.storage.write(
        schemas.REGIONS, areas.regions_table([areas.Area("here", union_all(cells))], 0.25)
    )
    deployment.instance.add_dynamic_partitions("region", regions)


def start(deployment: Any, region: str, status: dg.DagsterRunStatus) -> None:
    """A run of a region that has come as far as that."""
    deployment.instance.create_run_for_job(
        deployment.definitions.resolve_job_def("collect_region"),
        tags={PARTITION_NAME_TAG: region},
        status=status,
    )


def tick(deployment: Any, at: datetime = TICK) -> list[str]:
    """Regions that the schedule starts."""
    schedule = deployment.definitions.resolve_schedule_def("collect_stale_regions")
    context = dg.build_schedule_context(
        instance=deployment.instance,
        scheduled_execution_time=at,
        repository_def=deployment.definitions.get_repository_def(),
    )
    return [request.partition_key for request in schedule.evaluate_tick(context).run_requests]


def due(deployment: Any, name: str, cursor: str | None) -> dg.SensorResult:
    """What a sensor wants."""
    sensor = deployment.definitions.resolve_sensor_def(name)
    return sensor.evaluate_tick(
        dg.build_sensor_context(
            instance=deployment.instance, cursor=cursor, definitions=deployment.definitions
        )
    )


def test_nothing_starts_by_itself_in_a_fresh_deployment(deploy: Deploy) -> None:
    repository = deploy(sensors=NAIP).definitions.get_repository_def()
    assert [s.default_status for s in repository.schedule_defs] == [dg.DefaultScheduleStatus.STOPPED]
    assert {s.name: s.default_status.value for s in repository.sensor_defs} == dict.fromkeys(
        ["carry_changes", "register_new_areas", "train_on_change"], "STOPPED"
    )


def test_the_schedule_starts_what_is_due_and_nothing_that_is_under_way(deploy: Deploy) -> None:
    deployment = deploy(sensors=NAIP, schedule_max_regions="5")
    regions = [f"N42.00W071.{part}" for part in ("00", "25", "50", "75")] + ["N42.00W072.00"]
    missing, queued, failed, fresh, stale = regions
    cover(deployment, *regions)
    for region in (fresh, stale):
        report(deployment, "flickr_photos", region, flickr_calls=7, photos_per_day=1.0)
    start(deployment, queued, dg.DagsterRunStatus.STARTING)
    start(deployment, failed, dg.DagsterRunStatus.FAILURE)
    now = datetime.now(UTC)
    assert tick(deployment, now) == [missing]
    # A week and a day later: what failed is tried again, what was searched is stale.
    later = now + timedelta(days=8)
    assert tick(deployment, later)[0] == missing
    assert set(tick(deployment, later)) == {missing, failed, fresh, stale}
    start(deployment, missing, dg.DagsterRunStatus.STARTED)
    assert missing not in tick(deployment, later)


def test_the_schedule_keeps_within_flickrs_quota(deploy: Deploy) -> None:
    # 100 calls an hour, 40 a search: of three regions two.
    deployment = deploy(
        sensors=NAIP, flickr_calls_per_hour="100", schedule_quota_share="1", search_locations_per_region="40"
    )
    regions = ["N42.00W071.00", "N42.00W071.25", "N42.00W071.50"]
    cover(deployment, *regions)
    assert tick(deployment) == regions[:2]
    start(deployment, regions[0], dg.DagsterRunStatus.STARTING)
    assert tick(deployment) == regions[1:2]


def test_the_schedule_spends_nothing_on_regions_that_no_area_covers_any_more(deploy: Deploy) -> None:
    deployment = deploy(
        sensors=NAIP, flickr_calls_per_hour="100", schedule_quota_share="1", search_locations_per_region="40"
    )
    regions = ["N42.00W071.00", "N42.00W071.25", "N42.00W071.50"]
    cover(deployment, *regions)
    cover(deployment, regions[2])
    assert tick(deployment) == regions[2:]


def test_a_new_or_changed_area_is_registered_once(deploy: Deploy) -> None:
    deployment = deploy(sensors=NAIP)
    assert not due(deployment, "register_new_areas", None).run_requests
    keys, cursor = [], None
    for east in (-71.35, -71.30, -71.35):
        box(deployment, "here", -71.45, 42.05, east, 42.15)
        found = due(deployment, "register_new_areas", cursor)
        assert found.run_requests == due(deployment, "register_new_areas", cursor).run_requests
        keys += [request.run_key for request in found.run_requests]
        cursor = found.cursor
        assert not due(deployment, "register_new_areas", cursor).run_requests
    assert len(set(keys)) == 3, "an area that comes back is another change"


def test_a_tick_says_that_areas_were_not_registered(deploy: Deploy) -> None:
    deployment = deploy(sensors=NAIP)
    box(deployment, "here", *SMALL)
    cursor = due(deployment, "register_new_areas", None).cursor
    job = deployment.definitions.resolve_job_def("register_regions")
    run = deployment.instance.create_run_for_job(job, status=dg.DagsterRunStatus.FAILURE)
    assert run.run_id[:8] in str(due(deployment, "register_new_areas", cursor).skip_message)
    report(deployment, "regions")
    assert due(deployment, "register_new_areas", cursor).skip_message == "No area is new or changed."


def test_areas_in_a_bucket_are_noticed_too(deploy: Deploy, s3_root: str) -> None:
    deployment = deploy(sensors=NAIP, root=s3_root)
    assert not due(deployment, "register_new_areas", None).run_requests
    box(deployment, "here", *SMALL)
    found = due(deployment, "register_new_areas", None)
    assert len(found.run_requests) == 1
    write_bytes_atomic(deployment.storage.areas_folder / "there.geojson", b"{}")
    assert len(due(deployment, "register_new_areas", found.cursor).run_requests) == 1


def test_training_follows_pairs_and_training_sets_that_changed(
    deploy: Deploy,
) -> None:
    deployment = deploy(sensors=NAIP, training_min_interval_hours="1e-9")
    deployment.instance.add_dynamic_partitions("region", [REGION])

    def wanted(cursor: str | None) -> tuple[list[list[str]], str]:
        found = due(deployment, "train_on_change", cursor)
        return [[key.to_user_string() for key in r.asset_selection] for r in found.run_requests], found.cursor

    assert wanted(None)[0] == []
    report(deployment, "naip/pairs", REGION, "1")
    requests, cursor = wanted(None)
    assert requests == [["naip/training_set"]]
    report(deployment, "naip/training_set", fingerprint="a")
    requests, cursor = wanted(cursor)
    assert requests == [["naip/image_encoder", "naip/pixel_encoder"]]
    for level in ("image", "pixel"):
        report(deployment, f"naip/{level}_encoder", training_set="snapshot=a")
    assert wanted(cursor)[0] == []
    report(deployment, "naip/pairs", REGION, "1")
    assert wanted(cursor)[0] == [], "made again, the same"
    report(deployment, "naip/pairs", REGION, "2")
    requests, cursor = wanted(cursor)
    assert requests == [["naip/training_set"]]
    report(deployment, "naip/training_set", fingerprint="a")
    assert wanted(cursor)[0] == [], "other pairs, the same training set"


def test_nothing_is_trained_on_a_training_set_that_failed_a_check(deploy: Deploy) -> None:
    deployment = deploy(sensors=NAIP, training_min_interval_hours="1")
    deployment.instance.add_dynamic_partitions("region", [REGION])
    report(deployment, "naip/pairs", REGION, "1")
    cursor = due(deployment, "train_on_change", None).cursor

    def judge(*, passed: bool) -> list[str]:
        report(deployment, "naip/training_set", fingerprint="a")
        key = dg.AssetKey(["naip", "training_set"])
        deployment.instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(key, "split_disjointness", passed=passed, metadata={})
        )
        found = due(deployment, "train_on_change", cursor)
        return [key.path[-1] for request in found.run_requests for key in request.asset_selection]

    assert judge(passed=False) == []
    assert judge(passed=True) == ["image_encoder", "pixel_encoder"]


def test_no_training_set_is_made_of_regions_whose_data_failed_a_check(deploy: Deploy) -> None:
    deployment = deploy(sensors=NAIP, training_min_interval_hours="1e-9")
    deployment.instance.add_dynamic_partitions("region", [REGION])
    report(deployment, "naip/pairs", REGION)

    def wanted_after(name: str, rule: str) -> dg.SensorResult:
        report(deployment, name, REGION)
        deployment.instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                dg.AssetKey(name.split("/")), rule, passed=False, metadata={}, partition=REGION
            )
        )
        return due(deployment, "train_on_change", None)

    assert wanted_after("naip/chips", "failure_share").run_requests, "only warns"
    found = wanted_after("naip/tiles", "center_spacing")
    assert not found.run_requests
    assert f"naip/tiles of {REGION} failed center_spacing" in str(found.skip_message)
    report(deployment, "naip/tiles", REGION, "mended")
    assert due(deployment, "train_on_change", None).run_requests
    assert not wanted_after("ground_embeddings", "schema").run_requests


def test_training_keeps_its_interval_and_starts_nothing_twice(deploy: Deploy) -> None:
    deployment = deploy(sensors=NAIP, training_min_interval_hours="1")
    deployment.instance.add_dynamic_partitions("region", [REGION])
    report(deployment, "naip/pairs", REGION, "1")
    first = due(deployment, "train_on_change", None)
    assert [r.run_key for r in first.run_requests] == [
        r.run_key for r in due(deployment, "train_on_change", None).run_requests
    ]
    report(deployment, "naip/training_set", fingerprint="a")
    report(deployment, "naip/pairs", REGION, "2")
    later = due(deployment, "train_on_change", first.cursor)
    # The encoders were never trained, and need not wait.
    assert [r.asset_selection[0].path[-1] for r in later.run_requests] == ["image_encoder"]
    deployment.instance.create_run_for_job(
        deployment.definitions.resolve_job_def("learn"), status=dg.DagsterRunStatus.STARTING
    )
    waiting = due(deployment, "train_on_change", first.cursor)
    assert not waiting.run_requests
    assert "queued or in progress" in str(waiting.skip_message)


def start_learning(deployment: Any, key: str, status: dg.DagsterRunStatus) -> str:
    """A run that somebody started on the asset's own page, as far as that."""
    job = deployment.definitions.resolve_implicit_global_asset_job_def()
    run = deployment.instance.create_run_for_job(
        job.get_subset(asset_selection={dg.AssetKey(key.split("/"))}),
        asset_selection=frozenset({dg.AssetKey(key.split("/"))}),
        status=status,
    )
    return run.run_id


def test_what_somebody_trains_by_hand_is_not_trained_twice(deploy: Deploy) -> None:
    deployment = deploy(sensors=NAIP, training_min_interval_hours="1")
    report(deployment, "naip/training_set", fingerprint="a")
    assert len(due(deployment, "train_on_change", None).run_requests) == 1
    start_learning(deployment, "naip/image_encoder", dg.DagsterRunStatus.STARTED)
    assert not due(deployment, "train_on_change", None).run_requests


@pytest.mark.parametrize("name", ["training_set", "image_encoder"])
def test_a_tick_says_which_run_failed_and_waits(deploy: Deploy, name: str) -> None:
    deployment = deploy(sensors=NAIP, training_min_interval_hours="1e-9")
    deployment.instance.add_dynamic_partitions("region", [REGION])
    if name == "training_set":
        report(deployment, "naip/pairs", REGION)
        cursor = due(deployment, "train_on_change", None).cursor
    else:
        cursor = None
        report(deployment, "naip/training_set", fingerprint="a")
        report(deployment, "naip/pixel_encoder", training_set="snapshot=a")
    run_id = start_learning(deployment, f"naip/{name}", dg.DagsterRunStatus.FAILURE)
    found = due(deployment, "train_on_change", cursor)
    assert not found.run_requests
    assert f"run {run_id[:8]} came to no good end" in str(found.skip_message)
    report(deployment, f"naip/{name}", training_set="snapshot=a", fingerprint="a")
    assert "no good end" not in str(due(deployment, "train_on_change", cursor).skip_message)


@pytest.fixture
def evaluated(planet: Any, deploy: Deploy) -> Any:
    """A region with images, and a function that evaluates the conditions: what they ask for since its last call."""
    deployment = deploy(sensors=NAIP, planet_url=planet.url, search_locations_per_region="2")
    cursor = None

    def requested() -> set[str]:
        nonlocal cursor
        result = dg.evaluate_automation_conditions(deployment.definitions, deployment.instance, cursor=cursor)
        cursor = result.cursor
        keys = deployment.definitions.resolve_asset_graph().get_all_asset_keys()
        return {key.to_user_string() for key in keys if result.get_requested_partitions(key)}

    box(deployment, "here", *SMALL)
    deployment.materialise("regions")
    requested()
    deployment.materialise("search_locations", "flickr_photos", "ground_images", partition=REGION)
    for key in sorted(LATER):
        report(deployment, key, REGION)
    return deployment, requested


def test_only_data_that_changed_is_carried_on(evaluated: Any) -> None:
    deployment, requested = evaluated
    assert requested() == set(), "a run of the region is complete in itself"
    deployment.materialise("search_locations", "flickr_photos", partition=REGION)
    assert requested() == set(), "an unchanged re-scrape"
    photo = deployment.storage.read(schemas.FLICKR_PHOTOS, region=REGION)["photo_id"][0].as_py()
    purge(deployment.storage, [photo], [], reason="asked", now=datetime.now(UTC))
    deployment.materialise("flickr_photos", partition=REGION)
    assert requested() == {"ground_images", *LATER - {"naip/scenes"}}
    assert requested() == set(), "once"
    deployment.materialise("ground_images", partition=REGION)
    for key in sorted(LATER):
        report(deployment, key, REGION, "2")
    assert requested() == set()


def test_a_new_encoder_is_carried_to_every_regions_embeddings(deploy: Deploy) -> None:
    deployment = deploy(sensors=NAIP)
    regions = {REGION, "N42.00W071.75"}
    deployment.instance.add_dynamic_partitions("region", sorted(regions))
    for region in regions:
        for name in ("tiles", "chips", "chip_embeddings"):
            report(deployment, f"naip/{name}", region)
    cursor = dg.evaluate_automation_conditions(deployment.definitions, deployment.instance).cursor
    report(deployment, "naip/image_encoder", version="new")
    found = dg.evaluate_automation_conditions(deployment.definitions, deployment.instance, cursor=cursor)
    assert found.get_requested_partitions(dg.AssetKey(["naip", "chip_embeddings"])) == regions
    assert found.total_requested == 2


def test_an_index_that_changes_just_after_maps_were_requested_is_mapped_an_hour_later(deploy: Deploy) -> None:
    deployment = deploy(sensors=NAIP)
    index, maps, cursor = "naip/search_index", dg.AssetKey(["naip", "concept_maps"]), None

    def is_wanted(hour: int, minute: int) -> bool:
        nonlocal cursor
        made = dg.evaluate_automation_conditions(
            deployment.definitions,
            deployment.instance,
            cursor=cursor,
            evaluation_time=datetime(2026, 1, 5, hour, minute, tzinfo=UTC),
        )
        cursor = made.cursor
        return made.get_num_requested(maps) > 0

    report(deployment, index, version="1")
    assert not is_wanted(9, 30)
    report(deployment, index, version="2")
    assert not is_wanted(9, 35)
    assert is_wanted(10, 1)
    report(deployment, index, version="3")
    assert not is_wanted(10, 6)
    assert is_wanted(11, 1)
    assert not is_wanted(11, 6)
    assert not is_wanted(12, 1)


def test_a_backfill_from_the_command_line_is_requested_once(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(sensors=NAIP)
    monkeypatch.setenv("DAGSTER_HOME", str(deployment.folder))
    box(deployment, "here", -71.45, 42.05, -71.05, 42.15)
    box(deployment, "there", -70.45, 42.05, -70.35, 42.15)
    regions = ["N42.00W071.25", "N42.00W071.50", "N42.00W070.50"]
    deployment.instance.add_dynamic_partitions("region", regions)
    report(deployment, "flickr_photos", regions[0])
    run = CliRunner().invoke
    shown = run(app, ["backfill", "--area", "here", "--dry-run"])
    assert "1 of 2 regions: 1 missing" in shown.output
    assert not deployment.instance.get_backfills()
    assert "is requested" in run(app, ["backfill", "--area", "here"]).output
    (backfill,) = deployment.instance.get_backfills()
    target = backfill.asset_backfill_data.target_subset
    assert target.num_partitions_and_non_partitioned_assets == len(automation.region_keys(["naip"]))
    assert partitions_of_backfills(deployment.instance) == {regions[1]}
    assert backfill.tags["graft/area/here"] == "true"
    assert "0 of 2 regions" in run(app, ["backfill", "--area", "here"]).output
    assert "2 of 3 regions" in run(app, ["backfill", "--stale-days", "0"]).output
    assert len(deployment.instance.get_backfills()) == 2
    assert tick(deployment) == [], "the schedule leaves alone what a backfill will collect"


def test_the_queue_sees_the_region_of_every_run_of_a_backfill(deploy: Deploy) -> None:
    (limit,) = yaml.safe_load((ROOT / "dagster.yaml").read_text())["concurrency"]["runs"][
        "tag_concurrency_limits"
    ]
    deployment = deploy(grid_stride_m={"naip": 448}, osm_file="/extract.osm.pbf")
    regions = {REGION, "N42.00W071.75"}
    deployment.instance.add_dynamic_partitions("region", sorted(regions))
    graph = deployment.definitions.resolve_asset_graph()
    by_region = {key for key in graph.materializable_asset_keys if graph.get(key).is_partitioned}
    wanted = [AssetKeyPartitionKey(key, region) for key in by_region for region in regions]
    with partition_loading_context(dynamic_partitions_store=deployment.instance):
        requests = build_run_requests_with_backfill_policies(wanted, graph, deployment.instance)
    assert len(requests) == len(regions)
    assert {request.tags.get(limit["key"]) for request in requests} == regions


def test_a_backfill_says_what_it_needs(deploy: Deploy, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = deploy(sensors=NAIP)
    with pytest.raises(SettingsError, match="DAGSTER_HOME"), backfills.deployed_instance():
        pass
    monkeypatch.setenv("DAGSTER_HOME", str(deployment.folder))
    with pytest.raises(InputError, match="graft areas add"):
        backfills.regions_of(deployment.storage, ["nowhere"], 0.25)

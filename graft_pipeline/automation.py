"""What is made together and when: jobs, the schedule of regions, sensors, automation conditions, backfills.

What an asset does is in assets/, which assets exist in definitions.py; which regions are due and whether a training is,
is decided in incremental.py, of which this is the side that talks to Dagster's instance.
"""

import functools
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

# Not public, but the only way to a backfill and to what Dagster's own pages show of partitions.
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus, PartitionBackfill
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES
from dagster._core.storage.tags import MAX_RUNTIME_SECONDS_TAG, PRIORITY_TAG
from dagster._core.utils import make_new_backfill_id

from assets.reporting import OWNERS
from graft_pipeline import areas, incremental
from graft_pipeline.errors import InputError, SettingsError
from graft_pipeline.incremental import Budget, Choice, RegionState
from graft_pipeline.partitions import REGION_PARTITIONS
from graft_pipeline.provenance import fingerprint
from graft_pipeline.schemas import REGIONS
from graft_pipeline.settings import Settings

if TYPE_CHECKING:
    from resources.storage import Storage

GROUND = ("search_locations", "flickr_photos", "ground_images", "ground_embeddings", "outdoor_photos")
PER_REGION = ("scenes", "tiles", "chips", "pairs")
LEARNING = ("training_set", "image_encoder", "pixel_encoder")
SCORES = ("benchmark", "zero_shot_scores", "segmentation_scores", "questions", "question_scores")

SEARCHES = dg.AssetKey("flickr_photos")
#: Steps that other steps' changed data makes anew. Not what asks Flickr or lists scenes (`collect_stale_regions` keeps
#: their budget), not what is trained (`train_on_change` keeps its interval).
CARRIED = (
    "ground_images",
    "ground_embeddings",
    "outdoor_photos",
    "tiles",
    "chips",
    "pairs",
    "chip_embeddings",
    "grid_embeddings",
)
#: As well, but once an hour: they read all regions.
OF_ALL_REGIONS = ("search_index", "concept_maps")
#: What a schedule keeps fresh.
COLLECTED = ("flickr_photos", "scenes", "pairs")
#: Runs that nobody waits for let those that somebody started go first.
IN_BACKGROUND = {PRIORITY_TAG: "-1"}
#: A region takes minutes. What has been at it for so long has died with its code server, and makes way in the queue.
MAX_RUNTIME = {MAX_RUNTIME_SECONDS_TAG: str(12 * 3600)}


def keys_of(sensors: Iterable[str], names: Sequence[str]) -> list[dg.AssetKey]:
    """Keys of assets that every sensor has."""
    return [dg.AssetKey([sensor, name]) for sensor in sensors for name in names]


def region_keys(sensors: Iterable[str]) -> list[dg.AssetKey]:
    """Everything that one region is collected with, from search locations to the pairs of every sensor."""
    return [*(dg.AssetKey(name) for name in GROUND), *keys_of(sensors, PER_REGION)]


def build_jobs(
    sensors: Iterable[str], *, has_scores: bool, has_maps: bool, gridded: Iterable[str] = ()
) -> list[Any]:
    """The deployment's jobs.

    Args:
        sensors: names of the deployment's sensors.
        has_scores: whether there is a benchmark, and so scores.
        has_maps: whether there are concepts, and so maps.
        gridded: sensors among them that have a grid.

    Returns:
        `register_regions`, `collect_region` (from search to pairs, all sensors: one run a partition), `learn`
        (training sets and encoders), `index_region` (chip embeddings), `grid_region` (grid chips and embeddings),
        `update_index` (search indexes), `map_concepts` and, on the planet, `score` and `ablate`.
    """
    names = list(sensors)
    select = dg.AssetSelection.assets
    job = functools.partial(dg.define_asset_job, owners=OWNERS)
    jobs = [
        job("register_regions", select("regions"), description="Areas to region partitions."),
        job(
            "collect_region",
            select(*region_keys(names)),
            description="One region from Flickr search to the pair manifests of every sensor.",
            tags=MAX_RUNTIME,
        ),
        job(
            "learn",
            select(*keys_of(names, LEARNING)),
            description="Training sets of all regions, and the satellite encoders.",
        ),
        job(
            "index_region",
            select(*keys_of(names, ["chip_embeddings"])),
            description="Embeddings of one region's chips, for search and maps.",
        ),
        job(
            "update_index",
            select(*keys_of(names, ["search_index"])),
            description="Search indexes over all regions: those that were embedded since are indexed anew.",
        ),
    ]
    if grids := keys_of(gridded, ["grid_chips", "grid_embeddings"]):
        jobs.append(
            job(
                "grid_region",
                select(*grids),
                description="Chips and embeddings of one region's regular grid.",
            )
        )
    if has_maps:
        jobs.append(
            job(
                "map_concepts",
                select(*keys_of(names, ["concept_maps", *(["concept_map_scores"] if has_scores else [])])),
                description="Maps of the deployment's concepts, and on the planet what they are worth.",
            )
        )
    if has_scores:
        jobs += [
            job(
                "score",
                select(*keys_of(names, SCORES)),
                description="Zero-shot scores on ground that no training tile touches.",
            ),
            job(
                "ablate",
                select(*keys_of(names, ["ablations"])),
                description="The paper's ablations of every sensor: variants trained with several seeds, a table.",
            ),
        ]
    return jobs


# --- what the instance knows of regions ---


@dataclass(frozen=True)
class _Search:
    """What the last materialisation of a region's `flickr_photos` says."""

    storage_id: int
    at: datetime
    is_first: bool
    calls: int | None
    photos_per_day: float


#: Searches by instance and region, as far as they were read: an event never changes, and with its picture is large.
_SEARCHES: dict[str, dict[str, _Search]] = {}
_EVENTS_AT_A_TIME = 200


def region_states(instance: dg.DagsterInstance, sensors: Iterable[str]) -> list[RegionState]:
    """What an instance knows of every region partition.

    Args:
        instance: the instance.
        sensors: names of the deployment's sensors.

    Returns:
        One state a partition, by key. A region has failed if a run of it that ended did not make all that it was to
        make of photos or pairs; it is busy while such a run, or a backfill that will start one, has not ended.
    """
    searches = _searches(instance)
    failed, busy = _open_attempts(instance, [SEARCHES, *keys_of(sensors, ["pairs"])])
    busy |= _partitions_of_backfills(instance)
    states = []
    for key in sorted(instance.get_dynamic_partitions(str(REGION_PARTITIONS.name))):
        search = searches.get(key)
        states.append(
            RegionState(
                key,
                searched_at=search.at if search else None,
                is_first_search=search is not None and search.is_first,
                calls=search.calls if search else None,
                photos_per_day=search.photos_per_day if search else 0.0,
                failed_at=failed.get(key),
                is_busy=key in busy,
            )
        )
    return states


def _searches(instance: dg.DagsterInstance) -> dict[str, _Search]:
    latest = instance.event_log_storage.get_latest_storage_id_by_partition(
        SEARCHES, dg.DagsterEventType.ASSET_MATERIALIZATION
    )
    run_storage: Any = instance.run_storage
    known = _SEARCHES.setdefault(run_storage.get_run_storage_id(), {})
    for key in known.keys() - latest.keys():
        del known[key]
    unread = sorted(
        storage_id
        for key, storage_id in latest.items()
        if key not in known or known[key].storage_id != storage_id
    )
    for start in range(0, len(unread), _EVENTS_AT_A_TIME):
        some = unread[start : start + _EVENTS_AT_A_TIME]
        found = instance.fetch_materializations(
            dg.AssetRecordsFilter(SEARCHES, storage_ids=some), limit=len(some)
        )
        for record in found.records:
            metadata = {} if record.asset_materialization is None else record.asset_materialization.metadata
            values = {name: value.value for name, value in metadata.items()}
            known[str(record.partition_key)] = _Search(
                record.storage_id,
                datetime.fromtimestamp(record.timestamp, UTC),
                bool(values.get("is_first_search", False)),
                values.get("flickr_calls"),  # type: ignore[arg-type]
                float(values.get("photos_per_day", 0.0)),  # type: ignore[arg-type]
            )
    return dict(known)


def _open_attempts(
    instance: dg.DagsterInstance, keys: Iterable[dg.AssetKey]
) -> tuple[dict[str, datetime], set[str]]:
    """Regions whose last run has not made one of the assets: when it was created if it ended, and those that go on."""
    run_ids: dict[str, set[str]] = {}
    for key in keys:
        attempts = (
            instance.event_log_storage.get_latest_asset_partition_materialization_attempts_without_materializations
        )(key)
        for partition, (run_id, _) in attempts.items():
            run_ids.setdefault(run_id, set()).add(partition)
    failed: dict[str, datetime] = {}
    busy: set[str] = set()
    wanted = sorted(run_ids)
    for start in range(0, len(wanted), _EVENTS_AT_A_TIME):
        some = wanted[start : start + _EVENTS_AT_A_TIME]
        for record in instance.get_run_records(dg.RunsFilter(run_ids=some)):
            partitions = run_ids[record.dagster_run.run_id]
            if record.dagster_run.status in NOT_FINISHED_STATUSES:
                busy |= partitions
            else:
                created = record.create_timestamp.replace(tzinfo=UTC)
                for partition in partitions:
                    failed[partition] = max(created, failed.get(partition, created))
    return failed, busy


def _partitions_of_backfills(instance: dg.DagsterInstance) -> set[str]:
    """Regions that backfills are to search, and may not have started yet."""
    found: set[str] = set()
    going_on = [BulkActionStatus.REQUESTED, BulkActionStatus.CANCELING, BulkActionStatus.FAILING]
    for backfill in instance.get_backfills(filters=BulkActionsFilter(statuses=going_on)):
        if backfill.asset_backfill_data is not None:
            target = backfill.asset_backfill_data.target_subset
            if (subset := target.partitions_subsets_by_asset_key.get(SEARCHES)) is not None:
                found.update(subset.get_partition_keys())
        elif backfill.partition_set_name == "collect_region_partition_set":
            found.update(backfill.partition_names or ())
    return found


# --- schedule and sensors ---


def _storage(settings: Settings) -> "Storage":
    # No resource: that would open a whole world, and on the planet start one.
    from resources.storage import Storage

    return Storage.from_settings(settings)


def areas_of_regions(storage: "Storage") -> dict[str, list[str]]:
    """Names of the areas that each region belongs to, from the dataset `regions`."""
    found: dict[str, list[str]] = {}
    for row in storage.read(REGIONS).select(["region", "area"]).to_pylist():
        found.setdefault(row["region"], []).append(row["area"])
    return found


def run_tags(choice: Choice, names: Sequence[str]) -> dict[str, str]:
    """Tags by which runs of a region are found again: why it was chosen, and each area that it belongs to."""
    return {"graft/reason": choice.reason, **{f"graft/area/{name}": "true" for name in names}}


def build_schedules(settings: Settings, jobs: Mapping[str, Any]) -> list[dg.ScheduleDefinition]:
    """The deployment's schedules, all stopped until somebody starts them.

    Args:
        settings: of the deployment.
        jobs: jobs by name.

    Returns:
        `collect_stale_regions`.
    """
    sensors, every = list(settings.sensor_records), settings.schedule_every_hours
    budget = Budget(
        int(settings.flickr_calls_per_hour * every * settings.schedule_quota_share),
        settings.schedule_max_regions,
    )

    @dg.schedule(
        name="collect_stale_regions",
        job=jobs["collect_region"],
        cron_schedule=f"0 */{every} * * *" if every < 24 else "0 0 * * *",
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description=(
            "Regions that were never searched, then those with most news, as many as Flickr's quota allows until the "
            "next tick."
        ),
    )
    def collect_stale_regions(context: dg.ScheduleEvaluationContext) -> Any:
        states = region_states(context.instance, sensors)
        chosen = incremental.choose(
            states,
            budget,
            context.scheduled_execution_time.astimezone(UTC),
            locations=settings.search_locations_per_region,
            fresh=timedelta(days=settings.schedule_fresh_days),
        )
        busy = sum(state.is_busy for state in states)
        if not chosen:
            return dg.SkipReason(f"No region is due within the budget ({len(states)} regions, {busy} busy).")
        context.log.info("%d of %d regions, %d more are busy", len(chosen), len(states), busy)
        names = areas_of_regions(_storage(settings))
        return [
            # One run a region and tick, however often the tick is evaluated.
            dg.RunRequest(
                run_key=choice.key,
                partition_key=choice.key,
                tags={**IN_BACKGROUND, **run_tags(choice, names.get(choice.key, []))},
            )
            for choice in chosen
        ]

    return [collect_stale_regions]


def build_sensors(settings: Settings, jobs: Mapping[str, Any]) -> list[dg.SensorDefinition]:
    """The deployment's sensors, all stopped until somebody starts them.

    Args:
        settings: of the deployment.
        jobs: jobs by name.

    Returns:
        `register_new_areas`, `train_on_change` and `carry_changes`, which evaluates the automation conditions.
    """
    names = list(settings.sensor_records)

    @dg.sensor(
        job=jobs["register_regions"],
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Makes the regions of an area partitions as soon as its file is new or changed.",
    )
    def register_new_areas(context: dg.SensorEvaluationContext) -> Any:
        storage = _storage(settings)
        with storage.explained():
            current = areas.areas_fingerprint(storage.areas_folder)
        if current is None:
            return dg.SkipReason("No area is registered: graft areas add FILE.")
        number, _, seen = (context.cursor or "0:").partition(":")
        if current == seen:
            return dg.SkipReason("No area is new or changed.")
        # The number tells a state that comes again from an evaluation that is repeated.
        cursor = f"{int(number) + 1}:{current}"
        return dg.SensorResult(
            run_requests=[dg.RunRequest(run_key=cursor, tags={"graft/reason": "areas changed"})],
            cursor=cursor,
        )

    @dg.sensor(
        job=jobs["learn"],
        minimum_interval_seconds=300,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Builds a training set when pairs changed, and trains encoders when it did, not too often.",
    )
    def train_on_change(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        interval = timedelta(hours=settings.training_min_interval_hours)
        cursor: dict[str, str] = json.loads(context.cursor or "{}")
        requests, reasons = [], []
        for name in names:
            keys, inputs, reason = _due_for_learning(context.instance, name, cursor.get(name), interval)
            if keys:
                run_key = fingerprint([key.path for key in keys], inputs, _last_made(context.instance, keys))
                tags = {**IN_BACKGROUND, "graft/sensor": name, "graft/reason": reason}
                requests.append(dg.RunRequest(run_key=run_key, asset_selection=keys, tags=tags))
                if keys[0].path[-1] == "training_set":
                    cursor[name] = inputs
            else:
                reasons.append(f"{name}: {reason}")
        return dg.SensorResult(
            run_requests=requests,
            skip_reason=None if requests else "; ".join(reasons),
            cursor=json.dumps(cursor, sort_keys=True),
        )

    carry_changes = dg.AutomationConditionSensorDefinition(
        "carry_changes",
        target=dg.AssetSelection.all(),
        default_status=dg.DefaultSensorStatus.STOPPED,
        # An evaluation at 20,000 regions takes Dagster some 20 seconds of CPU (benchmarks/partitions.py).
        minimum_interval_seconds=300,
        run_tags=IN_BACKGROUND,
        description="Makes anew what lies downstream of data that has changed; of data made again the same, nothing.",
    )
    return [register_new_areas, train_on_change, carry_changes]


def _last_made(instance: dg.DagsterInstance, keys: Iterable[dg.AssetKey]) -> list[int | None]:
    """Storage ids of the last materialisations of unpartitioned assets."""
    records = (instance.fetch_materializations(key, limit=1).records for key in keys)
    return [found[0].storage_id if found else None for found in records]


def _due_for_learning(
    instance: dg.DagsterInstance, sensor: str, requested: str | None, interval: timedelta
) -> tuple[list[dg.AssetKey], str, str]:
    """What of a sensor's learning is due: its keys (none: nothing), its input's fingerprint, and why or why not."""
    training_set, *encoders = keys_of([sensor], LEARNING)
    under_way = dg.RunsFilter(job_name="learn", statuses=NOT_FINISHED_STATUSES)
    for record in instance.get_run_records(under_way):
        if record.dagster_run.asset_selection is None or training_set.path[0] in {
            key.path[0] for key in record.dagster_run.asset_selection
        }:
            return [], "", "a run of it is queued or in progress"
    now = datetime.now(UTC)
    pairs = _data_versions(instance, dg.AssetKey([sensor, "pairs"]))
    inputs = fingerprint(pairs, _data_versions(instance, dg.AssetKey("ground_embeddings"))) if pairs else None
    made_at, made = _latest(instance, training_set)
    reason = incremental.why_not_now(inputs, requested, made_at, now, interval)
    if reason is None:
        return [training_set], str(inputs), "pairs changed"
    reasons = [f"training_set: {reason}"]
    snapshot, due = made.get("fingerprint"), []
    for encoder in encoders:
        trained_at, trained = _latest(instance, encoder)
        used = str(trained.get("training_set", "")).removeprefix("snapshot=") or None
        reason = incremental.why_not_now(snapshot, used, trained_at, now, interval)
        if reason is None:
            due.append(encoder)
        else:
            reasons.append(f"{encoder.path[-1]}: {reason}")
    return due, str(snapshot), "training set changed" if due else "; ".join(reasons)


def _latest(instance: dg.DagsterInstance, key: dg.AssetKey) -> tuple[datetime | None, dict[str, Any]]:
    """When an unpartitioned asset was made last, and its metadata."""
    records = instance.fetch_materializations(key, limit=1).records
    if not records or records[0].asset_materialization is None:
        return None, {}
    metadata = records[0].asset_materialization.metadata
    return datetime.fromtimestamp(records[0].timestamp, UTC), {n: v.value for n, v in metadata.items()}


def _data_versions(instance: dg.DagsterInstance, key: dg.AssetKey) -> dict[str, str]:
    """Data versions of an asset's partitions."""
    tag = "dagster/data_version"
    found = instance.event_log_storage.get_latest_tags_by_partition(
        key, dg.DagsterEventType.ASSET_MATERIALIZATION, [tag]
    )
    return {partition: tags[tag] for partition, tags in found.items()}


# --- automation conditions ---


def with_conditions(assets: Iterable[Any]) -> list[Any]:
    """Give assets that follow their inputs the condition under which `carry_changes` makes them anew.

    Args:
        assets: all assets of the deployment.

    Returns:
        The same, those of `CARRIED` and `OF_ALL_REGIONS` with a condition.
    """
    assets = list(assets)
    made = [spec for item in assets if isinstance(item, dg.AssetsDefinition) for spec in item.specs]
    inputs = {spec.key: {dep.asset_key for dep in spec.deps} for spec in made}

    def conditioned(spec: dg.AssetSpec) -> dg.AssetSpec:
        if spec.key.path[-1] not in (*CARRIED, *OF_ALL_REGIONS):
            return spec
        nearest = dg.AssetSelection.assets(*_nearest_inputs(spec.key, inputs))
        return spec.replace_attributes(automation_condition=on_changed_data(spec.key.path[-1], nearest))

    return list(dg.map_asset_specs(conditioned, assets))


def _nearest_inputs(key: dg.AssetKey, inputs: Mapping[dg.AssetKey, set[dg.AssetKey]]) -> list[dg.AssetKey]:
    """Inputs whose changes do not reach the asset through another input anyway; external ones left out.

    Dagster evaluates, and keeps, each condition of each input: at 20,000 partitions that is most of a tick.
    """

    def before(other: dg.AssetKey) -> set[dg.AssetKey]:
        if other.path[-1] not in CARRIED:
            return set()
        return inputs[other].union(*(before(earlier) for earlier in inputs[other] if earlier in inputs))

    known = {other for other in inputs[key] if other in inputs}
    return sorted(known - set().union(*(before(other) for other in known)))


def on_changed_data(name: str, nearest: dg.AssetSelection) -> dg.AutomationCondition[Any]:
    """When an asset is made anew: the data version of an input changed, or an input is about to be made anew.

    So one run makes everything in a region that lies downstream of the change.

    Args:
        name: of the asset, without its sensor.
        nearest: the inputs to look at.

    Returns:
        The condition.
    """
    condition = dg.AutomationCondition
    changed = condition.any_deps_match(condition.data_version_changed()).allow(nearest)
    if name in OF_ALL_REGIONS:
        # Some region is always in progress somewhere: not at rest, but once an hour.
        return (
            changed.since(condition.newly_requested())
            & condition.cron_tick_passed("0 * * * *")
            & ~condition.in_progress()
        ).with_label("on_changed_data_hourly")
    follows = condition.any_deps_match(condition.data_version_changed() | condition.will_be_requested())
    # Within a region's own run assets follow their inputs already.
    handled = condition.newly_requested() | condition.newly_updated()
    if name == "ground_embeddings" or not name.endswith("_embeddings"):
        return (follows.allow(nearest).since(handled) & ~condition.in_progress()).with_label(
            "on_changed_data"
        )
    # Embeddings of satellite images are not part of a region's own run, and wait for its end. What was embedded while
    # its encoder was being replaced has to be embedded once more.
    encoder = dg.AssetSelection.key_substring("image_encoder")
    replaced = condition.any_deps_match(condition.data_version_changed()).allow(encoder & nearest)
    return (
        (follows.allow(nearest - encoder).since(handled) | replaced.since(condition.newly_requested()))
        & ~condition.any_deps_missing().allow(nearest)
        & ~condition.any_deps_in_progress().allow(nearest)
        & ~condition.in_progress()
    ).with_label("on_changed_data")


def with_freshness(assets: Iterable[Any], settings: Settings) -> list[Any]:
    """Give what is collected a freshness policy, so that the UI says when no region was looked at for too long.

    Dagster judges an asset by its latest materialisation, of whatever region; which regions are stale is the
    schedule's matter.

    Args:
        assets: all assets of the deployment.
        settings: how long a search is good for; twice as long is a failure.

    Returns:
        The same, those of `COLLECTED` with a policy.
    """
    good_for = max(timedelta(days=settings.schedule_fresh_days), timedelta(minutes=1))
    policy = dg.FreshnessPolicy.time_window(fail_window=2 * good_for, warn_window=good_for)

    def judged(spec: dg.AssetSpec) -> dg.AssetSpec:
        return spec.replace_attributes(freshness_policy=policy) if spec.key.path[-1] in COLLECTED else spec

    return list(dg.map_asset_specs(judged, assets))


# --- backfills ---


@contextmanager
def deployed_instance() -> Iterator[dg.DagsterInstance]:
    """The instance of DAGSTER_HOME.

    Raises:
        SettingsError: if there is none.
    """
    home = os.environ.get("DAGSTER_HOME", "")
    if not Path(home).is_dir() or not Path(home).is_absolute():
        raise SettingsError(
            f"DAGSTER_HOME is {home!r}: set it to the absolute path of the folder with the deployment's dagster.yaml."
        )
    with dg.DagsterInstance.get() as instance:
        yield instance


def regions_of(storage: "Storage", names: Sequence[str], grid_deg: float) -> set[str]:
    """Keys of the regions that registered areas touch, partitions already or not.

    Args:
        storage: of the deployment.
        names: areas; none: all.
        grid_deg: side of the grid's cells, degrees.

    Raises:
        InputError: if there is no such area, or none at all.
    """
    registered = areas.list_areas(storage.areas_folder)
    wanted = {areas.area_name(name) for name in names}
    unknown = sorted(wanted - {area.name for area in registered})
    if unknown or not registered:
        known = ", ".join(area.name for area in registered) or "none"
        raise InputError(
            f"No area {', '.join(unknown) or 'at all'} is registered (known: {known}): run graft areas add FILE."
        )
    some = [area for area in registered if not wanted or area.name in wanted]
    return set(areas.regions_table(some, grid_deg)["region"].to_pylist())


def register_regions(instance: dg.DagsterInstance, definitions: dg.Definitions) -> None:
    """Make the regions of all registered areas partitions: a run of `register_regions` in this process."""
    definitions.resolve_job_def("register_regions").execute_in_process(
        instance=instance, run_config={"loggers": {"console": {"config": {"log_level": "ERROR"}}}}
    )


def launch_backfill(
    instance: dg.DagsterInstance,
    definitions: dg.Definitions,
    sensors: Iterable[str],
    regions: Collection[str],
    names: Sequence[str],
    title: str,
) -> str:
    """Request a backfill of regions, from search to pairs; Dagster's daemon takes it up.

    Args:
        instance: the instance of the deployment.
        definitions: of the deployment.
        sensors: names of its sensors.
        regions: keys of region partitions.
        names: areas that were asked for, as tags of its runs.
        title: shown in the UI.

    Returns:
        Its id.
    """
    backfill = PartitionBackfill.from_asset_partitions(
        backfill_id=make_new_backfill_id(),
        asset_graph=definitions.resolve_asset_graph(),
        partition_names=sorted(regions),
        asset_selection=region_keys(sensors),
        backfill_timestamp=datetime.now(UTC).timestamp(),
        tags={**MAX_RUNTIME, "graft/reason": "backfill", **{f"graft/area/{name}": "true" for name in names}},
        dynamic_partitions_store=instance,
        all_partitions=False,
        title=title,
        description=None,
        run_config=None,
    )
    instance.add_backfill(backfill)
    return backfill.backfill_id

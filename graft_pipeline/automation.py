"""What is made together and when: jobs, the schedule of regions, sensors.

What an asset does is in assets/, which assets exist in definitions.py; which regions are due and whether a training is,
is decided in incremental.py, from what instance.py reads. Automation conditions are in conditions.py.
"""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import dagster as dg

# Not public: tags that Dagster itself obeys.
from dagster._core.storage.tags import MAX_RUNTIME_SECONDS_TAG, PRIORITY_TAG

from assets.reporting import OWNERS
from graft_pipeline import areas, incremental
from graft_pipeline.incremental import Budget, Choice
from graft_pipeline.instance import (
    data_versions,
    failed_checks,
    failed_in_regions,
    last_events,
    latest,
    open_attempt,
    region_states,
)
from graft_pipeline.provenance import fingerprint
from graft_pipeline.schemas import REGIONS
from graft_pipeline.settings import Settings

if TYPE_CHECKING:
    from resources.storage import Storage

GROUND = ("search_locations", "flickr_photos", "ground_images", "ground_embeddings", "outdoor_photos")
PER_REGION = ("scenes", "tiles", "chips", "pairs")
LEARNING = ("training_set", "image_encoder", "pixel_encoder")
SCORES = ("benchmark", "zero_shot_scores", "segmentation_scores", "questions", "question_scores")

#: Failed checks that a tick names.
MOST_SHOWN = 5
#: Runs that nobody waits for let those that somebody started go first.
IN_BACKGROUND = {PRIORITY_TAG: "-1"}
#: All but training takes minutes. What has been at it for so long has died with its code server, and makes way in the
#: queue. Trainings have the limit of the instance (dagster.yaml), two weeks.
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
    of_learning = functools.partial(dg.define_asset_job, owners=OWNERS)
    job = functools.partial(of_learning, tags=MAX_RUNTIME)
    jobs = [
        job("register_regions", select("regions"), description="Areas to region partitions."),
        job(
            "collect_region",
            select(*region_keys(names)),
            description="One region from Flickr search to the pair manifests of every sensor.",
        ),
        of_learning(
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
            of_learning(
                "ablate",
                select(*keys_of(names, ["ablations"])),
                description="The paper's ablations of every sensor: variants trained with several seeds, a table.",
            ),
        ]
    return jobs


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
        names = areas_of_regions(_storage(settings))
        # Where no area is any more there is nothing to search; its partition and what was collected stay.
        states = [
            state for state in region_states(context.instance, sensors) if state.is_busy or state.key in names
        ]
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
            attempt = open_attempt(context.instance, dg.AssetKey("regions"))
            if attempt is None or attempt.goes_on:
                return dg.SkipReason("No area is new or changed.")
            reason = incremental.why_not_again(attempt.run_id, attempt.at, datetime.now(UTC))
            if reason is not None:
                return dg.SkipReason(f"Areas changed, but {reason}.")
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
                run_key = fingerprint([key.path for key in keys], inputs, last_events(context.instance, keys))
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
        run_tags=IN_BACKGROUND | MAX_RUNTIME,
        description="Makes anew what lies downstream of data that has changed; of data made again the same, nothing.",
    )
    return [register_new_areas, train_on_change, carry_changes]


def _due_for_learning(
    instance: dg.DagsterInstance, sensor: str, requested: str | None, interval: timedelta
) -> tuple[list[dg.AssetKey], str, str]:
    """What of a sensor's learning is due: its keys (none: nothing), its input's fingerprint, and why or why not."""
    training_set, *encoders = keys_of([sensor], LEARNING)
    attempts = {key: open_attempt(instance, key) for key in (training_set, *encoders)}
    if any(attempt is not None and attempt.goes_on for attempt in attempts.values()):
        return [], "", "a run of it is queued or in progress"
    now = datetime.now(UTC)

    def why_not(key: dg.AssetKey, current: str | None, used: str | None, last: datetime | None) -> str | None:
        if (reason := incremental.why_not_now(current, used, last, now, interval)) is not None:
            return reason
        failed = attempts[key]
        return None if failed is None else incremental.why_not_again(failed.run_id, failed.at, now)

    pairs = data_versions(instance, dg.AssetKey([sensor, "pairs"]))
    inputs = fingerprint(pairs, data_versions(instance, dg.AssetKey("ground_embeddings"))) if pairs else None
    made_at, made = latest(instance, training_set)
    # What was requested last is not made of it if that attempt failed.
    reason = why_not(training_set, inputs, None if attempts[training_set] else requested, made_at)
    if reason is None:
        if failed := failed_in_regions(instance, region_keys([sensor])):
            shown = "; ".join([*failed[:MOST_SHOWN], *(["..."] if failed[MOST_SHOWN:] else [])])
            return [], "", f"{shown}: correct the data and materialise it again"
        return [training_set], str(inputs), "pairs changed"
    if failed := failed_checks(instance, training_set):
        return [], "", f"training_set failed {', '.join(failed)}: correct the data and materialise it again"
    reasons = [f"training_set: {reason}"]
    snapshot, due = made.get("fingerprint"), []
    for encoder in encoders:
        trained_at, trained = latest(instance, encoder)
        used = str(trained.get("training_set", "")).removeprefix("snapshot=") or None
        reason = why_not(encoder, snapshot, used, trained_at)
        if reason is None:
            due.append(encoder)
        else:
            reasons.append(f"{encoder.path[-1]}: {reason}")
    return due, str(snapshot), "training set changed" if due else "; ".join(reasons)

"""What Dagster's instance knows: when regions were searched, which are busy, what was made of an asset last.

What follows from it is decided in incremental.py and carried out by the schedule and sensors of automation.py.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import dagster as dg

# Not public, but the only way to what Dagster's own pages show of partitions.
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES

from graft_pipeline import rules
from graft_pipeline.incremental import RegionState
from graft_pipeline.partitions import REGION_PARTITIONS

SEARCHES = dg.AssetKey("flickr_photos")


@dataclass(frozen=True)
class _Search:
    """What the last materialisation of a region's `flickr_photos` says."""

    storage_id: int
    at: datetime
    is_whole: bool
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
    failed, busy = _open_attempts(
        instance, [SEARCHES, *(dg.AssetKey([sensor, "pairs"]) for sensor in sensors)]
    )
    busy |= partitions_of_backfills(instance)
    states = []
    for key in sorted(instance.get_dynamic_partitions(str(REGION_PARTITIONS.name))):
        search = searches.get(key)
        states.append(
            RegionState(
                key,
                searched_at=search.at if search else None,
                is_whole_search=search is not None and search.is_whole,
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
                bool(values.get("is_whole_search", False)),
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


def partitions_of_backfills(instance: dg.DagsterInstance) -> set[str]:
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


@dataclass(frozen=True)
class Attempt:
    """The last run that was to make an asset, if it has not.

    Attributes:
        run_id: its id.
        at: when it was created, UTC.
        goes_on: whether it is queued or in progress, and may still.
    """

    run_id: str
    at: datetime
    goes_on: bool


def open_attempt(instance: dg.DagsterInstance, key: dg.AssetKey) -> Attempt | None:
    """The last attempt at an unpartitioned asset, whatever job it is of; None if it came to a good end."""
    planned = instance.event_log_storage.get_latest_planned_materialization_info(key)
    if planned is None or (record := instance.get_run_record_by_id(planned.run_id)) is None:
        return None
    attempt = Attempt(
        planned.run_id,
        record.create_timestamp.replace(tzinfo=UTC),
        record.dagster_run.status in NOT_FINISHED_STATUSES,
    )
    for made in instance.fetch_materializations(key, limit=1).records:
        if made.run_id == attempt.run_id or (not attempt.goes_on and made.storage_id > planned.storage_id):
            return None
    return attempt


def last_events(instance: dg.DagsterInstance, keys: Iterable[dg.AssetKey]) -> list[list[int | None]]:
    """Storage ids of the last materialisations of unpartitioned assets, and of the last plans to make them."""
    found = []
    for key in keys:
        planned = instance.event_log_storage.get_latest_planned_materialization_info(key)
        made = instance.fetch_materializations(key, limit=1).records
        found.append([made[0].storage_id if made else None, planned.storage_id if planned else None])
    return found


def latest(instance: dg.DagsterInstance, key: dg.AssetKey) -> tuple[datetime | None, dict[str, Any]]:
    """When an unpartitioned asset was made last, and its metadata."""
    records = instance.fetch_materializations(key, limit=1).records
    if not records or records[0].asset_materialization is None:
        return None, {}
    metadata = records[0].asset_materialization.metadata
    return datetime.fromtimestamp(records[0].timestamp, UTC), {n: v.value for n, v in metadata.items()}


def failed_checks(instance: dg.DagsterInstance, key: dg.AssetKey) -> list[str]:
    """Checks of an unpartitioned asset that its latest data failed and that block what lies downstream, sorted.

    Dagster itself holds back only steps of the same run.
    """
    keys = [dg.AssetCheckKey(key, name) for name in rules.DESCRIPTIONS if name not in rules.WARNINGS]
    found = instance.event_log_storage.get_latest_asset_check_execution_by_key(keys)
    failed = AssetCheckExecutionRecordStatus.FAILED
    return sorted(check.name for check, record in found.items() if record.status == failed)


def failed_in_regions(instance: dg.DagsterInstance, keys: Iterable[dg.AssetKey]) -> list[str]:
    """Blocking checks that the latest data of regions failed, in words.

    Args:
        instance: the instance.
        keys: assets that are partitioned by region.

    Returns:
        Such as `naip/tiles of N42W072 failed schema`.
    """
    storage, failed = instance.event_log_storage, AssetCheckExecutionRecordStatus.FAILED
    # Few checks ever fail: only of those are all regions looked at.
    doubtful = [
        check
        for key in keys
        for name in sorted(rules.DESCRIPTIONS.keys() - rules.WARNINGS)
        if storage.get_asset_check_execution_history(
            check := dg.AssetCheckKey(key, name), limit=1, status={failed}
        )
    ]
    return [
        f"{info.check_key.asset_key.to_user_string()} of {info.partition_key} failed {info.check_key.name}"
        for info in storage.get_asset_check_partition_info(doubtful)
        if info.latest_execution_status == failed
        and info.latest_check_event_storage_id > (info.latest_materialization_storage_id or math.inf)
    ]


def data_versions(instance: dg.DagsterInstance, key: dg.AssetKey) -> dict[str, str]:
    """Data versions of an asset's partitions."""
    tag = "dagster/data_version"
    found = instance.event_log_storage.get_latest_tags_by_partition(
        key, dg.DagsterEventType.ASSET_MATERIALIZATION, [tag]
    )
    return {partition: tags[tag] for partition, tags in found.items()}

"""What Dagster's event log holds of the assets that one tile or photo came through.

How it is shown, beside the rows of the datasets, is in graft_pipeline/trace.py.
"""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

import dagster as dg
from dagster._core.event_api import PartitionKeyFilter

from assets.keys import FOUNDATION_KEY
from graft_pipeline import rules, schemas
from graft_pipeline.grid import SUFFIX
from graft_pipeline.lineage import MODELS
from graft_pipeline.trace import Check, Step, Trace

#: What makes tiles that no photo centres (assets/grid.py).
GRID_ASSETS = ("grid_chips", "grid_embeddings")
CODE_VERSION, DATA_VERSION = "dagster/code_version", "dagster/data_version"


def history(instance: dg.DagsterInstance, found: Trace) -> list[Step]:
    """The latest materialisation of every asset that an item came through, with its checks.

    Args:
        instance: whose event log is read.
        found: the item.

    Returns:
        The steps, upstream first; assets that were never materialised are left out.
    """
    return [step for key, partition in _assets(found) for step in _steps(instance, key, partition)]


def _assets(found: Trace) -> Iterator[tuple[dg.AssetKey, str | None]]:
    """Keys and partitions, upstream first."""
    yield dg.AssetKey(schemas.REGIONS.name), None
    yield FOUNDATION_KEY, None
    for region in found.regions:
        yield from ((dg.AssetKey(name), region) for name in _by_region(("region",)))
    for sensor in found.sensors:
        if sensor.endswith(SUFFIX):
            of = sensor.removesuffix(SUFFIX)
            for region in found.regions:
                yield from ((dg.AssetKey([of, name]), region) for name in ("scenes", *GRID_ASSETS))
            continue
        for region in found.regions:
            names = [
                name for name in _by_region(("sensor", "region")) if name != schemas.CHIP_EMBEDDINGS.name
            ]
            yield from ((dg.AssetKey([sensor, name]), region) for name in names)
        for name in (schemas.TRAINING_PAIRS.name, *MODELS):
            yield dg.AssetKey([sensor, name]), None
        for region in found.regions:
            yield dg.AssetKey([sensor, schemas.CHIP_EMBEDDINGS.name]), region
        yield dg.AssetKey([sensor, "search_index"]), None


def _by_region(partitions: tuple[str, ...]) -> list[str]:
    return [dataset.name for dataset in schemas.DATASETS.values() if dataset.partitions == partitions]


def _steps(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str | None) -> Iterator[Step]:
    partitions = None if partition is None else [partition]
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(key, asset_partitions=partitions), limit=1
    )
    for record in records.records:
        made = record.asset_materialization
        assert made is not None
        tags, seconds = made.tags or {}, made.metadata.get("seconds")
        yield Step(
            asset=key.to_user_string(),
            partition=partition,
            at=datetime.fromtimestamp(record.timestamp, UTC),
            run_id=record.run_id,
            # Assets without a code version of their own get the run's id.
            code_version="" if tags.get(CODE_VERSION) == record.run_id else tags.get(CODE_VERSION, ""),
            data_version=tags.get(DATA_VERSION, ""),
            seconds=None if seconds is None else float(seconds.value),
            checks=tuple(_checks(instance, key, partition)),
        )


def _checks(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str | None) -> Iterable[Check]:
    """The latest outcome of each rule for an asset's partition."""
    keys = [dg.AssetCheckKey(key, name) for name in rules.DESCRIPTIONS]
    latest = instance.event_log_storage.get_latest_asset_check_execution_by_key(
        keys, partition_filter=None if partition is None else PartitionKeyFilter(key=partition)
    )
    for check_key in keys:
        record = latest.get(check_key)
        event = record.event if record else None
        evaluation = (
            event.dagster_event.asset_check_evaluation_data if event and event.dagster_event else None
        )
        if evaluation is not None:
            severe = evaluation.severity == dg.AssetCheckSeverity.ERROR
            outcome = "passed" if evaluation.passed else "failed" if severe else "warns"
            yield Check(check_key.name, outcome, evaluation.description or "")

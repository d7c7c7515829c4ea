"""Backfills from the command line: the deployment's instance, an area's regions, and the request to its daemon.

Which of the regions are due is decided in incremental.py; what starts by the clock is in automation.py.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

# Not public, but the only way to a backfill without a webserver.
from dagster._core.execution.backfill import PartitionBackfill
from dagster._core.utils import make_new_backfill_id
from dotenv import dotenv_values

from graft_pipeline import areas
from graft_pipeline.automation import MAX_RUNTIME, region_keys
from graft_pipeline.errors import InputError, SettingsError

if TYPE_CHECKING:
    from resources.storage import Storage


def dagster_home() -> str:
    """Folder of the deployment's instance: DAGSTER_HOME, or what the settings' env file says of it; empty: unknown."""
    env_file = os.environ.get("GRAFT_ENV_FILE", ".env")
    return os.environ.get("DAGSTER_HOME") or dotenv_values(env_file or os.devnull).get("DAGSTER_HOME") or ""


@contextmanager
def deployed_instance() -> Iterator[dg.DagsterInstance]:
    """The instance of DAGSTER_HOME.

    Raises:
        SettingsError: if there is none.
    """
    home = dagster_home()
    if not Path(home).is_dir() or not Path(home).is_absolute():
        raise SettingsError(
            f"DAGSTER_HOME is {home!r}: set it to the absolute path of the folder with the deployment's dagster.yaml."
        )
    os.environ["DAGSTER_HOME"] = home
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

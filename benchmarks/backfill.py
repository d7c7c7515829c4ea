"""A backfill of regions as a deployment makes it: `graft backfill`, the queue, several workers, faults, and a kill.

`python benchmarks/backfill.py [--regions N] [--fault-rate R] [--workers N] [--json FILE]`. Code server, daemon and
planet are processes of their own on an instance in SQLite; one worker is ended by SIGKILL, and nobody helps. Prints
throughput and what Dagster adds to a partition (waits for pools included; --workers 1 has none).
Ends with 1 unless every asset of every region is there and broke no rule.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import mean
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
# Processes on loopback, as the rehearsal of the deployment starts them.
sys.path[:] = [
    str(ROOT / "deploy"),
    *(path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent),
]

from rehearse import Processes, answers, free_port, wait_for, workers_of  # noqa: E402

AREA = "backfill"
WEST, SOUTH, GRID_DEG = -71.5, 42.0, 0.25


def box(regions: int) -> dict[str, Any]:
    """An area of so many regions, as square as it goes."""
    rows = max(row for row in range(1, math.isqrt(regions) + 1) if regions % row == 0)
    margin = 0.01
    west, south = WEST + margin, SOUTH + margin
    east, north = WEST + GRID_DEG * (regions // rows) - margin, SOUTH + GRID_DEG * rows - margin
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {"type": "Polygon", "coordinates": [ring]}


class Memory:
    """Largest resident sets of processes by name, and of any worker, MB; sampled once a second."""

    def __init__(self, names: dict[str, int]) -> None:
        self.peak_mb: Counter[str] = Counter()
        self._names, self._done = names, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(1):
            members = [(name, psutil.Process(pid)) for name, pid in self._names.items()]
            members += [("worker", worker) for worker in workers_of(self._names["code server"])]
            for name, process in members:
                with suppress(psutil.NoSuchProcess):
                    self.peak_mb[name] = max(self.peak_mb[name], round(process.memory_info().rss / 1e6))


def prepare(folder: Path, options: argparse.Namespace) -> tuple[dict[str, str], dict[str, int]]:
    """The instance's folder and the environment of all processes."""
    home = folder / "dagster_home"
    home.mkdir()
    text = (ROOT / "dagster.yaml").read_text()
    workers = f"max_concurrent_runs: {options.workers}"
    (home / "dagster.yaml").write_text(text.replace("max_concurrent_runs: 4", workers))
    ports = {name: free_port() for name in ("planet", "code")}
    server = f"{{host: 127.0.0.1, port: {ports['code']}, location_name: graft_pipeline}}"
    (folder / "workspace.yaml").write_text(f"load_from:\n  - grpc_server: {server}\n")
    (folder / "area.geojson").write_text(json.dumps(box(options.regions)))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
    return {
        **inherited,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DAGSTER_HOME": str(home),
        # Threads that wait for work sleep: workers share the cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GRAFT_ENV_FILE": os.devnull,
        "GRAFT_WORLD": "planet",
        "GRAFT_PLANET__URL": f"http://127.0.0.1:{ports['planet']}",
        "GRAFT_ROOT": str(folder / "data"),
        "GRAFT_GRID_DEG": str(GRID_DEG),
        "GRAFT_SEARCH_LOCATIONS_PER_REGION": str(options.locations),
        "GRAFT_SEARCH_RADIUS_KM": str(options.radius_km),
        "GRAFT_FLICKR_CALLS_PER_HOUR": "3600000",
        "GRAFT_RECIPE": "smoke",
    }, ports


def measure(stack: ExitStack, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    environment, ports = prepare(folder, options)
    os.environ.update(environment)

    import dagster as dg

    from graft_pipeline.definitions import build_defs

    processes = Processes(stack, folder, environment)
    started = [sys.executable, "-m", "graft_pipeline.cli", "planet", "serve", "--port", str(ports["planet"])]
    processes.start("planet", *started, "--fault-rate", str(options.fault_rate))
    wait_for("The planet", answers(ports["planet"]), processes)
    graft = [sys.executable, "-m", "graft_pipeline.cli"]
    subprocess.run([*graft, "areas", "add", str(folder / "area.geojson"), "--name", AREA], check=True)
    definitions = build_defs()
    instance = stack.enter_context(dg.DagsterInstance.get())
    definitions.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance,
        asset_selection=[dg.AssetKey(["openclip", "foundation"])],
        run_config={"loggers": {"console": {"config": {"log_level": "ERROR"}}}},
    )
    serve = ["api", "grpc", "-h", "127.0.0.1", "-p", str(ports["code"]), "-m", "graft_pipeline.definitions"]
    code = processes.start("code", "dagster", *serve)
    wait_for("The code server", answers(ports["code"]), processes)
    daemon = processes.start("daemon", "dagster-daemon", "run", "-w", str(folder / "workspace.yaml"))

    begun = time.time()
    subprocess.run([*graft, "backfill", "--area", AREA], check=True)
    (backfill,) = instance.get_backfills()
    with Memory({"code server": code.pid, "daemon": daemon.pid}) as memory:
        killed = (
            None if options.no_kill else kill_a_worker(instance, backfill.backfill_id, code.pid, processes)
        )
        done = wait_for("The backfill", lambda: is_over(instance, backfill.backfill_id), processes, 7200)
    return {
        "settings": {
            name: getattr(options, name) for name in ("regions", "fault_rate", "workers", "locations")
        },
        "killed": killed,
        **outcome(instance, backfill.backfill_id, time.time() - begun),
        "status": done,
        "peak_mb": dict(memory.peak_mb),
    }


def is_over(instance: Any, backfill_id: str) -> str:
    """How a backfill ended, once it did and none of its runs goes on; until then nothing."""
    import dagster as dg
    from dagster._core.execution.backfill import BULK_ACTION_TERMINAL_STATUSES
    from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES

    found = instance.get_backfill(backfill_id)
    going_on = dg.RunsFilter(tags={"dagster/backfill": backfill_id}, statuses=NOT_FINISHED_STATUSES)
    if found.status not in BULK_ACTION_TERMINAL_STATUSES or instance.get_runs_count(going_on):
        return ""
    return str(found.status.value)


def kill_a_worker(instance: Any, backfill_id: str, code_server: int, processes: Processes) -> dict[str, Any]:
    """End by SIGKILL a process that executes a run, in the middle of it."""
    import dagster as dg

    going_on = dg.RunsFilter(tags={"dagster/backfill": backfill_id}, statuses=[dg.DagsterRunStatus.STARTED])

    def under_way() -> Any:
        for run in instance.get_runs(going_on):
            if len(instance.get_run_step_stats(run.run_id)) >= 3:
                return run
        return None

    run = wait_for("A run under way", under_way, processes, 600)
    # The workers of a code server name their runs nowhere: the oldest is the one that has come furthest.
    worker = min(
        wait_for("A worker", lambda: workers_of(code_server), processes),
        key=lambda found: found.create_time(),
    )
    worker.kill()
    return {
        "pid": worker.pid,
        "during_the_run_of": run.tags["dagster/asset_partition_range_start"],
        "at": time.time(),
    }


def outcome(instance: Any, backfill_id: str, wall_s: float) -> dict[str, Any]:
    """What is there, which rules were broken, and where the time went."""
    import dagster as dg

    from graft_pipeline.automation import region_keys
    from graft_pipeline.settings import load_settings

    regions = set(instance.get_dynamic_partitions("region"))
    keys = region_keys(load_settings().sensor_records)
    missing = {
        key.to_user_string(): sorted(absent)
        for key in keys
        if (absent := regions - set(instance.get_materialized_partitions(key)))
    }
    violations, evaluations = 0, 0
    checks = dg.EventRecordsFilter(dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    for record in instance.event_log_storage.get_event_records(checks):
        evaluation = record.event_log_entry.dagster_event.asset_check_evaluation_data
        evaluations += 1
        if not evaluation.passed:
            violations += int(evaluation.metadata["violations"].value)
    runs = instance.get_run_records(dg.RunsFilter(tags={"dagster/backfill": backfill_id}))
    good = [record for record in runs if record.dagster_run.status == dg.DagsterRunStatus.SUCCESS]
    rows = [times(instance, record) for record in good]
    where = {name: round(mean(row[name] for row in rows), 2) for name in rows[0]} if rows else {}
    steps = where.get("steps_s", 0.0)
    return {
        "regions": len(regions),
        "missing": missing,
        "violations": violations,
        "checks": evaluations,
        "runs": len(runs),
        "runs_not_successful": len(runs) - len(good),
        "wall_s": round(wall_s, 1),
        "regions_per_minute": round(60 * len(regions) / wall_s, 2),
        "mean_of_a_run": where,
        "dagster_s_per_partition": round(where.get("process_s", 0.0) + where.get("between_steps_s", 0.0), 2),
        "dagster_share": round(1 - steps / (sum(where.values()) - where["queued_s"]), 3) if where else None,
    }


def times(instance: Any, record: Any) -> dict[str, float]:
    """Where the time of a run went."""
    import dagster as dg

    starting = instance.get_records_for_run(
        record.dagster_run.run_id, of_type=dg.DagsterEventType.PIPELINE_STARTING
    ).records[0]
    launched = starting.event_log_entry.timestamp
    steps = instance.get_run_step_stats(record.dagster_run.run_id)
    busy = sum(step.end_time - step.start_time for step in steps if step.end_time and step.start_time)
    return {
        "queued_s": launched - record.create_timestamp.timestamp(),
        # A process that imports the definitions.
        "process_s": record.start_time - launched,
        "steps_s": busy,
        # With several workers mostly waits for pools; with --workers 1 what Dagster itself takes.
        "between_steps_s": record.end_time - record.start_time - busy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--regions", type=int, default=50)
    parser.add_argument(
        "--fault-rate", type=float, default=0.1, help="share of the planet's answers that are faults"
    )
    parser.add_argument("--workers", type=int, default=4, help="runs at a time")
    parser.add_argument("--locations", type=int, default=3, help="search locations of a region")
    parser.add_argument("--radius-km", type=float, default=2.0, help="of the searches: how large a region is")
    parser.add_argument("--no-kill", action="store_true")
    parser.add_argument(
        "--keep", type=Path, help="folder for data, instance and logs; replaced if it is there"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    with ExitStack() as stack:
        if options.keep:
            shutil.rmtree(options.keep, ignore_errors=True)
            options.keep.mkdir(parents=True)
        folder = options.keep or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="graft-backfill-"))
        )
        result = measure(stack, folder.resolve(), options)
    result["cpu_s"] = round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), 1)
    width = max(map(len, result))
    for name, value in result.items():
        print(f"{name:<{width}}  {value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    is_complete = (
        not result["missing"] and not result["violations"] and result["status"] == "COMPLETED_SUCCESS"
    )
    if not is_complete or (result["killed"] and result["runs"] == result["regions"]):
        sys.exit(1)


if __name__ == "__main__":
    main()

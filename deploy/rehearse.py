"""Rehearses a deployment on one machine, without containers: the processes of compose.yaml, a backfill, a kill.

PostgreSQL holds Dagster's state and a bucket of an S3 server the data and the logs; code server (gRPC), daemon and
webserver are processes of their own, configured by this folder's dagster.yaml and workspace.yaml; the planet answers
with faults. Regions go through the run queue, one worker is killed with SIGKILL, and nobody helps.

    python deploy/rehearse.py --regions 8 --fault-rate 0.1 --json rehearsal.json

Needs PostgreSQL's server programs (Debian: apt-get install postgresql) and the extra `dev`.
"""

import argparse
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
import requests

DEPLOY = Path(__file__).parent.resolve()
WEST, SOUTH = -70.5, 41.75
PASSWORD = "rehearsed"
BUCKETS = ("graft", "graft-logs")
LOCATION = {"repositoryLocationName": "graft_pipeline", "repositoryName": "__repository__"}
ALIVE = ("QUEUED", "NOT_STARTED", "STARTING", "STARTED", "CANCELING")

LAUNCH = """mutation Launch($params: ExecutionParams!) { launchRun(executionParams: $params) { __typename
  ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
BACKFILL = """mutation Backfill($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {
  __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"""
BACKFILL_STATUS = """query Status($id: String!) { partitionBackfillOrError(backfillId: $id) {
  ... on PartitionBackfill { status numPartitions } } }"""
RUNS = """query Runs($filter: RunsFilter!) { runsOrError(filter: $filter) { ... on Runs { results { runId status
  creationTime startTime endTime tags { key value } stepStats { stepKey status startTime endTime } } } } }"""
JOB = """query Job($job: PipelineSelector!) { assetNodes(pipeline: $job) { assetKey { path } } }"""
STATUS = """query Keys($keys: [AssetKeyInput!]) { assetNodes(assetKeys: $keys) { assetKey { path }
  partitionStats { numMaterialized numFailed numPartitions } } }"""


class Processes:
    """The deployment's processes; each is ended, with its children, when the stack closes."""

    def __init__(self, stack: ExitStack, folder: Path, environment: dict[str, str]) -> None:
        self._stack, self.folder, self.environment = stack, folder, environment
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start one; what it says goes to a file of its name."""
        log = self._stack.enter_context((self.folder / f"{name}.log").open("ab"))
        process = subprocess.Popen(
            command,
            env=self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )
        self._running[name] = process
        self._stack.callback(_end, process)
        return process

    def check(self) -> None:
        """Say so if one has ended by itself."""
        for name, process in self._running.items():
            if process.poll() is not None:
                log = (self.folder / f"{name}.log").read_text(errors="replace")
                raise SystemExit(f"The {name} ended with {process.returncode}:\n{log[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_for(what: str, condition: Callable[[], Any], processes: Processes, limit_s: float = 180.0) -> Any:
    """Wait until something is so.

    Raises:
        SystemExit: if it takes too long, or a process ends meanwhile.
    """
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        processes.check()
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {limit_s:.0f} s.")
        time.sleep(0.2)
    return found


def answers(port: int) -> Callable[[], bool]:
    """Whether something listens on a port."""

    def check() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    return check


def postgres_programs() -> Path:
    """Folder of initdb, postgres and createdb."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("postgres")
    if not debian and not found:
        raise SystemExit(
            "No PostgreSQL server here: apt-get install postgresql, or put its programs on the PATH."
        )
    return debian[0] if debian else Path(str(found)).parent


@contextmanager
def postgres(processes: Processes, port: int) -> Iterator[None]:
    """A database cluster that lives as long as the context."""
    programs = postgres_programs()
    # PostgreSQL refuses to run as root.
    user = {"user": "postgres"} if os.geteuid() == 0 else {}
    owner = pwd.getpwnam("postgres").pw_uid if user else os.geteuid()
    with tempfile.TemporaryDirectory(prefix="graft-postgres-") as folder:
        os.chown(folder, owner, -1)
        secret = Path(folder) / "password"
        secret.write_text(PASSWORD)
        os.chown(secret, owner, -1)
        cluster = f"{folder}/cluster"
        made = [
            programs / "initdb",
            "-D",
            cluster,
            "-U",
            "dagster",
            "-A",
            "scram-sha-256",
            f"--pwfile={secret}",
        ]
        subprocess.run(made, check=True, capture_output=True, cwd=folder, **user)
        options = ["-D", cluster, "-p", str(port), "-h", "127.0.0.1", "-k", folder]
        processes.start("postgres", str(programs / "postgres"), *options, cwd=folder, **user)
        wait_for("PostgreSQL", answers(port), processes)
        command = [programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "dagster", "dagster"]
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        for _ in range(50):
            # It listens before it takes commands.
            if subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.2)
        else:
            raise SystemExit("PostgreSQL takes no commands.")
        yield


class Ui:
    """The webserver's GraphQL, which the Dagster UI itself speaks."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, query: str, **variables: Any) -> Any:
        """One query or mutation; its only field."""
        answer = requests.post(
            f"{self._url}/graphql", json={"query": query, "variables": variables}, timeout=60
        )
        found = answer.json()
        if "errors" in found:
            raise SystemExit(f"The webserver refuses: {found['errors']}")
        (field,) = found["data"].values()
        return field

    def run(self, processes: Processes, job: str, *assets: str) -> None:
        """Launch a run through the queue and wait for its success."""
        keys = [{"path": asset.split("/")} for asset in assets]
        params: dict[str, Any] = {
            "selector": {**LOCATION, "pipelineName": job, **({"assetSelection": keys} if keys else {})},
            "runConfigData": {},
        }
        launched = self.ask(LAUNCH, params=params)
        if launched["__typename"] != "LaunchRunSuccess":
            raise SystemExit(f"{job} cannot be launched: {launched}")
        run_id = launched["run"]["runId"]

        def status() -> str:
            found: str = self.ask(RUNS, filter={"runIds": [run_id]})["results"][0]["status"]
            return "" if found in ALIVE else found

        if (ended := wait_for(job, status, processes, 600)) != "SUCCESS":
            raise SystemExit(f"{job} ended with {ended}; its events are in the webserver.")

    def runs_of(self, backfill: str) -> list[dict[str, Any]]:
        """Runs of a backfill, those that were started again included."""
        found: list[dict[str, Any]] = self.ask(
            RUNS, filter={"tags": [{"key": "dagster/backfill", "value": backfill}]}
        )["results"]
        return found


def workers_of(code_server: int) -> list[psutil.Process]:
    """Processes of the code server in which runs are executed."""
    found = []
    for child in psutil.Process(code_server).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def box(regions: int) -> dict[str, Any]:
    """An area of so many quarter-degree regions, two rows of them, of one UTM zone."""
    columns = -(-regions // 2)
    margin = 0.01
    east, north = WEST + 0.25 * columns - margin, SOUTH + (0.5 if regions > 1 else 0.25) - margin
    west, south = WEST + margin, SOUTH + margin
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}


def main() -> None:
    """Run the rehearsal and print what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--regions", type=int, default=4, help="regions that are collected; an even number")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--locations", type=int, default=4, help="search locations of a region")
    parser.add_argument(
        "--fault-rate", type=float, default=0.0, help="share of the planet's answers that are faults"
    )
    parser.add_argument("--no-kill", action="store_true", help="kill no worker")
    parser.add_argument("--keep", type=Path, help="folder for logs; default: a temporary one")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = options.keep or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="graft-rehearsal-"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        figures = rehearse(stack, folder.resolve(), options)
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def rehearse(stack: ExitStack, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything, in order; the figures."""
    ports = {name: free_port() for name in ("postgres", "bucket", "planet", "code", "webserver")}
    home = folder / "dagster_home"
    home.mkdir(exist_ok=True)
    text = (DEPLOY / "dagster.yaml").read_text()
    workers = f"max_concurrent_runs: {options.workers}"
    (home / "dagster.yaml").write_text(text.replace("max_concurrent_runs: 4", workers))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DAGSTER_HOME": str(home),
        "DAGSTER_DISABLE_TELEMETRY": "yes",
        "OMP_WAIT_POLICY": "PASSIVE",
        "DAGSTER_PG_HOST": "127.0.0.1",
        "DAGSTER_PG_PORT": str(ports["postgres"]),
        "DAGSTER_PG_USERNAME": "dagster",
        "DAGSTER_PG_PASSWORD": PASSWORD,
        "DAGSTER_PG_DB": "dagster",
        "DAGSTER_LOGS_BUCKET": BUCKETS[1],
        "DAGSTER_CODE_HOST": "127.0.0.1",
        "DAGSTER_CODE_PORT": str(ports["code"]),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['bucket']}",
        "AWS_ACCESS_KEY_ID": "rehearsal",
        "AWS_SECRET_ACCESS_KEY": PASSWORD,
        "AWS_DEFAULT_REGION": "us-east-1",
        "GRAFT_ENV_FILE": os.devnull,
        "GRAFT_WORLD": "planet",
        "GRAFT_PLANET__URL": f"http://127.0.0.1:{ports['planet']}",
        "GRAFT_ROOT": f"s3://{BUCKETS[0]}/data",
        "GRAFT_GRID_DEG": "0.25",
        "GRAFT_SEARCH_LOCATIONS_PER_REGION": str(options.locations),
        "GRAFT_SEARCH_RADIUS_KM": "3",
        "GRAFT_RECIPE": "smoke",
    }
    processes = Processes(stack, folder, environment)
    python = sys.executable
    stack.enter_context(postgres(processes, ports["postgres"]))
    processes.start("bucket", python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(ports["bucket"]))
    faults = ["--latency-ms", "20", "--fault-rate", str(options.fault_rate)]
    processes.start("planet", "graft", "planet", "serve", "--port", str(ports["planet"]), *faults)
    for name in ("bucket", "planet"):
        wait_for(name, answers(ports[name]), processes)
    make = f"import boto3\nfor name in {BUCKETS}: boto3.client('s3').create_bucket(Bucket=name)"
    subprocess.run([python, "-c", make], env=environment, check=True)
    # Runs that start together on a new database would each make a pool, and all but one fail.
    for pool in ("flickr", "imagery", "gpu"):
        command = ["dagster", "instance", "concurrency", "set", pool, "1"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    (folder / "area.geojson").write_text(json.dumps(box(options.regions)))
    add = ["graft", "areas", "add", str(folder / "area.geojson")]
    subprocess.run(add, env=environment, check=True, capture_output=True)

    port = str(ports["code"])
    serve = ["api", "grpc", "-h", "127.0.0.1", "-p", port, "-m", "graft_pipeline.definitions"]
    code = processes.start("code", "dagster", *serve)
    wait_for("The code server", answers(ports["code"]), processes)
    workspace = ["-w", str(DEPLOY / "workspace.yaml")]
    processes.start("daemon", "dagster-daemon", "run", *workspace)
    where = ["-h", "127.0.0.1", "-p", str(ports["webserver"])]
    processes.start("webserver", "dagster-webserver", *where, *workspace)
    wait_for("The webserver", answers(ports["webserver"]), processes)
    ui = Ui(f"http://127.0.0.1:{ports['webserver']}")
    ui.run(processes, "register_regions")
    ui.run(processes, "__ASSET_JOB", "openclip/foundation")

    shown = ui.ask("{ instance { info } }")["info"]
    if PASSWORD in shown or "compute_logs" not in shown:
        raise SystemExit(f"The UI's page of the instance is not as it should be:\n{shown}")
    names = partitions(ui)
    started = time.monotonic()
    # As the UI does for assets: a job's backfill would call itself failed for the run that was killed.
    nodes = ui.ask(JOB, job={**LOCATION, "pipelineName": "collect_region"})
    selection = [node["assetKey"] for node in nodes]
    launched = ui.ask(BACKFILL, params={"assetSelection": selection, "partitionNames": names})
    if launched["__typename"] != "LaunchBackfillSuccess":
        raise SystemExit(f"The backfill cannot be launched: {launched}")
    backfill = launched["backfillId"]
    killed = None if options.no_kill else kill_a_worker(ui, backfill, code.pid, processes)

    def is_done() -> bool:
        runs = ui.runs_of(backfill)
        status = ui.ask(BACKFILL_STATUS, id=backfill)["status"]
        alive = any(run["status"] in ALIVE for run in runs)
        good = {partition_of(run) for run in runs if run["status"] == "SUCCESS"}
        return status not in ("REQUESTED", "CANCELING") and not alive and good == set(names)

    wait_for("The backfill", is_done, processes, 3600)
    wall_s = time.monotonic() - started
    return report(ui, backfill, names, wall_s, killed, environment)


def partitions(ui: Ui) -> list[str]:
    """Keys of the registered regions."""
    query = """query Keys($keys: [AssetKeyInput!]) { assetNodes(assetKeys: $keys) { partitionKeys } }"""
    names: list[str] = ui.ask(query, keys=[{"path": ["flickr_photos"]}])[0]["partitionKeys"]
    return names


def partition_of(run: dict[str, Any]) -> str:
    """A run's region."""
    return {tag["key"]: str(tag["value"]) for tag in run["tags"]}["dagster/partition"]


def failed_steps(run: dict[str, Any]) -> list[str]:
    """Steps of a run that failed; a worker that is gone has none."""
    return [step["stepKey"] for step in run["stepStats"] if step["status"] == "FAILURE"]


def kill_a_worker(ui: Ui, backfill: str, code_server: int, processes: Processes) -> str:
    """Kill one of the processes that execute a run, in the middle of it; which."""

    def is_under_way() -> bool:
        runs = ui.runs_of(backfill)
        return any(run["status"] == "STARTED" and len(run["stepStats"]) >= 2 for run in runs)

    wait_for("A run under way", is_under_way, processes, 600)
    worker = wait_for("A worker", lambda: workers_of(code_server), processes)[0]
    worker.kill()
    return f"pid {worker.pid}, {time.time() - worker.create_time():.0f} s old"


def report(
    ui: Ui, backfill: str, names: list[str], wall_s: float, killed: str | None, environment: dict[str, str]
) -> dict[str, Any]:
    """What the backfill came to, and what it took."""
    runs = ui.runs_of(backfill)
    good = [run for run in runs if run["status"] == "SUCCESS"]
    keys = ["outdoor_photos", "naip/pairs", "sentinel2/pairs"]
    stats = ui.ask(STATUS, keys=[{"path": key.split("/")} for key in keys])
    busy = [sum(step["endTime"] - step["startTime"] for step in run["stepStats"]) for run in good]
    took = [run["endTime"] - run["startTime"] for run in good]
    from_start = [run["endTime"] - run["creationTime"] for run in good]
    count = "import boto3; s3 = boto3.client('s3'); print(*(sum(p['KeyCount'] for p in s3.get_paginator("
    count += f"'list_objects_v2').paginate(Bucket=name)) for name in {BUCKETS}))"
    counted = subprocess.run(
        [sys.executable, "-c", count], env=environment, check=True, capture_output=True, text=True
    )
    data, logs = counted.stdout.split()
    failed = [run for run in runs if run["status"] != "SUCCESS"]
    is_complete = {partition_of(run) for run in good} == set(names) and all(
        node["partitionStats"]["numMaterialized"] == len(names) for node in stats
    )
    return {
        "complete": is_complete,
        "regions": len(names),
        "worker killed": killed or "none",
        "runs": len(runs),
        "runs that did not succeed": len(failed),
        "of those, without a step that failed": sum(not failed_steps(run) for run in failed),
        "backfill's status": ui.ask(BACKFILL_STATUS, id=backfill)["status"],
        "wall_s": round(wall_s, 1),
        "regions a minute": round(60 * len(names) / wall_s, 2),
        "mean run_s": round(mean(took), 2),
        "mean steps_s": round(mean(busy), 2),
        "Dagster's own share of a run": f"{1 - sum(busy) / sum(took):.0%}",
        "mean wait before start_s": round(mean(a - b for a, b in zip(from_start, took, strict=True)), 1),
        "objects of data": int(data),
        "objects of logs": int(logs),
        "materialised": {
            "/".join(n["assetKey"]["path"]): n["partitionStats"]["numMaterialized"] for n in stats
        },
    }


if __name__ == "__main__":
    main()

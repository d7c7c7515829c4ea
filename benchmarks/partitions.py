"""Twenty thousand region partitions: what loading, a tick, a backfill and the UI's pages take.

`python benchmarks/partitions.py [--regions N] [--materialised SHARE] [--backfill N] [--screenshots FOLDER]`.
A throw-away instance in SQLite; materialisations are events alone, each with a picture as the real ones have. The pages
are opened in a headless Chromium (left out without one), and each request to the webserver's GraphQL is timed. The
backfill is measured until all its runs are queued; none is executed.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
_HERE = Path(__file__).resolve().parent
# Processes on loopback, as the rehearsal of the deployment starts them.
sys.path[:] = [str(ROOT / "deploy"), *(path for path in sys.path if Path(path or ".").resolve() != _HERE)]

from rehearse import Processes, answers, free_port, wait_for  # noqa: E402

#: Assets of which materialisations are made up: what the schedule reads.
ASSETS = ("flickr_photos", "naip/pairs")
PICTURE_BYTES = 15_000


def cover(names: list[str]) -> None:
    """The dataset `regions` of an area that covers all of them."""
    import pyarrow as pa

    from graft_pipeline.regions import Region
    from graft_pipeline.schemas import REGIONS
    from graft_pipeline.settings import load_settings
    from resources.storage import Storage

    corners = ("west_deg", "south_deg", "east_deg", "north_deg")
    cells = [Region.parse(name, 1.0) for name in sorted(names)]
    rows = [
        {"region": of.key, "area": "world", **dict(zip(corners, of.bounds, strict=True)), "epsg": of.epsg}
        for of in cells
    ]
    table = pa.Table.from_pylist([row | {"covered_pct": 100.0} for row in rows], schema=REGIONS.schema)
    Storage.from_settings(load_settings()).write(REGIONS, table)


def region_names(count: int) -> list[str]:
    """Cells of the one-degree grid, from 60 degrees south."""
    from graft_pipeline.regions import Region

    return [Region(float(-60 + n // 360), float(-180 + n % 360)).key for n in range(count)]


class Table:
    """What was measured, printed as it comes."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[dict[str, float]]:
        """Wall and CPU seconds of this process, and its largest resident set so far."""
        row: dict[str, float] = {}
        wall, cpu = time.perf_counter(), time.process_time()
        yield row
        row["wall_s"] = round(time.perf_counter() - wall, 2)
        row["cpu_s"] = round(time.process_time() - cpu, 2)
        row["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
        self.add(name, row)

    def add(self, name: str, row: dict[str, float]) -> None:
        """One more row."""
        self.rows[name] = row
        print(f"{name:<52}", *(f"{key} {value:>9}" for key, value in row.items()), flush=True)


def fill(instance: Any, names: list[str], share: float) -> None:
    """Partitions, and a share of them materialised."""
    import dagster as dg

    instance.add_dynamic_partitions("region", names)
    picture = dg.MetadataValue.md(f"![](data:image/png;base64,{'A' * PICTURE_BYTES})")
    for number in range(round(share * len(names))):
        name = names[number * len(names) // max(1, round(share * len(names)))]
        for asset in ASSETS:
            instance.report_runless_asset_event(
                dg.AssetMaterialization(
                    dg.AssetKey(asset.split("/")),
                    partition=name,
                    metadata={"preview": picture, "flickr_calls": 100, "photos_per_day": number % 50 / 10},
                    tags={"dagster/data_version": str(number)},
                )
            )


def load_definitions(table: Table) -> None:
    """Importing the definitions, in a process of its own."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-W", "ignore", "-c", "import graft_pipeline.definitions"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    row = {"wall_s": round(time.perf_counter() - started, 2), "cpu_s": round(cpu, 2)}
    table.add("load the definitions", {**row, "peak_mb": round(after.ru_maxrss / 1e3)})


def ticks(table: Table, instance: Any, definitions: Any) -> None:
    """The schedule and the sensors, as the code server evaluates them."""
    from datetime import UTC, datetime, timedelta

    import dagster as dg

    schedule = definitions.resolve_schedule_def("collect_stale_regions")
    for name in ("collect_stale_regions, first tick of a code server", "collect_stale_regions, a later tick"):
        context = dg.build_schedule_context(
            instance=instance,
            scheduled_execution_time=datetime.now(UTC) + timedelta(days=30),
            repository_def=definitions.get_repository_def(),
        )
        with table.measure(name) as row:
            row["regions"] = len(schedule.evaluate_tick(context).run_requests)
    cursor = None
    for name in ("automation conditions, first evaluation", "automation conditions, later evaluation"):
        with table.measure(name):
            cursor = dg.evaluate_automation_conditions(definitions, instance, cursor=cursor).cursor
    with table.measure("train_on_change"):
        sensor = definitions.resolve_sensor_def("train_on_change")
        sensor.evaluate_tick(dg.build_sensor_context(instance=instance, definitions=definitions))


def backfill(table: Table, instance: Any, definitions: Any, names: list[str], processes: Processes) -> str:
    """Requesting a backfill, and until the daemon has queued a run for each region."""
    import dagster as dg

    from graft_pipeline import backfills
    from graft_pipeline.settings import load_settings

    sensors = list(load_settings().sensor_records)
    with table.measure(f"request a backfill of {len(names)} regions"):
        backfill_id = backfills.launch_backfill(instance, definitions, sensors, names, [], "benchmark")
    queued = dg.RunsFilter(tags={"dagster/backfill": backfill_id})
    started = time.perf_counter()
    daemon = processes.start(
        "daemon", "dagster-daemon", "run", "-w", str(processes.folder / "workspace.yaml")
    )
    wait_for("The queue", lambda: instance.get_runs_count(queued) > 0, processes, 1800)
    first = time.perf_counter()
    wait_for("The queue", lambda: instance.get_runs_count(queued) >= len(names), processes, 3600)
    row = {"wall_s": round(time.perf_counter() - started, 2), "first_run_s": round(first - started, 2)}
    process = psutil.Process(daemon.pid)
    row["cpu_s"] = round(sum(process.cpu_times()[:2]), 2)
    row["peak_mb"] = round(process.memory_info().rss / 1e6)
    row["s_per_run"] = round((time.perf_counter() - first) / max(1, len(names) - 1), 3)
    table.add(f"daemon: {len(names)} runs queued", row)
    return backfill_id


def pages(table: Table, url: str, server: int, backfill_id: str | None, screenshots: Path | None) -> None:
    """Pages of the UI in a browser: until nothing is asked any more, and the slowest request."""
    from playwright.sync_api import Error, sync_playwright

    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    opened: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "asset graph": ("asset-groups", lambda page: page.get_by_text("ground", exact=True).first.wait_for()),
        "asset, partitions": (
            "assets/flickr_photos?view=partitions",
            lambda page: page.get_by_text("Materialized").first.wait_for(),
        ),
        "job, partitions": (
            "locations/graft_pipeline/jobs/collect_region/partitions",
            lambda page: page.get_by_text("backfill", exact=False).first.wait_for(),
        ),
        "runs": ("runs", lambda page: page.get_by_text("Runs").first.wait_for()),
        "schedules": ("automation", lambda page: page.get_by_text("collect_stale_regions").first.wait_for()),
    }
    if backfill_id:
        opened["backfill"] = (
            f"runs/b/{backfill_id}",
            lambda page: page.get_by_text(backfill_id).first.wait_for(),
        )
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        except Error as error:
            print(f"No browser: {str(error).splitlines()[0]}")
            return
        for name, (path, ready) in opened.items():
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            page.set_default_timeout(180_000)
            requests: list[tuple[float, str, int]] = []

            def finished(request: Any, requests: list[tuple[float, str, int]] = requests) -> None:
                if "/graphql" in request.url and request.method == "POST":
                    with suppress(Error):
                        operation = json.loads(request.post_data or "{}").get("operationName", "?")
                        size = request.sizes()["responseBodySize"]
                        requests.append((request.timing["responseEnd"] / 1e3, operation, size))

            page.on("requestfinished", finished)
            started, cpu = time.perf_counter(), sum(psutil.Process(server).cpu_times()[:2])
            page.goto(f"{url}/{path}")
            ready(page)
            with suppress(Error):
                page.wait_for_load_state("networkidle", timeout=60_000)
            row = {"wall_s": round(time.perf_counter() - started, 2)}
            row["cpu_s"] = round(sum(psutil.Process(server).cpu_times()[:2]) - cpu, 2)
            row["server_mb"] = round(psutil.Process(server).memory_info().rss / 1e6)
            table.add(f"page: {name}", row)
            for seconds, operation, size in sorted(requests, reverse=True)[:3]:
                table.add(f"    {operation}", {"wall_s": round(seconds, 2), "kb": round(size / 1e3)})
            if screenshots:
                page.wait_for_timeout(2000)
                page.screenshot(path=str(screenshots / f"{name.replace(', ', '_').replace(' ', '_')}.png"))
            page.close()
        browser.close()


def run(stack: ExitStack, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    home = folder / "dagster_home"
    home.mkdir()
    text = (ROOT / "dagster.yaml").read_text()
    # Runs wait in the queue for ever: none is executed here.
    (home / "dagster.yaml").write_text(text.replace("max_concurrent_runs: 4", "max_concurrent_runs: 0"))
    ports = {name: free_port() for name in ("code", "webserver")}
    address = f"{{host: 127.0.0.1, port: {ports['code']}, location_name: graft_pipeline}}"
    (folder / "workspace.yaml").write_text(f"load_from:\n  - grpc_server: {address}\n")
    for name in [name for name in os.environ if name.startswith("GRAFT_")]:
        del os.environ[name]
    os.environ |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DAGSTER_HOME": str(home),
        "GRAFT_ENV_FILE": os.devnull,
        "GRAFT_ROOT": str(folder / "data"),
        "GRAFT_WORLD": "planet",
    }
    table, processes = Table(), Processes(stack, folder, dict(os.environ))
    load_definitions(table)

    import dagster as dg

    from graft_pipeline.definitions import build_defs

    instance = stack.enter_context(dg.DagsterInstance.get())
    names = region_names(options.regions)
    with table.measure(f"make {len(names)} partitions, {options.materialised:.0%} materialised"):
        fill(instance, names, options.materialised)
    cover(names)
    definitions = build_defs()
    ticks(table, instance, definitions)
    serve = ["api", "grpc", "-h", "127.0.0.1", "-p", str(ports["code"]), "-m", "graft_pipeline.definitions"]
    processes.start("code", "dagster", *serve)
    wait_for("The code server", answers(ports["code"]), processes)
    backfill_id = None
    if options.backfill:
        # Every second region: a selection that no range describes.
        some = names[: 2 * options.backfill : 2]
        backfill_id = backfill(table, instance, definitions, some, processes)
    where = ["-h", "127.0.0.1", "-p", str(ports["webserver"]), "-w", str(folder / "workspace.yaml")]
    server = processes.start("webserver", "dagster-webserver", *where)
    wait_for("The webserver", answers(ports["webserver"]), processes)
    url = f"http://127.0.0.1:{ports['webserver']}"
    pages(table, url, server.pid, backfill_id, options.screenshots)
    return table.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--regions", type=int, default=20_000)
    parser.add_argument("--materialised", type=float, default=0.25, help="share of the regions")
    parser.add_argument("--backfill", type=int, default=500, help="regions of the backfill; 0: none")
    parser.add_argument("--screenshots", type=Path, help="folder for pictures of the pages")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graft-partitions-")))
        rows = run(stack, folder, options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

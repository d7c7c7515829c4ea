"""The paper's ablations on a planet: the regions of a box collected, each variant trained with several seeds, a table.

`python benchmarks/ablations.py --folder FOLDER`; a run that was stopped goes on when it is started again.
"""

import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import _path  # noqa: F401 -- before the package `training`
import dagster as dg
import psutil
import pyarrow.compute as pc
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from graft_pipeline import ablations, areas, automation, schemas
from graft_pipeline.definitions import build_defs
from graft_pipeline.demo import AREA, RichProgress, Runner, prepare
from graft_pipeline.settings import load_settings
from resources.planet.process import PlanetServer
from resources.storage import Storage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("ablations"), help="data and Dagster's state")
    parser.add_argument("--planet-seed", type=int, default=0, help="which world")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each variant")
    parser.add_argument("--sensor", default="naip")
    parser.add_argument(
        "--box",
        type=float,
        nargs=4,
        metavar=("WEST", "SOUTH", "EAST", "NORTH"),
        default=(AREA["west"], AREA["south"], AREA["east"], AREA["north"]),
        help="regions of a quarter degree; default: the demo's four",
    )
    parser.add_argument("--locations", type=int, default=12, help="searches a region: fewer is sparser")
    parser.add_argument("--radius-km", type=float, default=4.0, help="of a search: smaller is sparser")
    parser.add_argument("--variants", nargs="*", default=[], help="default: all")
    parser.add_argument("--steps", type=int, help="of each training; default: the recipe's")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    started, cpu = time.perf_counter(), _cpu_seconds()
    settings = _lay_out(options)
    logging.getLogger("dagster").setLevel(logging.CRITICAL)
    logging.getLogger().addHandler(logging.NullHandler())
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        PlanetServer(seed=options.planet_seed) as planet,
        dg.DagsterInstance.from_config(os.environ["DAGSTER_HOME"]) as instance,
        Progress(*columns, console=console) as bars,
    ):
        os.environ["GRAFT_PLANET__URL"] = planet.url
        runner = Runner(build_defs(settings, progress=RichProgress(bars)), instance)
        runner.materialise(dg.AssetKey("regions"))
        if not (Storage(settings.root).models_folder / "foundation").exists():
            runner.materialise(dg.AssetKey(["openclip", "foundation"]))
        for region in bars.track(sorted(instance.get_dynamic_partitions("region")), description="Regions"):
            runner.materialise(*automation.region_keys([options.sensor]), partition=region)
        runner.materialise(*automation.keys_of([options.sensor], ["training_set", "benchmark"]))
        collected = time.perf_counter() - started
        _ablate(runner, options)
        event = instance.get_latest_materialization_event(dg.AssetKey([options.sensor, "ablations"]))
    rows = Storage(settings.root).read(schemas.ABLATIONS, sensor=options.sensor)
    setup_id = event.asset_materialization.metadata["setup_id"].value
    rows = rows.filter(pc.equal(rows["setup_id"], setup_id))
    summary = ablations.summarise(rows)
    console.print(Markdown(ablations.to_markdown(summary)))
    facts = {
        "planet_seed": options.planet_seed,
        "sensor": options.sensor,
        "box": options.box,
        "locations": options.locations,
        "radius_km": options.radius_km,
        "collecting_wall_s": round(collected, 1),
        "wall_s": round(time.perf_counter() - started, 1),
        "cpu_s": round(_cpu_seconds() - cpu, 1),
        "peak_memory_mb": round(psutil.Process().memory_info().rss / 2**20, 1),
    }
    console.print(facts)
    if options.json:
        options.json.write_text(
            json.dumps({**facts, "summary": summary, "rows": rows.to_pylist()}, indent=2) + "\n"
        )


def _lay_out(options: argparse.Namespace) -> Any:
    """The deployment's folder and environment; a folder that has them is gone on with."""
    folder = options.folder
    if not (folder / "settings.env").exists():
        environment = prepare(folder, options.planet_seed, is_small=False) | {
            "GRAFT_SEARCH_LOCATIONS_PER_REGION": str(options.locations),
            "GRAFT_SEARCH_RADIUS_KM": str(options.radius_km),
        }
        (folder / "settings.env").write_text("".join(f"{k}={v}\n" for k, v in environment.items()))
    os.environ["GRAFT_ENV_FILE"] = str(folder.resolve() / "settings.env")
    os.environ["DAGSTER_HOME"] = str(folder.resolve() / "dagster_home")
    settings = load_settings()
    # A hair inside, so that the corners touch no other region.
    west, south, east, north = (
        side + hair for side, hair in zip(options.box, (0.01, 0.01, -0.01, -0.01), strict=True)
    )
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    feature = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    (folder / "area.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    areas.register_area(
        Storage(settings.root).areas_folder, areas.read_area(folder / "area.geojson", name="box")
    )
    return settings


def _ablate(runner: Runner, options: argparse.Namespace) -> None:
    train_config = {"steps": options.steps} if options.steps else {}
    config = {"variants": options.variants, "seeds": options.seeds, "train_config": train_config}
    runner.materialise(
        *automation.keys_of([options.sensor], ["ablations"]),
        config={f"{options.sensor}__ablations": {"config": config}},
    )


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()

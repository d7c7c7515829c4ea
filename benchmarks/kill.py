"""What a kill costs: a region's run is ended by SIGKILL at random moments and started again, each time.

`python benchmarks/kill.py [--kills N] [--radius-km R] [--seed S] [--json FILE]`. Every run is a process of its own
that executes the Dagster job `collect_region` against a planet in another process. For each kill: is the dataset,
byte for byte, that of an undisturbed run, and how many requests were made twice? Ends with 1 if a dataset differs,
or if more was asked again than what was in flight and what asks for news.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REGION = "N42.00W071.50"
AREA = (-71.34, 42.18, -71.28, 42.24)
SETTINGS = {
    "GRAFT_WORLD": "planet",
    "GRAFT_GRID_DEG": "0.25",
    "GRAFT_SEARCH_LOCATIONS_PER_REGION": "6",
    "GRAFT_RECIPE": "smoke",
}
#: What the planet is asked for, by kind of request.
KINDS = ("search", "image", "list_assets", "get_pixels")
#: Loaded once, by the process that the runs are forked from; neither starts threads by that.
PRELOAD = ["graft_pipeline.definitions", "torch", "open_clip", "ee", "flickrapi", "rasterio.crs", "sklearn"]
#: Datasets in the order in which the job makes them: the first that is missing tells where a kill hit.
STAGES = (
    "search_locations",
    "flickr_photos",
    "ground_images",
    "ground_embeddings",
    "outdoor_photos",
    "scenes",
    "tiles",
    "chips",
    "pairs",
)


def execute(root: str, job: str | None) -> None:
    """The process of a run: the job on the region; without a job what comes before it."""
    os.environ["GRAFT_ROOT"] = root
    # A Dagster run tells on stderr what it does; at a kill that is of no interest.
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}

    import dagster as dg

    from graft_pipeline.definitions import build_defs

    definitions = build_defs()
    with dg.DagsterInstance.ephemeral() as instance:
        if job is None:
            keys = [dg.AssetKey("regions"), dg.AssetKey(["openclip", "foundation"])]
            everything = definitions.resolve_implicit_global_asset_job_def()
            everything.execute_in_process(instance=instance, asset_selection=keys, run_config=quiet)
            return
        instance.add_dynamic_partitions("region", [REGION])
        definitions.resolve_job_def(job).execute_in_process(
            instance=instance, partition_key=REGION, run_config=quiet
        )


class Runs:
    """Starts runs as processes, forked from one that has loaded what takes long to load."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)

    def run(self, root: Path, job: str | None = "collect_region", kill_after_s: float | None = None) -> bool:
        """Run, and kill the run at a moment; whether it came to its end before."""
        process = self._context.Process(target=execute, args=(str(root), job))
        process.start()
        process.join(kill_after_s)
        if process.is_alive():
            process.kill()
            process.join()
            return False
        if process.exitcode:
            raise SystemExit(f"A run ended with {process.exitcode}: its error is above.")
        return True


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def stage(root: Path) -> str:
    """The first dataset that is not there."""
    for name in STAGES:
        if not list(root.glob(f"{name}/**/{name}.parquet")):
            return name
    return "second sensor, or the end"


def register(root: Path) -> None:
    from upath import UPath

    from graft_pipeline import areas

    west, south, east, north = AREA
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "area.geojson"
        file.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
        areas.register_area(UPath(root / "areas"), areas.read_area(file))


def allowed(undisturbed: Path, news: dict[str, int]) -> dict[str, int]:
    """How many requests a kill may repeat: those in flight, and photos that failed, which are tried again."""
    import pyarrow.compute as pc

    from graft_pipeline.manifests import read_table
    from graft_pipeline.schemas import GROUND_IMAGES
    from graft_pipeline.settings import load_settings
    from resources.images import SAME_BODY_LIMIT

    settings = load_settings()
    images = read_table(undisturbed / f"ground_images/region={REGION}/ground_images.parquet", GROUND_IMAGES)
    failed = pc.sum(pc.equal(images["status"], "failed")).as_py() or 0
    in_flight = {"search": 1, "image": settings.image_concurrency, "list_assets": 1}
    in_flight["get_pixels"] = settings.ee_concurrency
    return {
        kind: news[kind] + in_flight[kind] + SAME_BODY_LIMIT * failed * (kind == "image") for kind in KINDS
    }


def counted(planet: Any) -> dict[str, int]:
    stats = planet.stats()
    return {kind: stats[kind] for kind in KINDS}


def measure(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    from resources.planet.process import PlanetServer

    runs, dice = Runs(), random.Random(seed)
    template, undisturbed, root = (folder / name for name in ("template", "undisturbed", "killed"))
    with PlanetServer(seed=0) as planet:
        os.environ["GRAFT_PLANET__URL"] = planet.url
        register(template)
        runs.run(template, job=None)
        shutil.copytree(template, undisturbed)
        planet.reset_stats()
        started = time.perf_counter()
        runs.run(undisturbed)
        took_s = time.perf_counter() - started
        expected, asked = contents(undisturbed), counted(planet)
        planet.reset_stats()
        # What a run that finds everything done asks: whether there is any news.
        runs.run(undisturbed)
        news = counted(planet)
        rows: list[dict[str, Any]] = []
        while len(rows) < kills:
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(template, root)
            planet.reset_stats()
            moment_s = dice.uniform(0, took_s)
            if runs.run(root, kill_after_s=moment_s):
                # This one was faster than the undisturbed run: no kill, no row.
                continue
            where, kept = stage(root), len(list(root.rglob(".unfinished/*")))
            before = counted(planet)
            runs.run(root)
            total, found = counted(planet), contents(root)
            differing = sorted(
                name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
            )
            rows.append(
                {
                    "moment_s": round(moment_s, 2),
                    "stage": where,
                    "items_kept": kept,
                    "asked_before": before,
                    "repeated": {kind: total[kind] - asked[kind] for kind in KINDS},
                    "differing_files": differing,
                }
            )
    limit = allowed(undisturbed, news)
    for row in rows:
        row["is_within_limit"] = all(row["repeated"][kind] <= limit[kind] for kind in KINDS)
    return {
        "seconds_undisturbed": round(took_s, 2),
        "requests_undisturbed": asked,
        "requests_for_news": news,
        "repeated_at_most": limit,
        "files": len(expected),
        "kills": rows,
        "cpu_s": round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--radius-km", type=float, default=2.0, help="of the searches: how large the region is"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    # As _path.py does; runs are processes that load this file, and would look for that one in vain.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    for name in [name for name in os.environ if name.startswith("GRAFT_")]:
        del os.environ[name]
    os.environ |= {
        **SETTINGS,
        "GRAFT_SEARCH_RADIUS_KM": str(arguments.radius_km),
        "GRAFT_ENV_FILE": "/dev/null",
    }
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.kills, arguments.seed, Path(folder))
    print(
        f"Undisturbed: {result['seconds_undisturbed']} s, {result['files']} files, "
        f"requests {result['requests_undisturbed']}; a run that finds all done asks {result['requests_for_news']}"
    )
    print(
        f"{'kill at':>8}  {'first missing dataset':<26}{'kept':>6}",
        *(f"{kind:>12}" for kind in KINDS),
        "  same bytes",
    )
    for row in result["kills"]:
        print(
            f"{row['moment_s']:>6.2f} s  {row['stage']:<26}{row['items_kept']:>6}",
            *(f"{row['repeated'][kind]:>+12}" for kind in KINDS),
            "  " + ("yes" if not row["differing_files"] else f"NO: {row['differing_files']}"),
        )
    print(
        "Columns of requests: how many more than undisturbed, both runs together; in flight or news are at most "
        f"{result['repeated_at_most']}"
    )
    print(f"CPU of all runs and the planet: {result['cpu_s']} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if any(row["differing_files"] or not row["is_within_limit"] for row in result["kills"]):
        sys.exit(1)


if __name__ == "__main__":
    main()

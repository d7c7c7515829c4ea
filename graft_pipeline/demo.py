"""`graft demo`, `graft collect`: the asset graph on the embedded planet, as real Dagster runs on a local instance.

It only presses the buttons a person would press in the UI, in order, and times them; every result comes from assets.
"""

import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
from dotenv import dotenv_values
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from graft_pipeline import automation
from graft_pipeline.errors import GraftError, InputError
from graft_pipeline.manifests import write_bytes_atomic
from graft_pipeline.progress import Report

#: Land of the demo in every planet: 4 regions of a quarter degree, within one UTM zone.
AREA = {"west": -70.5, "south": 42.0, "east": -70.0, "north": 42.5}
#: What a demo makes in its folder beside the settings, and what the next one replaces.
MADE = ("area.geojson", "dagster_home", "data", "report.html", "scores.json")
#: Land that is only ever evaluated on, more than 50 km away.
BENCHMARK_BOUNDS = (-70.5, 43.0, -69.5, 43.75)
#: Regions that are collected here at most, one after the other; more are a deployment's backfill.
MAX_REGIONS = 50
#: Encoders that the demo trains; Sentinel-2's pixel level is left to `learn`, for the sake of five minutes, and so is
#: that of sensors of the user's own.
LEVELS = {"naip": ("image", "pixel"), "sentinel2": ("image",)}
SCORES_OF = {"image": ("zero_shot_scores",), "pixel": ("segmentation_scores", "questions", "question_scores")}


@dataclass
class Stages:
    """Seconds and peak memory of the demo's stages.

    Memory is the resident set of this process and its children (the planet), sampled five times a second.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what happens inside under a name."""
        import psutil

        stop = threading.Event()
        peak = 0.0
        process = psutil.Process()

        def sample() -> None:
            nonlocal peak
            while True:
                total = 0
                for member in (process, *process.children(recursive=True)):
                    try:
                        total += member.memory_info().rss
                    except psutil.NoSuchProcess:
                        continue
                peak = max(peak, total / 2**20)
                if stop.wait(0.2):
                    return

        sampler = threading.Thread(target=sample, daemon=True)
        started = time.perf_counter()
        sampler.start()
        try:
            yield
        finally:
            stop.set()
            sampler.join()
            self.seconds[name] = round(time.perf_counter() - started, 2)
            self.peak_memory_mb[name] = round(peak, 1)


class RichProgress:
    """Progress of steps as bars in a terminal (graft_pipeline.progress.Progress)."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars

    def task(self, name: str) -> Report:
        """Show a bar that disappears when its work is done."""
        task: TaskID = self._bars.add_task(name, total=None)

        def report(done: int, total: int) -> None:
            self._bars.update(task, completed=done, total=total, visible=done < total)

        return report


def demo_environment(folder: Path, seed: int, *, is_small: bool) -> dict[str, str]:
    """The settings of a demo deployment, as `make ui` needs them later too."""
    return {
        "GRAFT_WORLD": "planet",
        "GRAFT_ROOT": str(folder.resolve() / "data"),
        "GRAFT_GRID_DEG": "0.25",
        "GRAFT_SEED": str(seed),
        "GRAFT_PLANET__SEED": str(seed),
        "GRAFT_SEARCH_LOCATIONS_PER_REGION": "4" if is_small else "12",
        "GRAFT_SEARCH_RADIUS_KM": "4",
        # 16 blocks in all: a tenth of them might be none.
        "GRAFT_VALIDATION_FRACTION": "0.2",
        "GRAFT_BENCHMARK_BOUNDS": json.dumps(BENCHMARK_BOUNDS),
        "GRAFT_RECIPE": "smoke" if is_small else "planet",
        # Of `graft trace` and `graft backfill`; Dagster's own commands want it exported.
        "DAGSTER_HOME": str(folder.resolve() / "dagster_home"),
    }


def prepare(folder: Path, seed: int, *, is_small: bool) -> dict[str, str]:
    """Lay out the demo's folder: data, Dagster's home, settings file, registered area.

    Args:
        folder: the demo's folder; an earlier demo in it is removed, and nothing else.
        seed: planet.
        is_small: two regions and few search locations.

    Returns:
        The deployment's environment variables.

    Raises:
        GraftError: if the folder holds something that no demo made, or cannot be made.
    """
    environment = demo_environment(folder, seed, is_small=is_small)
    _lay_out(folder, environment, is_new=True)
    east, north = AREA["east"], 42.25 if is_small else AREA["north"]
    # Half a region's border inside, so that the corners touch no other region.
    west, south, east, north = AREA["west"] + 0.01, AREA["south"] + 0.01, east - 0.01, north - 0.01
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    feature = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    (folder / "area.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    return environment


def _lay_out(folder: Path, environment: dict[str, str], *, is_new: bool) -> None:
    """Make a deployment's folder, settings file first: by it the next start knows the folder, if this one fails.

    Args:
        folder: the folder.
        environment: of the settings file, unless there is one that stays.
        is_new: remove what an earlier demo made, settings included; else only add what is missing. What else lies
            there is left alone.

    Raises:
        GraftError: if the folder holds something that no demo made, or cannot be made.
    """
    settings, instance = folder / "settings.env", folder / "dagster_home" / "dagster.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # What a killed write of the settings left is ours as well.
        others = [path for path in folder.iterdir() if not path.name.lstrip(".").startswith(settings.name)]
        is_ours = settings.exists()
        if is_new and is_ours:
            # A deployment's settings may have this name, too.
            is_ours = dotenv_values(settings).get("GRAFT_WORLD") == "planet"
        if (others or settings.exists()) and not is_ours:
            raise GraftError(f"{folder} is not empty and no demo made it: choose another --folder.")
        for path in [path for path in others if path.name in MADE] if is_new else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if is_new or not settings.exists():
            text = "".join(f"{name}={_quoted(value)}\n" for name, value in environment.items())
            write_bytes_atomic(settings, text.encode())
        if not instance.exists():
            write_bytes_atomic(instance, Path(__file__).with_name("dagster.yaml").read_bytes())
    except OSError as error:
        raise GraftError(
            f"{folder} cannot hold a demo ({error.strerror}): choose another --folder."
        ) from error


def _quoted(value: str) -> str:
    """A value as env files spell it."""
    if re.fullmatch(r"[\w/.,:\[\] -]*", value):
        return value
    escaped = value.replace("\\", r"\\").replace("'", r"\'")
    return f"'{escaped}'"


def _enter(folder: Path) -> None:
    """Make this process one of the deployment in a folder; its log lines go to the instance only."""
    settings = folder.resolve() / "settings.env"
    os.environ["GRAFT_ENV_FILE"] = str(settings)
    # Over what the shell exports: another deployment's root must not get this one's photos.
    os.environ.update({name: value for name, value in dotenv_values(settings).items() if value is not None})
    os.environ["DAGSTER_HOME"] = str(folder.resolve() / "dagster_home")
    # As the Makefile says, for those who call graft themselves; torch is not loaded yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Log lines are in the instance; here they would tear the bars. With a handler on the root logger, no library
    # adds one that prints.
    logging.getLogger("dagster").setLevel(logging.CRITICAL)
    logging.getLogger().addHandler(logging.NullHandler())


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


class Runner:
    """Materialises assets as Dagster runs on one instance, in this process."""

    def __init__(self, definitions: dg.Definitions, instance: dg.DagsterInstance) -> None:
        self._job = definitions.resolve_implicit_global_asset_job_def()
        self._instance = instance

    def materialise(
        self, *keys: dg.AssetKey, partition: str | None = None, config: dict[str, Any] | None = None
    ) -> None:
        """Run assets, upstream first, as the UI's Materialize button does.

        Args:
            *keys: the assets.
            partition: their partition, if they have any.
            config: of the run, by op.

        Raises:
            Exception: whatever stopped the step, unchanged; the run is recorded as failed.
        """
        try:
            self._job.execute_in_process(
                instance=self._instance,
                asset_selection=list(keys),
                partition_key=partition,
                tags={"graft/demo": "true"},
                run_config={
                    "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
                    "ops": config or {},
                },
            )
        except dg.DagsterExecutionInterruptedError:
            # Ctrl-C: the run is recorded as failed, and the next one goes on.
            raise KeyboardInterrupt from None
        except (dg.Failure, dg.DagsterError) as failure:
            if isinstance(failure.__cause__, GraftError):
                raise failure.__cause__ from None
            raise


def run_demo(folder: Path, *, seed: int = 0, is_small: bool = False) -> dict[str, Any]:
    """Run the demo.

    Args:
        folder: where everything goes; an earlier demo there is replaced.
        seed: which planet.
        is_small: two regions and few steps, for tests of the machinery.

    Returns:
        What `scores.json` holds.
    """
    console = Console()
    prepare(folder, seed, is_small=is_small)
    _enter(folder)

    from graft_pipeline import areas
    from graft_pipeline.definitions import build_defs
    from graft_pipeline.report import write_report
    from graft_pipeline.settings import load_settings
    from resources.planet.process import PlanetServer
    from resources.storage import Storage

    stages = Stages()
    settings = load_settings()
    storage = Storage(settings.root)
    areas.register_area(storage.areas_folder, areas.read_area(folder / "area.geojson", name="demo"))
    bars = _bars(console)
    sensors = list(settings.sensor_records)
    started = time.perf_counter()
    with (
        PlanetServer(seed=seed) as planet,
        dg.DagsterInstance.from_config(os.environ["DAGSTER_HOME"]) as instance,
        bars,
    ):
        os.environ["GRAFT_PLANET__URL"] = planet.url
        runner = Runner(build_defs(settings, progress=RichProgress(bars)), instance)
        console.print(f"Planet {seed} answers Flickr and Earth Engine at {planet.url}")
        with stages.stage("regions"):
            runner.materialise(dg.AssetKey("regions"))
        with stages.stage("foundation"):
            runner.materialise(dg.AssetKey(["openclip", "foundation"]))
        if settings.uses_planet_scenes:
            with stages.stage("scene classifier"):
                runner.materialise(dg.AssetKey(["torchvision", "scene_classifier"]))
        regions = sorted(instance.get_dynamic_partitions("region"))
        with stages.stage("collect"):
            everything = bars.add_task("Regions, from search to pairs", total=len(regions))
            for region in regions:
                runner.materialise(*automation.region_keys(sensors), partition=region)
                bars.advance(everything)
        for sensor in sensors:
            levels = LEVELS.get(sensor, ("image",))
            for number, level in enumerate(levels):
                with stages.stage(f"{sensor} {level}_encoder"):
                    names = ["training_set"] * (number == 0) + [f"{level}_encoder"]
                    runner.materialise(*automation.keys_of([sensor], names))
            with stages.stage(f"{sensor} scores"):
                names = ["benchmark", *(name for level in levels for name in SCORES_OF[level])]
                runner.materialise(*automation.keys_of([sensor], names))
        with stages.stage("chip embeddings"):
            for region in regions:
                runner.materialise(*automation.keys_of(sensors, ["chip_embeddings"]), partition=region)
            runner.materialise(*automation.keys_of(sensors, ["search_index"]))
        traffic = planet.stats()
    total_s = round(time.perf_counter() - started, 1)
    scores = write_report(
        folder,
        storage,
        sensors,
        seed=seed,
        total_seconds=total_s,
        traffic=traffic,
        seconds=stages.seconds,
        peak_memory_mb=stages.peak_memory_mb,
    )
    _print_scores(console, scores, folder)
    return scores


def collect_area(
    folder: Path, file: Path, *, name: str | None = None, where: str | None = None, seed: int = 0
) -> list[str]:
    """Collect an area of the user's own into a demo's folder, from search to pairs, here and now.

    Where the folder has encoders, its chips are embedded too, and the index for search is made anew.

    Args:
        folder: a demo's folder, of any seed; made without a demo if there is none.
        file: any vector file of polygons.
        name: of the area; default: the file's.
        where: which features of the file, in SQL.
        seed: planet of a new folder.

    Returns:
        Keys of the area's regions.

    Raises:
        InputError: if the file holds no usable area, or one of too many regions.
        GraftError: if the folder holds something that no demo made, or whatever stopped a step.
    """
    from graft_pipeline import areas, schemas

    console = Console()
    area = areas.read_area(file, name=name, where=where)
    _lay_out(folder, demo_environment(folder, seed, is_small=False), is_new=False)
    _enter(folder)

    # The definitions read the settings as they are imported.
    from graft_pipeline.definitions import build_defs
    from graft_pipeline.regions import regions_touching
    from graft_pipeline.settings import load_settings
    from resources.storage import Storage
    from resources.world import open_world

    settings = load_settings()
    storage, sensors = Storage(settings.root), list(settings.sensor_records)
    keys = [region.key for region in regions_touching(area.geometry, settings.grid_deg)]
    if len(keys) > MAX_REGIONS:
        raise InputError(
            f"{file} touches {len(keys)} regions, and {MAX_REGIONS} at most are collected here: take a smaller area, "
            "or backfill collect_region in a deployment (docs/operations.md)."
        )
    areas.register_area(storage.areas_folder, area)
    with (
        open_world(settings) as world,
        dg.DagsterInstance.from_config(os.environ["DAGSTER_HOME"]) as instance,
        _bars(console) as bars,
    ):
        if world.planet.url:
            os.environ["GRAFT_PLANET__URL"] = world.planet.url
        definitions = build_defs(settings, progress=RichProgress(bars))
        graph = definitions.resolve_asset_graph()
        runner = Runner(definitions, instance)
        runner.materialise(dg.AssetKey("regions"))
        made_here = [("openclip", "foundation"), ("torchvision", "scene_classifier")]
        wanted = [settings.is_planet, settings.uses_planet_scenes]
        for path, is_wanted in zip(made_here, wanted, strict=True):
            model = dg.AssetKey(path)
            if is_wanted and instance.get_latest_materialization_event(model) is None:
                runner.materialise(model)
        encoded = [
            sensor
            for sensor in sensors
            if (storage.models_folder / f"sensor={sensor}" / "image_encoder" / "encoder").exists()
        ]
        everything = bars.add_task(f"Regions of {area.name}, from search to pairs", total=len(keys))
        for key in keys:
            embeddings = automation.keys_of(encoded, ["chip_embeddings"])
            runner.materialise(*automation.region_keys(sensors), *embeddings, partition=key)
            bars.advance(everything)
        index = [key for key in automation.keys_of(encoded, ["search_index"]) if graph.has(key)]
        if index:
            runner.materialise(*index)
    for sensor in sensors:
        scenes, pairs = (
            sum(storage.read(dataset, sensor=sensor, region=key).num_rows for key in keys)
            for dataset in (schemas.SCENES, schemas.PAIRS)
        )
        where_not = "" if scenes else ": the collection has no scene here"
        console.print(
            f"{sensor}: {pairs:,} pairs of photo and satellite image in {len(keys)} regions{where_not}"
        )
    return keys


def _print_scores(console: Console, scores: dict[str, Any], folder: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from graft_pipeline.report import blind_of

    table = Table(
        title="Zero-shot on ground that no training tile touches",
        caption="encoder: trained on ground photos alone; CLIP: the frozen foundation model, applied directly; chance "
        "of questions: the most frequent answer",
        box=SIMPLE_HEAD,
    )
    for column in ("sensor", "task", "metric"):
        table.add_column(column, no_wrap=True)
    for column in ("encoder", "CLIP", "chance"):
        table.add_column(column, justify="right")
    for sensor, task, metric, values in iterate_scores(scores):
        encoder = next((values[name] for name in ("image_encoder", "pixel_encoder") if name in values), None)
        numbers = [encoder, values.get("foundation"), values.get(blind_of(values))]
        table.add_row(sensor, task, metric, *("" if v is None else f"{v:.3f}" for v in numbers))
    console.print(table)
    console.print(
        f"{scores['total_seconds']:.0f} s, at most {max(scores['peak_memory_mb'].values()):.0f} MB. "
        f"Report: {folder / 'report.html'}. Lineage: make ui"
    )


def iterate_scores(scores: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, float]]]:
    """Walk scores.json: (sensor, task, metric, {contender: value})."""
    for sensor in scores["sensors"]:
        for task, contenders in scores[sensor].items():
            metrics = dict.fromkeys(metric for values in contenders.values() for metric in values)
            for metric in metrics:
                yield (
                    sensor,
                    task,
                    metric,
                    {name: values[metric] for name, values in contenders.items() if metric in values},
                )

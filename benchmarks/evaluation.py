"""Evaluation at EuroSAT's size, and segmentation of a large raster: does one wait for reading, and how much memory?

`python benchmarks/evaluation.py [--json FILE] [--images 27000] [--raster-px 10000]`. The images are the planet's,
written as EuroSAT publishes them; weights are random, as only time is measured.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import _measure
import _path  # noqa: F401 -- before the package `training`
import numpy as np
import open_clip
from PIL import Image
from rich.console import Console
from rich.table import Table

from graft_pipeline.geometry import Grid
from resources.planet.world import World
from training.zero_shot.contenders import Contender
from training.zero_shot.datasets import EUROSAT_CLASSES, read_eurosat
from training.zero_shot.evaluate import prepared_batches

#: Places of the planet that images are cut from.
_PLACES = 200
_BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=27_000, help="images read, as many as EuroSAT has")
    parser.add_argument(
        "--encoded", type=int, default=384, help="images encoded, to measure the model's rate"
    )
    parser.add_argument("--architecture", default="ViT-B-32", help="of open_clip")
    parser.add_argument("--raster-px", type=int, default=10_000, help="side of the raster; 0 leaves it out")
    parser.add_argument(
        "--segment", nargs=3, metavar=("ARCHITECTURE", "RASTER", "MAP"), help=argparse.SUPPRESS
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.segment:
        segment(*options.segment)
        return
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        results |= measure_reading(Path(folder), options.images, options.encoded, options.architecture)
        if options.raster_px:
            results |= measure_segmentation(Path(folder), options.raster_px)
    table = Table(title=f"Evaluation, {options.architecture} on this machine", title_justify="left")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name, value in results.items():
        table.add_row(name, f"{value:,.2f}")
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def paint(count: int, side_px: int) -> np.ndarray:
    """(count, side, side, 3) uint8 of places along the planet."""
    world = World(0)
    grids = [
        Grid(32619, 330_000.0 + 900 * n, 4_690_000.0 + 370 * n, 1.0, side_px, side_px) for n in range(count)
    ]
    return np.stack([world.render_naip(grid, 2021, 5)[:3].transpose(1, 2, 0) for grid in grids])


def measure_reading(folder: Path, images: int, encoded: int, architecture: str) -> dict[str, float]:
    """Images a second that are read and prepared, and that the model encodes, one after the other."""
    places = paint(_PLACES, 64)
    for number in range(images):
        name = EUROSAT_CLASSES[number % len(EUROSAT_CLASSES)]
        file = folder / "EuroSAT" / name / f"{name}_{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(places[number % _PLACES], number // _PLACES, axis=0)).save(file, quality=90)
    made = read_eurosat(folder / "EuroSAT")
    config = open_clip.get_model_config(architecture)
    visual = open_clip.CLIP(**config).visual.eval()
    contender = Contender("model", config["vision_cfg"]["image_size"], backbone=visual)
    started, cpu, read = time.perf_counter(), time.process_time(), 0
    for numbers, _ in prepared_batches([contender], made, np.arange(len(made)), _BATCH, 8, Counter()):
        read += len(numbers)
    reading, reading_cpu = time.perf_counter() - started, time.process_time() - cpu
    pixels = np.stack([contender.prepare(made.read(number)) for number in range(_BATCH)])
    contender.encode(pixels)
    started, done = time.perf_counter(), 0
    while done < encoded:
        contender.encode(pixels)
        done += len(pixels)
    encoding = time.perf_counter() - started
    rates = {"images read a second": read / reading, "images encoded a second": done / encoding}
    return {
        "images": read,
        **rates,
        "reading / encoding": rates["images read a second"] / rates["images encoded a second"],
        "CPU seconds of reading": reading_cpu,
    }


def measure_segmentation(folder: Path, side_px: int) -> dict[str, float]:
    """Seconds and memory of a process that segments a square raster."""
    import rasterio

    tile = paint(1, 500)[0]
    profile = {
        "driver": "GTiff", "width": side_px, "height": side_px, "count": 3, "dtype": "uint8", "crs": "EPSG:32619",
        "transform": rasterio.Affine(1, 0, 330_000, 0, -1, 4_700_000), "tiled": True, "compress": "deflate",
    }  # fmt: skip
    with rasterio.open(folder / "raster.tif", "w", **profile) as file:
        for top in range(0, side_px, len(tile)):
            rows = np.tile(tile, (1, -(-side_px // len(tile)), 1))[: side_px - top, :side_px]
            file.write(np.moveaxis(rows, -1, 0), window=rasterio.windows.Window(0, top, side_px, len(rows)))
    cost = _measure.run(__file__, "--segment", "planet", str(folder / "raster.tif"), str(folder / "map.tif"))
    return {
        "raster, pixels a side": side_px,
        "segmentation, seconds": cost.wall_s,
        "segmentation, CPU seconds": cost.cpu_s,
        "segmentation, peak MB": cost.peak_mb,
    }


def segment(architecture: str, raster: str, output: str) -> None:
    """Segment a raster by the planet's twelve classes with random weights of the planet's size."""
    from training.foundation import FoundationConfig, new_clip
    from training.zero_shot.prompts import load_prompts
    from training.zero_shot.raster import segment_raster

    if architecture != "planet":
        sys.exit(f"No small model {architecture}.")
    segment_raster(new_clip(FoundationConfig()), raster, Path(output), load_prompts("planet"))


if __name__ == "__main__":
    main()

"""How fast the planet paints: milliseconds per chip and photo, and what separable evaluation saves.

`python benchmarks/rendering.py [--repeats N] [--json FILE]`; one process, one thread, no network. Both ways of
computing land cover are timed side by side on the same chips and must agree bit for bit.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np

from graft_pipeline.geometry import Grid, projection
from resources.planet.captions import captioned_photos
from resources.planet.world import World

CHIP_PX = 448
WEST, SOUTH, SIDE_DEG = -71.75, 42.25, 0.25
EPSG = 32619


def chips(gsd_m: float, count: int) -> list[Grid]:
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(0.03, SIDE_DEG - 0.03, (2, count))
    x, y = projection(EPSG).forward(WEST + lon, SOUTH + lat)
    return [Grid.snapped(EPSG, a, b, gsd_m, CHIP_PX) for a, b in zip(x.tolist(), y.tolist(), strict=True)]


def timed(work: Callable, items: list, repeats: int) -> dict[str, float]:
    """Milliseconds per item: the best of the repeats of each item, then median and mean over items."""
    best = np.full(len(items), np.inf)
    for _ in range(repeats + 1):
        for k, item in enumerate(items):
            start = time.perf_counter()
            work(item)
            best[k] = min(best[k], time.perf_counter() - start)
    return {
        "median_ms": float(np.median(best) * 1e3),
        "mean_ms": float(best.mean() * 1e3),
        "slowest_ms": float(best.max() * 1e3),
        "items": len(items),
    }


def measure(repeats: int) -> dict[str, dict[str, float]]:
    world = World(0)
    naip, sentinel2 = chips(1.0, 24), chips(10.0, 24)
    rows: dict[str, dict[str, float]] = {}
    rows["NAIP chip, 448 px, 4 bands"] = timed(lambda grid: world.render_naip(grid, 2021, 1), naip, repeats)
    rows["Sentinel-2 chip, 448 px, 4 bands, clear"] = timed(
        lambda grid: world.render_sentinel2(grid, date(2021, 7, 1), 1, 0.0), sentinel2, repeats
    )
    rows["Sentinel-2 chip, 448 px, 4 bands, 20 % cloud"] = timed(
        lambda grid: world.render_sentinel2(grid, date(2021, 7, 1), 1, 20.0), sentinel2, repeats
    )

    def by_points(grid: Grid) -> np.ndarray:
        # Projected beforehand: only the evaluation is compared.
        x, y = points[grid]
        return land.classes_at(x, y)

    land = world._land(19)
    for name, some in (("1 m", naip[:4]), ("10 m", sentinel2[:4])):
        points = {}
        for grid in some:
            columns, rows_px = np.meshgrid(np.arange(CHIP_PX) + 0.5, np.arange(CHIP_PX) + 0.5)
            x, y = grid.to_xy(columns.ravel(), rows_px.ravel())
            points[grid] = (x, y)
            if not np.array_equal(land.classes_at(x, y), world.land_cover(grid).ravel()):
                raise AssertionError("the two evaluations of land cover disagree")
        rows[f"land cover at {name}, separable"] = timed(world.land_cover, some, repeats)
        rows[f"land cover at {name}, point by point"] = timed(by_points, some, 1)

    photos = world.photos_in(WEST, SOUTH, WEST + SIDE_DEG, SOUTH + SIDE_DEG)
    ids = [str(photo["photo_id"]) for photo in photos[:400:8]]
    for size in ("n", "m"):
        rows[f"ground photo, size {size}, with JPEG"] = timed(
            lambda photo_id, size=size: world.render_photo(photo_id, size), ids, repeats
        )
    rows["captioned photo, 64 px"] = timed(lambda seed: captioned_photos(seed, 100), [1, 2, 3], repeats)
    for key in ("median_ms", "mean_ms", "slowest_ms"):
        rows["captioned photo, 64 px"][key] /= 100
    rows["search of 2 km radius, cells made already"] = timed(
        lambda _: world.photos_near(WEST + 0.12, SOUTH + 0.13, 2.0), [0], 20
    )
    start = time.perf_counter()
    count = len(World(0).photos_in(WEST, SOUTH, WEST + SIDE_DEG, SOUTH + SIDE_DEG))
    rows["photos of a quarter degree, from nothing"] = {
        "median_ms": (time.perf_counter() - start) * 1e3,
        "mean_ms": (time.perf_counter() - start) * 1e3,
        "slowest_ms": (time.perf_counter() - start) * 1e3,
        "items": count,
    }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    rows = measure(arguments.repeats)
    load = os.getloadavg()[0]
    print(f"{'what':<48}{'median ms':>11}{'mean ms':>10}{'slowest':>10}{'items':>7}")
    for name, row in rows.items():
        print(
            f"{name:<48}{row['median_ms']:>11.2f}{row['mean_ms']:>10.2f}{row['slowest_ms']:>10.2f}"
            f"{row['items']:>7.0f}"
        )
    for name in ("1 m", "10 m"):
        naive, fast = (
            rows[f"land cover at {name}, {way}"]["mean_ms"] for way in ("point by point", "separable")
        )
        print(f"separable evaluation at {name}: {naive / fast:.0f} times faster")
    print(f"load average {load:.1f} on {os.cpu_count()} cores: compare rows of one run only")
    if arguments.json:
        arguments.json.write_text(json.dumps({"load_average": load, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

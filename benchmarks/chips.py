"""How fast chips are fetched: chips a second beside the limit that concurrency and quota set, requests a chip.

`python benchmarks/chips.py [--chips N] [--latency-ms MS] [--fault-rate SHARE] [--sensor NAME] [--json FILE]`.
A planet in its own process answers after the latency and refuses what exceeds the quota; the pipeline lists scenes,
fetches chips, and stores them in shards, as the asset does. The same chips are fetched twice, into two folders: at
first the planet builds its ground as it is asked for, which no service does, so the second time is the measure. CPU
seconds of both processes tell when the machine, not the service, is the limit.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import _path  # noqa: F401 -- before the package `training`
import psutil
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline import chips, photos, sampling, scenes
from graft_pipeline.imagery import NAIP, SENTINEL2, Sensor
from graft_pipeline.regions import Region
from graft_pipeline.settings import Settings
from resources.earth_engine import EarthEngine
from resources.flickr import EXTRAS
from resources.planet.flickr_api import photo_json
from resources.planet.process import PlanetServer
from resources.planet.world import World

REGION = Region.parse("N42.00W071.50", 0.5)


class Peak:
    """Peak memory of processes while the block runs, sampled."""

    def __init__(self, *pids: int) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.megabytes = [0.0] * len(pids)

    def _sample(self) -> None:
        while not self._done.wait(0.1):
            for number, process in enumerate(self._processes):
                self.megabytes[number] = max(self.megabytes[number], process.memory_info().rss / 1e6)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def found_photos() -> pa.Table:
    """The region's usable photos, as a search would have found them."""
    world, extras = World(0), set(EXTRAS.split(","))
    raw = [photo_json(world, photo, extras) for photo in world.photos_in(*REGION.bounds)]
    table = photos.merge_photos(None, photos.photo_rows(raw, REGION).table)
    return table.filter(pc.equal(table["status"], "ok"))


def _fetch(
    client: EarthEngine,
    tiles: pa.Table,
    listed: pa.Table,
    usable: pa.Table,
    sensor: Sensor,
    concurrency: int,
    folder: Path,
) -> tuple[float, pa.Table]:
    """Seconds, and rows of the index."""
    started = time.perf_counter()
    table, _ = chips.update(
        tiles,
        listed,
        usable,
        sensor,
        folder,
        client.get_chip,
        concurrency=concurrency,
        max_attempts=5,
        today=datetime.now(UTC).date(),
    )
    return time.perf_counter() - started, table


def measure(
    count: int, latency_ms: float, sensor: Sensor, folder: Path, fault_rate: float = 0.0
) -> dict[str, Any]:
    usable = found_photos()
    tiles = sampling.sample_tiles(usable, REGION, sensor, None).slice(0, count)
    if tiles.num_rows < count:
        raise SystemExit(f"The region has {tiles.num_rows} tiles of {sensor.name}: ask for fewer chips.")
    concurrency = Settings.model_fields["ee_concurrency"].default
    quota = Settings.model_fields["ee_requests_per_second"].default
    with PlanetServer(seed=0, latency_ms=latency_ms, quota=quota, fault_rate=fault_rate) as planet:
        assert planet.pid is not None
        settings = Settings(_env_file=None, world="planet", ee_url=planet.url, ee_project="planet")
        client = EarthEngine.from_settings(settings)
        listed = scenes.scene_rows(client.list_scenes(sensor, REGION.bounds), sensor)
        first_wall_s, table = _fetch(client, tiles, listed, usable, sensor, concurrency, folder / "first")
        asked, planet_cpu = client.requests, cpu_s(planet.pid)
        own_cpu = time.process_time()
        with Peak(os.getpid(), planet.pid) as peak:
            wall_s, table = _fetch(client, tiles, listed, usable, sensor, concurrency, folder / "second")
        own_cpu = time.process_time() - own_cpu
        planet_cpu, stats = cpu_s(planet.pid) - planet_cpu, planet.stats()
    stored = pc.sum(pc.equal(table["status"], "ok")).as_py()
    limit = min(quota, concurrency / (latency_ms / 1000)) if latency_ms else quota
    return {
        "sensor": sensor.name,
        "chips": count,
        "stored": stored,
        "wall_s": wall_s,
        "first_chips_per_s": count / first_wall_s,
        "chips_per_s": count / wall_s,
        "limit_per_s": limit,
        "share_of_limit": count / wall_s / limit,
        "requests_per_chip": (client.requests - asked) / count,
        "refused": stats["throttled"],
        "max_in_flight": stats["max_in_flight"],
        "cpu_ms_per_chip": own_cpu / count * 1e3,
        "planet_cpu_ms_per_chip": planet_cpu / count * 1e3,
        "cores_for_limit": (own_cpu + planet_cpu) / count * limit,
        "peak_mb": peak.megabytes[0],
        "planet_peak_mb": peak.megabytes[1],
        "megabytes_stored": sum(file.stat().st_size for file in (folder / "second").iterdir()) / 1e6,
        "load_average": os.getloadavg()[0],
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", type=int, default=2000)
    parser.add_argument("--latency-ms", type=float, default=200)
    parser.add_argument("--fault-rate", type=float, default=0.0, help="share of requests that fail or stall")
    parser.add_argument("--sensor", choices=["naip", "sentinel2"], default="naip")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    sensor = {"naip": NAIP, "sentinel2": SENTINEL2}[arguments.sensor]
    with tempfile.TemporaryDirectory() as folder:
        row = measure(
            arguments.chips, arguments.latency_ms, sensor, Path(folder) / "chips", arguments.fault_rate
        )
    print(
        f"{row['chips']} {row['sensor']} chips, {arguments.latency_ms:g} ms latency, "
        f"{arguments.fault_rate:.0%} faults, {row['wall_s']:.1f} s"
    )
    print(f"{'chips a second':<28}{row['chips_per_s']:>9.1f}   limit {row['limit_per_s']:.0f}")
    print(f"{'the first time':<28}{row['first_chips_per_s']:>9.1f}")
    print(f"{'share of the limit':<28}{row['share_of_limit']:>9.1%}   target 90 %")
    print(f"{'requests a chip':<28}{row['requests_per_chip']:>9.4f}   target 1.01; refused: {row['refused']}")
    print(f"{'stored':<28}{row['stored']:>9}   {row['megabytes_stored']:.0f} MB")
    print(f"{'CPU a chip, pipeline':<28}{row['cpu_ms_per_chip']:>6.2f} ms   peak {row['peak_mb']:.0f} MB")
    print(
        f"{'CPU a chip, planet':<28}{row['planet_cpu_ms_per_chip']:>6.2f} ms   peak {row['planet_peak_mb']:.0f} MB"
    )
    print(
        f"At the limit both keep {row['cores_for_limit']:.2f} cores busy; this machine has {row['cores']}, and its "
        f"load average was {row['load_average']:.1f}."
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How fast the search page answers over many tiles: search, density, hits and single requests, over HTTP on loopback.

`python benchmarks/serving.py [--tiles N] [--width D] [--regions R] [--architecture NAME] [--repeats K] [--json FILE]`.
A storage root is made with random chip embeddings, indexed, and served by a process of its own, with a text tower of
production's size. `new words` are asked for the first time: they are encoded, and every tile is scored. `page` is what
the browser asks for at one search, list and density side by side. CPU seconds are the server's.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import _path  # noqa: F401 -- before the package `training`
import numpy as np
import psutil
import pyarrow as pa
import requests
from upath import UPath

from graft_pipeline import search_index
from graft_pipeline.embeddings import to_column
from graft_pipeline.imagery import NAIP
from graft_pipeline.manifests import partition_file, write_table
from graft_pipeline.regions import Region
from graft_pipeline.schemas import CHIP_EMBEDDINGS, CHIPS

#: Seconds that a query may take (target of the page).
TARGET_S = 1.0


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def build(root: UPath, tiles: int, width: int, regions: int) -> None:
    random = np.random.default_rng(0)
    first = datetime(2018, 1, 1, tzinfo=UTC)
    # Twenty kinds of ground and noise, so that scores have tails.
    kinds = unit(random.normal(0, 1, (20, width)))
    for number in range(regions):
        count = tiles // regions + (number < tiles % regions)
        region = Region(30.0 + number // 10, -110.0 + number % 10)
        place = {"sensor": "naip", "region": region.key}
        ids = [f"naip-{number:03d}{k:06d}" for k in range(count)]
        lon, lat = region.west_deg + random.random(count), region.south_deg + random.random(count)
        vectors = unit(
            kinds[random.integers(0, 20, count)] + random.normal(0, 1 / np.sqrt(width), (count, width))
        )
        embedded = {"tile_id": ids, "center_lon_deg": lon, "center_lat_deg": lat, "chip_sha256": ids}
        table = pa.table(embedded | {"embedding": to_column(vectors), "model_id": ["a"] * count})
        write_table(partition_file(root, CHIP_EMBEDDINGS, **place), table, CHIP_EMBEDDINGS)
        nothing = dict.fromkeys(CHIPS.schema.names)
        row = {
            **nothing,
            "status": "ok",
            "attempts": 1,
            "scene_id": "scene",
            "scenes_tried": 1,
            "epsg": region.epsg,
        }
        row |= {
            "x0_m": 0.0,
            "y0_m": 0.0,
            "gsd_m": NAIP.gsd_m,
            "chip_px": NAIP.chip_px,
            "shard": "chips-00000.tar",
        }
        rows = [
            row | {"tile_id": i, "acquired_at_utc": first + timedelta(days=k % 1500)}
            for k, i in enumerate(ids)
        ]
        write_table(
            partition_file(root, CHIPS, **place), pa.Table.from_pylist(rows, schema=CHIPS.schema), CHIPS
        )
    search_index.update(root, "naip")


def serve(root: str, architecture: str, width: int, port: int) -> None:
    """The server's process."""
    from graft_pipeline.search import SearchIndex
    from graft_pipeline.web.app import create_app
    from graft_pipeline.web.server import run

    folder = UPath(root)
    index = SearchIndex.open(folder, "naip")
    encode_text = text_tower(architecture) if architecture else partial(drawn, width)
    app = create_app(root=folder, index=index, sensor=NAIP, encode_text=encode_text, grid_deg=1.0)
    run(app, "127.0.0.1", port, on_ready=lambda url: None)


def drawn(width: int, words: str) -> np.ndarray:
    """A vector that is drawn, not encoded."""
    seed = int.from_bytes(words.encode()[:8], "little")
    return unit(np.random.default_rng(seed).normal(0, 1, width))


def text_tower(architecture: str) -> Callable[[str], np.ndarray]:
    """The text tower of a model of production's size: random weights take as long as learned ones."""
    import open_clip

    from training.encoders import Clip
    from training.zero_shot.queries import text_vector

    model = open_clip.create_model(architecture).eval()
    config, preprocess = open_clip.get_model_config(architecture), dict(model.visual.preprocess_cfg)
    clip = Clip(model, open_clip.get_tokenizer(architecture), config, preprocess, architecture)
    return partial(text_vector, clip)


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def measure(url: str, process: psutil.Process, name: str, paths: list[list[str]]) -> dict[str, Any]:
    """Ask for each entry of paths, the requests of one entry side by side."""
    wall, cpu, size = [], [], 0
    with ThreadPoolExecutor(4) as pool, requests.Session() as session:
        session.get(f"{url}/health", timeout=60)

        def ask(path: str) -> int:
            answer = session.get(f"{url}/{path}", timeout=120)
            answer.raise_for_status()
            return len(answer.content)

        for together in paths:
            before, started = cpu_s(process), time.perf_counter()
            sizes = list(pool.map(ask, together))
            wall.append(time.perf_counter() - started)
            cpu.append(cpu_s(process) - before)
            size = sum(sizes)
    return {
        "request": name,
        "median_s": statistics.median(wall),
        "worst_s": max(wall),
        "cpu_s": statistics.fmean(cpu),
        "answer_kb": size / 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512, help="dimensions; 512 for ViT-B-16")
    parser.add_argument(
        "--architecture", default="ViT-B-16", help="text tower; empty: vectors are drawn at once"
    )
    parser.add_argument("--regions", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--serve", nargs=2, metavar=("ROOT", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], options.architecture, options.width, int(options.serve[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        build(UPath(folder), options.tiles, options.width, options.regions)
        build_s = time.perf_counter() - started
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, __file__, "--serve", folder, str(port)]
        command += ["--width", str(options.width), "--architecture", options.architecture]
        # Idle threads of torch sleep, as under make: they would count as CPU seconds.
        server = subprocess.Popen(command, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
        try:
            process, url = psutil.Process(server.pid), f"http://127.0.0.1:{port}"
            while True:
                try:
                    requests.get(f"{url}/health", timeout=5)
                    break
                except requests.ConnectionError:
                    assert server.poll() is None, "the server ended"
                    time.sleep(0.05)
            rows = run_all(url, process, options.repeats)
            memory = process.memory_full_info()
        finally:
            server.terminate()
            server.wait()
    print(
        f"{options.tiles:,} tiles of {options.width} dimensions in {options.regions} regions, made in {build_s:.0f} s"
    )
    print(f"{'request':<34}{'median':>9}{'worst':>9}{'CPU':>9}{'answer':>11}")
    for row in rows:
        print(
            f"{row['request']:<34}{row['median_s'] * 1e3:>6.0f} ms{row['worst_s'] * 1e3:>6.0f} ms"
            f"{row['cpu_s'] * 1e3:>6.0f} ms{row['answer_kb']:>8.0f} kB"
        )
    print(
        f"Target: a page's query in {TARGET_S:g} s. The server holds {memory.rss / 1e6:.0f} MB, "
        f"{memory.uss / 1e6:.0f} MB its own; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores."
    )
    if options.json:
        result = {
            "tiles": options.tiles,
            "width": options.width,
            "architecture": options.architecture,
            "regions": options.regions,
            "rss_mb": memory.rss / 1e6,
            "own_mb": memory.uss / 1e6,
            "load_average": os.getloadavg()[0],
            "requests": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def run_all(url: str, process: psutil.Process, repeats: int) -> list[dict[str, Any]]:
    def many(template: str) -> list[list[str]]:
        return [[template.format(words=f"{k} words of {template[4:12]}")] for k in range(repeats)]

    small, region = "-109,30,-108.9,30.1", "-110,30,-109,31"
    pages = [
        [f"api/search?words={k} for the page&top=24", f"api/density?words={k} for the page"]
        for k in range(repeats)
    ]
    # The first request of all pays for pages of the index and for imports.
    first = measure(
        url, process, "page, first of all", [["api/search?words=first", "api/density?words=first"]]
    )
    return [
        first,
        measure(url, process, "page, new words", pages),
        measure(url, process, "page, the same words again", pages),
        measure(url, process, "search, new words", many("api/search?words={words}&top=24")),
        measure(url, process, "search, top 500, known words", many("api/search?words={words}&top=500")),
        measure(
            url,
            process,
            "search in a new box and dates",
            many(f"api/search?words={{words}}&box={region}&since=2019-01-01&until=2020-12-31"),
        ),
        measure(url, process, "density, new words", many("api/density?words={words}")),
        measure(
            url,
            process,
            "density of a view, known words",
            [[f"api/density?words=first&view={small}"]] * repeats,
        ),
        measure(url, process, "density of a new box", many(f"api/density?words={{words}}&box={region}")),
        measure(
            url,
            process,
            "hits as GeoJSON, known words",
            [["api/hits.geojson?words=first&contrast=1"]] * repeats,
        ),
    ]


if __name__ == "__main__":
    main()

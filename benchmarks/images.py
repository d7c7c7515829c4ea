"""How fast ground images are fetched and stored, beside img2dataset on the same URLs in the same run.

`python benchmarks/images.py [--images N] [--threads N] [--repeats N] [--venv DIR] [--json FILE]`. A server on loopback
holds the planet's photos ready as JPEGs of 640 px. Both fetch all of them with as many threads in one process, make
the shorter side 256 px, encode JPEG at quality 90, hash and store in tar shards. img2dataset gets its own environment,
made once: it needs an older pandas than ours. Images a second leave out how long each takes to start; CPU does not.
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import _path  # noqa: F401 -- before the package `training`
import pyarrow as pa

from graft_pipeline import ground_images
from graft_pipeline.schemas import FLICKR_PHOTOS

IMG2DATASET = "img2dataset==1.47.0"
ROOT = Path(__file__).resolve().parents[1]
QUALITY = 90
#: Run by the other environment's Python. One shard: its statistics tell when work began and ended.
THEIRS = """
import sys
from img2dataset import download

if __name__ == "__main__":
    urls, folder, threads, count = sys.argv[1:]
    download(
        url_list=urls, output_folder=folder, output_format="webdataset", processes_count=1,
        thread_count=int(threads), number_sample_per_shard=int(count), image_size=256, resize_mode="keep_ratio",
        resize_only_if_bigger=True, encode_format="jpg", encode_quality=90, compute_hash="sha256",
        extract_exif=False, enable_wandb=False,
    )
"""


def serve(folder: Path) -> None:
    """The image server: files of a folder from memory; prints its port."""
    import socket

    import uvicorn

    files = {f"/static/1/{file.name}": file.read_bytes() for file in folder.iterdir()}

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        body = files.get(scope["path"])
        headers = [(b"content-type", b"image/jpeg"), (b"content-length", str(len(body or b"")).encode())]
        await send({"type": "http.response.start", "status": 200 if body else 404, "headers": headers})
        await send({"type": "http.response.body", "body": body or b""})

    # asyncio switches off Nagle's delay only where the protocol is named.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(app, lifespan="off", access_log=False, log_level="warning", http="h11")
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


def ours(url: str, names: Path, folder: Path, threads: int) -> None:
    """The process of our pipeline; prints how long it took and what it stored."""
    from resources.images import ImageFetcher

    rows = [
        {
            **dict.fromkeys(FLICKR_PHOTOS.schema.names),
            "photo_id": name.split("_")[0],
            "owner_id": "someone@N00",
            "lon_deg": 0.0,
            "lat_deg": 0.0,
            "accuracy": 16,
            "uploaded_at_utc": datetime(2020, 1, 1, tzinfo=UTC),
            "is_taken_exact": False,
            "image_url": f"https://live.staticflickr.com/1/{name}",
            "status": "ok",
        }
        for name in names.read_text().split()
    ]
    photos = pa.Table.from_pylist(rows, schema=FLICKR_PHOTOS.schema)
    fetcher = ImageFetcher(static_url=f"{url}/static", concurrency=threads)
    started = time.perf_counter()
    table, _ = ground_images.update(
        photos, folder, fetcher.fetch, concurrency=threads, max_attempts=1, today=datetime.now(UTC).date()
    )
    took_s = time.perf_counter() - started
    counts = {row["values"]: row["counts"] for row in table["status"].value_counts().to_pylist()}
    print(json.dumps({"wall_s": took_s, "fetched": counts.get("ok", 0) + counts.get("rejected", 0)}))


def environment(folder: Path) -> Path:
    """The Python that has img2dataset; made once."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"Making {folder} for {IMG2DATASET} ...", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", IMG2DATASET],
            check=True,
        )
        (folder / "ready").touch()
    return python


def cost(command: list[str]) -> tuple[str, float, float]:
    """Run a process: what it printed, CPU seconds with its children, peak memory of the largest of them, MB."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"},
        )
        output = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{command[:3]} ended with {process.returncode}:\n{log.read().decode()[-2000:]}")
    return output, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def render(count: int, folder: Path) -> list[str]:
    """Photos of the planet as files, named as Flickr names them."""
    from resources.planet.world import World

    world, names = World(0), []
    for photo in world.photos_in(-71.5, 42.0, -70.75, 42.75):
        if photo["original_px"] >= 640 and photo["has_urls"] and not photo["flaw"]:
            jpeg = world.render_photo(str(photo["photo_id"]), "z")
            assert jpeg is not None
            names.append(f"{photo['photo_id']}_{photo['secret']}_z.jpg")
            (folder / names[-1]).write_bytes(jpeg)
            if len(names) == count:
                return names
    raise SystemExit(f"There are {len(names)} photos: ask for fewer images.")


def measure(count: int, threads: int, repeats: int, other: Path, folder: Path) -> dict[str, Any]:
    (folder / "photos").mkdir()
    names = render(count, folder / "photos")
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(folder / "photos")], stdout=subprocess.PIPE, text=True
    )
    rows: dict[str, list[dict[str, float]]] = {"graft_pipeline": [], "img2dataset": []}
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        (folder / "names").write_text("\n".join(names))
        (folder / "urls.txt").write_text("\n".join(f"{url}/static/1/{name}" for name in names))
        (folder / "theirs.py").write_text(THEIRS)
        # In turn, so that whatever else the machine does meets both.
        for repeat in range(repeats):
            target = folder / f"ours-{repeat}"
            command = [
                sys.executable,
                __file__,
                "--ours",
                url,
                str(folder / "names"),
                str(target),
                str(threads),
            ]
            output, cpu_s, peak_mb = cost(command)
            done = json.loads(output)
            rows["graft_pipeline"].append({**done, "cpu_s": cpu_s, "peak_mb": peak_mb})
            target = folder / f"theirs-{repeat}"
            command = [str(other), str(folder / "theirs.py"), str(folder / "urls.txt"), str(target)]
            _, cpu_s, peak_mb = cost([*command, str(threads), str(count)])
            (stats,) = (json.loads(file.read_text()) for file in target.glob("*_stats.json"))
            took_s = stats["end_time"] - stats["start_time"]
            rows["img2dataset"].append(
                {"wall_s": took_s, "fetched": stats["successes"], "cpu_s": cpu_s, "peak_mb": peak_mb}
            )
    finally:
        server.kill()
        server.wait()
    best = {name: min(some, key=lambda row: row["wall_s"]) for name, some in rows.items()}
    for row in best.values():
        row["images_per_s"] = row["fetched"] / row["wall_s"]
        row["cpu_ms_per_image"] = row["cpu_s"] / row["fetched"] * 1e3
    return {
        "images": count,
        "threads": threads,
        "rows": best,
        "all": rows,
        "ratio": best["graft_pipeline"]["images_per_s"] / best["img2dataset"]["images_per_s"],
        "server_cpu_s": sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        - sum(row["cpu_s"] for some in rows.values() for row in some),
        "load_average": os.getloadavg()[0],
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of each counts")
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv" / "img2dataset", help="img2dataset's environment"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ours", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    if arguments.ours:
        url, names, target, threads = arguments.ours
        ours(url, Path(names), Path(target), int(threads))
        return
    other = environment(arguments.venv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.images, arguments.threads, arguments.repeats, other, Path(folder))
    print(f"{result['images']} images of 640 px, {result['threads']} threads, best of {arguments.repeats}")
    print(f"{'':<16}{'images/s':>10}{'fetched':>9}{'CPU ms/image':>14}{'peak MB':>9}")
    for name, row in result["rows"].items():
        print(
            f"{name:<16}{row['images_per_s']:>10.1f}{row['fetched']:>9.0f}{row['cpu_ms_per_image']:>14.2f}"
            f"{row['peak_mb']:>9.0f}"
        )
    print(
        f"ratio {result['ratio']:.2f} (target 1); {result['cores']} cores, load average {result['load_average']:.1f}, "
        f"server {result['server_cpu_s']:.1f} CPU s"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

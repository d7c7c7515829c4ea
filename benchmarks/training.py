"""How fast satellite encoders learn: what caching saves, what chips cost to load, what a GPU makes of it.

`python benchmarks/training.py [--json FILE]`, some minutes on two cores. Weights are random and chips painted by
the planet, as only time is measured; nothing is downloaded. The parts, each side by side in one run:

* steps: a step with cached ground embeddings, the same step encoding its photos anew, and open_clip's own step of
  both towers at the same batch.
* loading: chips from shards to a batch, against what a GPU consumes.
* training: `training.loop.train` itself, on the GPU if there is one: images a second, share of the measured rate of
  matrix products, memory, and share of the time that steps wait for data.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _path  # noqa: F401 -- before the package `training`
import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F  # noqa: N812 -- PyTorch's own idiom
from upath import UPath

from graft_pipeline.chips import encode
from graft_pipeline.errors import TrainingError
from graft_pipeline.geometry import Grid
from graft_pipeline.imagery import NAIP
from graft_pipeline.schemas import TRAINING_PAIRS
from graft_pipeline.shards import ShardWriter
from resources.planet.world import World
from training.data import Batches, Chips, TrainingSet
from training.encoders import Clip, image_features
from training.export import save_encoder
from training.foundation import FoundationConfig
from training.loop import TrainConfig, peak_memory_gb, train
from training.losses import image_level_loss
from training.optimisation import make_optimizer

#: Share of the measured rate of matrix products that the issue aims at.
AIM = 0.45

#: Where chips come from that are not in memory; epochs of the paper's configuration.
SOURCES, EPOCHS = ("shards", "chip_cache"), 10

# --- what is trained on ----------------------------------------------------------------------------------------------


def model_config(architecture: str) -> dict[str, Any]:
    if architecture == "planet":
        return FoundationConfig().model_config()
    return open_clip.get_model_config(architecture)


def random_foundation(architecture: str, folder: Path) -> str:
    """An open_clip folder with random weights; returns what `load_clip` takes."""
    config = model_config(architecture)
    preprocess = {
        "size": config["vision_cfg"]["image_size"],
        "mean": list(open_clip.OPENAI_DATASET_MEAN),
        "std": list(open_clip.OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    clip = Clip(open_clip.CLIP(**config), None, config, preprocess, architecture)
    return f"local-dir:{save_encoder(UPath(folder), clip)}"


def write_training_set(root: Path, tiles: int, photos: int, width: int) -> UPath:
    """A training set of painted 448 px chips, one of it for validation; returns its snapshot folder."""
    world, random = World(0), np.random.default_rng(0)
    painted = []
    for x, y in random.uniform((2.7e5, 4.69e6), (2.9e5, 4.71e6), (min(tiles, 16), 2)).tolist():
        grid = Grid.snapped(32619, x, y, NAIP.gsd_m, NAIP.chip_px)
        pixels = world.render_naip(grid, 2021, 1)[:3]
        painted.append(encode(np.ascontiguousarray(pixels.transpose(1, 2, 0)), grid))
    (root / "chips").mkdir(parents=True)
    rows = []
    with ShardWriter(root / "chips", "chips-00000.tar") as shard:
        for tile in range(tiles):
            place = shard.add(f"naip-{tile:06d}.tif", painted[tile % len(painted)])
            for photo in range(photos):
                column, row = random.uniform(112, 336, 2)
                rows.append(
                    {
                        "tile_id": f"naip-{tile:06d}",
                        "photo_id": f"{tile:06d}{photo:02d}",
                        "region": "N42W072",
                        "split": "train" if tile else "validation",
                        "col_px": column,
                        "row_px": row,
                        "lon_deg": -71.0,
                        "lat_deg": 42.0,
                        "chip_shard": "chips/chips-00000.tar",
                        "chip_offset": place.offset,
                        "chip_size_bytes": place.size_bytes,
                        "embedding_row": len(rows),
                    }
                )
    folder = root / "training_set" / "sensor=naip" / "snapshot=benchmark"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=TRAINING_PAIRS.schema), folder / "training_set.parquet")
    embeddings = random.normal(size=(len(rows), width)).astype(np.float32)
    np.save(folder / "ground_embeddings.npy", embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))
    return UPath(folder)


# --- steps -----------------------------------------------------------------------------------------------------------


def measure_steps(options: argparse.Namespace, architecture: str) -> dict[str, Any]:
    """Medians of the three steps, in ms and CPU seconds, and of their ratios within each repeat."""
    device, config = torch.device(options.device), model_config(architecture)
    torch.manual_seed(0)
    both = open_clip.CLIP(**config, output_dict=True).to(device).train()
    satellite, ground = (open_clip.CLIP(**config).visual.to(device) for _ in range(2))
    ground.eval()
    ours = make_optimizer(satellite.parameters(), 1e-5, 1e-2, (0.9, 0.98))
    theirs = make_optimizer(both.parameters(), 1e-5, 1e-2, (0.9, 0.98))
    side, count = config["vision_cfg"]["image_size"], options.tiles * options.photos
    chips = torch.randn(options.tiles, 3, side, side, device=device)
    photos = torch.randn(count, 3, side, side, device=device)
    texts = torch.randint(1, 400, (options.tiles, config["text_cfg"]["context_length"]), device=device)
    owner = torch.arange(count, device=device) % options.tiles
    cache = F.normalize(torch.randn(count, config["embed_dim"], device=device), dim=1)
    clip_loss = open_clip.ClipLoss()

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16")

    def apply(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        # Reading the loss waits for the device.
        loss.item()

    def cached(embedded: torch.Tensor = cache) -> None:
        with autocast():
            features = image_features(satellite, chips).float()
        apply(image_level_loss(features, embedded, owner, 0.07), ours)

    def online() -> None:
        with torch.no_grad(), autocast():
            embedded = image_features(ground, photos).float()
        cached(embedded)

    def open_clips() -> None:
        with autocast():
            loss = clip_loss(**both(chips, texts))
        apply(loss, theirs)

    steps = {"cached": cached, "online": online, "open_clip, both towers": open_clips}
    for step in steps.values():
        step()
    # Interleaved, so that whatever else the machine does hits all of them.
    seconds = {name: [] for name in steps}
    cpu = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            step()
            seconds[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - started_cpu)
    rows = {
        name: {
            "median_ms": statistics.median(seconds[name]) * 1e3,
            "cpu_s": statistics.median(cpu[name]),
            "tiles_per_s": options.tiles / statistics.median(seconds[name]),
            "ratio": statistics.median(np.divide(seconds[name], seconds["cached"])),
            "cpu_ratio": statistics.median(np.divide(cpu[name], cpu["cached"])),
        }
        for name in steps
    }
    return {"tiles": options.tiles, "photos": count, "rows": rows, "memory_gb": peak_memory_gb()}


# --- loading ---------------------------------------------------------------------------------------------------------


def measure_loading(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Chips a second from shards to batches, and of the decoder alone beside rasterio's."""
    import rasterio
    from rasterio.io import MemoryFile

    from graft_pipeline.chips import decode
    from graft_pipeline.shards import read_member

    snapshot = write_training_set(folder, options.chips, options.photos, 512)
    data = TrainingSet(snapshot, UPath(folder))
    tiles, side = data.split("train"), NAIP.chip_px

    def batches(**where: Path) -> Callable[[], int]:
        chips = Chips(
            tiles, UPath(folder), chip_px=side, side_px=side, memory_bytes=0, threads=options.threads, **where
        )
        drawn = Batches(
            tiles, chips, data.targets, crop_px=224, batch_tiles=32, photos_per_tile=25, max_shift=0.5, seed=0
        )
        return lambda: sum(len(some.chips) for some in drawn.stream(0, drawn.per_epoch, lambda batch: batch))

    contents = [
        read_member(UPath(folder), tiles.shard[t], int(tiles.offset[t]), int(tiles.size_bytes[t]))
        for t in range(len(tiles))
    ]

    def decoded(decoder: Callable[[bytes], Any]) -> Callable[[], int]:
        def work() -> int:
            with ThreadPoolExecutor(options.threads) as pool:
                return sum(1 for _ in pool.map(decoder, contents))

        return work

    def by_rasterio(content: bytes) -> np.ndarray:
        with MemoryFile(content) as memory, memory.open() as file:
            return np.ascontiguousarray(np.moveaxis(file.read(), 0, -1))

    works = {
        "batches from shards": batches(),
        "batches from chip_cache": batches(cache_folder=folder / "cache"),
        "decoding alone": decoded(decode),
        "decoding by rasterio": decoded(by_rasterio),
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    with rasterio.Env():
        for work in works.values():
            work()
        for _ in range(options.repeats):
            for name, work in works.items():
                started, started_cpu = time.perf_counter(), time.process_time()
                count = work()
                cpu_s = time.process_time() - started_cpu
                rates[name].append((count / (time.perf_counter() - started), count / cpu_s))
    rows = {
        name: {
            "chips_per_s": statistics.median(rate for rate, _ in some),
            "chips_per_cpu_s": statistics.median(rate for _, rate in some),
        }
        for name, some in rates.items()
    }
    mean_kb = float(np.mean([len(content) for content in contents]) / 1e3)
    return {"chips": len(tiles), "mean_kb": mean_kb, "threads": options.threads, "rows": rows}


# --- training --------------------------------------------------------------------------------------------------------


def flop_per_image(architecture: str) -> float:
    """Floating-point operations of a training step per image, a multiply-add being two.

    Counted are the matrix products of the vision tower: patch embedding, per block 24 n w^2 (projections and MLP)
    and 4 n^2 w (attention), n tokens of width w, and the projection; a backward pass costs two forward passes.
    Norms, activations, the loss and the optimizer are not counted, nor what checkpointing computes again.
    """
    config = model_config(architecture)
    vision, width = config["vision_cfg"], config["vision_cfg"]["width"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    tokens = patches + 1
    embedding = 2 * patches * 3 * vision["patch_size"] ** 2 * width
    blocks = vision["layers"] * (24 * tokens * width**2 + 4 * tokens**2 * width)
    return 3.0 * (embedding + blocks + 2 * width * config["embed_dim"])


def matrix_rate(device: torch.device, precision: str, repeats: int = 10) -> float:
    """Operations a second of one large square matrix product, the median of some, on random numbers."""
    side = 8192 if device.type == "cuda" else 1536
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        (left @ right)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2.0 * side**3 / statistics.median(seconds[3:])


def measure_training(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The real loop at both levels; the largest batch that pays, chips in memory and from shards."""
    device = torch.device(options.device)
    is_gpu = device.type == "cuda"
    precision = "bf16" if is_gpu else options.precision
    rate = matrix_rate(device, precision)
    rows = []
    for architecture in options.architectures if is_gpu else options.architectures[:1]:
        foundation = random_foundation(architecture, folder / f"foundation-{architecture}")
        width = model_config(architecture)["embed_dim"]
        root = folder / f"data-{architecture}"
        most = max(options.batches)
        snapshot = write_training_set(root, most + 1, options.photos, width)

        def run(level: str, batch: int, **changes: Any) -> dict[str, Any] | None:
            config = TrainConfig(
                level=level,
                architecture=foundation,  # noqa: B023 -- called in this turn of the loop only
                pretrained=None,
                steps=options.steps,
                batch_tiles=batch,
                warmup_steps=1,
                validate_every=options.steps,
                precision=precision,
                device=options.device,
                **{"chip_memory_gb": 1e3, "compile_backend": options.compile_backend} | changes,
            )
            if is_gpu:
                torch.cuda.empty_cache()
            try:
                result = train(config, snapshot, UPath(root), UPath(folder / "output"))  # noqa: B023
            except TrainingError as error:
                print(f"{architecture} {level}, batch {batch}: {str(error).split(':')[0]}")  # noqa: B023
                return None
            flop = flop_per_image(architecture)  # noqa: B023
            return {
                "architecture": architecture,  # noqa: B023
                "level": level,
                "batch_tiles": batch,
                "chips": "memory" if config.chip_memory_gb else "shards",
                "images_per_s": result.tiles_per_second,
                "gflop_per_image": flop / 1e9,
                "share_of_matrix_rate": result.tiles_per_second * flop / rate,
                "waiting_share": result.waiting_share,
                "cpu_s": result.cpu_seconds,
                "memory_gb": result.peak_device_memory_gb or result.peak_memory_gb,
            }

        for level in ("image", "pixel"):
            tried = []
            for batch in options.batches:
                row = run(level, batch)
                if row is None:
                    break
                tried.append(row)
            if tried:
                best = max(tried, key=lambda row: row["images_per_s"])
                rows += tried
                # On a CPU the step takes so long that chips are always there in time.
                rows += [run(level, best["batch_tiles"], chip_memory_gb=0.0)] if is_gpu else []
    return {"device": _name(device), "precision": precision, "matrix_tflop_per_s": rate / 1e12, "rows": rows}


def consumption(
    loading: dict[str, Any], training: dict[str, Any] | None, assumed_tflops: float
) -> dict[str, Any]:
    """Chips that eight cores load, against those that a GPU consumes: measured, or at the aim.

    With the cache the first of the paper's ten epochs is loaded from shards, the other nine from the cache.
    """
    shards, cache = (loading["rows"][f"batches from {where}"]["chips_per_cpu_s"] for where in SOURCES)
    loaded = {
        "shards": 8 * shards,
        "shards, then chip_cache": 8 * EPOCHS / (1 / shards + (EPOCHS - 1) / cache),
    }
    rows = {}
    for architecture in ("ViT-B-16", "ViT-B-32"):
        measured = [
            row["images_per_s"]
            for row in (training or {}).get("rows", ())
            if row["architecture"] == architecture
        ]
        at_aim = AIM * assumed_tflops * 1e12 / flop_per_image(architecture)
        consumed = max(measured) if measured else at_aim
        for source, rate in loaded.items():
            rows[f"{architecture}, {source}"] = {
                "consumed_per_s": consumed,
                "is_measured": bool(measured),
                "eight_cores_per_s": rate,
                "ratio": rate / consumed,
            }
    return rows


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"


# --- the report ------------------------------------------------------------------------------------------------------


def show(results: dict[str, Any], options: argparse.Namespace) -> None:
    steps, loading, training = (results.get(name) for name in ("steps", "loading", "training"))
    for architecture, row in (steps or {}).items():
        print(
            f"\n{architecture}, {options.precision}, {options.device}, {options.torch_threads} threads: "
            f"{row['tiles']} tiles, {row['photos']} photos a step, {row['memory_gb']:.1f} GB"
        )
        print(f"{'step':<26}{'median ms':>11}{'CPU s':>8}{'tiles/s':>9}{'ratio':>8}{'CPU ratio':>11}")
        for name, some in row["rows"].items():
            print(
                f"{name:<26}{some['median_ms']:>11.0f}{some['cpu_s']:>8.2f}{some['tiles_per_s']:>9.2f}"
                f"{some['ratio']:>8.2f}{some['cpu_ratio']:>11.2f}"
            )
    if loading:
        print(
            f"\n{loading['chips']} chips of 448 px, {loading['mean_kb']:.0f} kB each, {loading['threads']} threads"
        )
        print(f"{'loading':<26}{'chips/s':>11}{'per CPU second':>16}")
        for name, row in loading["rows"].items():
            print(f"{name:<26}{row['chips_per_s']:>11.0f}{row['chips_per_cpu_s']:>16.0f}")
        for name, row in results["consumption"].items():
            how = (
                "measured" if row["is_measured"] else f"at {AIM:.0%} of {options.assumed_tflops:.0f} TFLOP/s"
            )
            print(
                f"{name}: eight such cores load {row['eight_cores_per_s']:.0f}/s, {row['ratio']:.1f} times the "
                f"{row['consumed_per_s']:.0f}/s of a GPU ({how})"
            )
    if training:
        print(
            f"\n{training['device']}, {training['precision']}: matrix products at "
            f"{training['matrix_tflop_per_s']:.2f} TFLOP/s"
        )
        print(
            f"{'training':<18}{'batch':>7}{'chips':>8}{'images/s':>10}{'GFLOP/image':>13}{'of matrix rate':>16}"
            f"{'waiting':>9}{'CPU s':>8}{'GB':>7}"
        )
        for row in training["rows"]:
            print(
                f"{row['architecture'] + ' ' + row['level']:<18}{row['batch_tiles']:>7}{row['chips']:>8}"
                f"{row['images_per_s']:>10.1f}{row['gflop_per_image']:>13.1f}{row['share_of_matrix_rate']:>16.1%}"
                f"{row['waiting_share']:>9.1%}{row['cpu_s']:>8.1f}{row['memory_gb']:>7.1f}"
            )
    print(
        f"\nload average {results['load_average']:.1f} on {os.cpu_count()} cores: compare rows of one run only"
    )


def main() -> None:
    is_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--parts", default="steps,loading,training", help="which of them to run")
    parser.add_argument(
        "--architectures",
        nargs="+",
        default=["ViT-B-32", "ViT-B-16"],
        help="planet, or any of open_clip's ViTs; without a GPU the loop trains the first alone",
    )
    parser.add_argument("--tiles", type=int, default=8, help="tiles of a compared step")
    parser.add_argument("--photos", type=int, default=4, help="photos per tile")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="on a CPU; a GPU runs bf16"
    )
    parser.add_argument("--device", default="cuda" if is_gpu else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chips", type=int, default=193, help="chips that loading reads")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads that load chips")
    parser.add_argument("--torch-threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[256, 512, 1024, 2048] if is_gpu else [8],
        help="to train with",
    )
    parser.add_argument("--steps", type=int, default=30 if is_gpu else 4, help="of each training")
    parser.add_argument("--compile-backend", help="of torch.compile, such as inductor")
    parser.add_argument(
        "--assumed-tflops",
        type=float,
        default=800.0,
        help="matrix rate of a GPU, where there is none: an H100's",
    )
    options = parser.parse_args()
    logging.getLogger("training").setLevel(logging.ERROR)
    torch.set_num_threads(options.torch_threads)
    parts = options.parts.split(",")
    results: dict[str, Any] = {"load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        if "steps" in parts:
            results["steps"] = {name: measure_steps(options, name) for name in options.architectures}
        if "training" in parts:
            results["training"] = measure_training(options, Path(folder) / "training")
        if "loading" in parts:
            results["loading"] = measure_loading(options, Path(folder) / "loading")
            measured = results.get("training") if torch.device(options.device).type == "cuda" else None
            results["consumption"] = consumption(results["loading"], measured, options.assumed_tflops)
    show(results, options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

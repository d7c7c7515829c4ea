"""How long `graft trace` looks for a tile or a photo among millions of pairs in hundreds of regions.

`python benchmarks/tracing.py [--regions 900] [--pairs-per-region 11200] [--json FILE] [--scratch FOLDER]`. Two regions
are drawn and written as the pipeline writes them; the others are links to the second. Beside it, in the same run:
reading the id columns whole, as looking without statistics or an engine would. Every step is a process of its own,
start and imports included.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from _measure import Cost, run

SENSOR = "naip"
PHOTOS_PER_TILE = 3


def region_key(number: int) -> str:
    """Keys of a grid of 30 columns."""
    return f"N{10 + number // 30:02d}W{70 + number % 30:03d}"


def rows(dataset: Any, columns: dict[str, Any], count: int) -> Any:
    """A table of a dataset: the columns given, and something of the right type in the others."""
    import numpy as np
    import pyarrow as pa

    made = {}
    for field in dataset.schema:
        if field.name in columns:
            made[field.name] = columns[field.name]
        elif field.nullable:
            made[field.name] = pa.nulls(count, field.type)
        elif pa.types.is_string(field.type):
            made[field.name] = pa.array(["ok"] * count)
        elif pa.types.is_timestamp(field.type):
            made[field.name] = pa.array(np.arange(count) + 1_600_000_000_000).cast(field.type)
        elif pa.types.is_integer(field.type):
            made[field.name] = pa.array(np.arange(count) % 100).cast(field.type)
        else:
            made[field.name] = pa.array(np.random.default_rng(0).random(count) > 0.5).cast(field.type)
    return pa.table(made, schema=dataset.schema)


def prepare(root: Path, regions: int, pairs: int) -> None:
    """Write the datasets below a root; prints a tile and a photo of the first region."""
    import numpy as np
    import pyarrow as pa

    from graft_pipeline import schemas
    from graft_pipeline.manifests import TableWriter, parquet_bytes, partition_file, partition_folder

    rng, drawn = np.random.default_rng(0), []
    paired = (schemas.FLICKR_PHOTOS, schemas.GROUND_IMAGES, schemas.PAIRS)
    for number in range(2):
        photos = np.sort(rng.choice(9 * 10**9, pairs, replace=False) + 10**10).astype(str)
        centers = photos[np.arange(pairs) // PHOTOS_PER_TILE * PHOTOS_PER_TILE]
        tiles = np.char.add(f"{SENSOR}-", centers)
        drawn.append((photos, tiles))
        ids = {"photo_id": pa.array(photos), "tile_id": pa.array(tiles), "center_photo_id": pa.array(centers)}
        firsts = {
            name: column.take(pa.array(np.arange(0, pairs, PHOTOS_PER_TILE))) for name, column in ids.items()
        }
        for dataset in (*paired, schemas.TILES, schemas.CHIPS):
            some = ids if dataset in paired else firsts
            place = {"sensor": SENSOR, "region": region_key(number)}
            file = Path(partition_file(root, dataset, **{name: place[name] for name in dataset.partitions}))
            file.parent.mkdir(parents=True)
            known = {name: column for name, column in some.items() if name in dataset.schema.names}
            file.write_bytes(parquet_bytes(rows(dataset, known, len(some["tile_id"]))))
            for other in range(2, regions) if number == 1 else ():
                link = Path(str(file).replace(region_key(1), region_key(other)))
                link.parent.mkdir(parents=True)
                os.link(file, link)
    snapshot = partition_folder(root, schemas.TRAINING_PAIRS, sensor=SENSOR, snapshot="one")
    Path(snapshot).mkdir(parents=True)
    with TableWriter(Path(snapshot) / "training_set.parquet", schemas.TRAINING_PAIRS) as writer:
        for number in range(regions):
            photos, tiles = drawn[min(number, 1)]
            known = {"photo_id": photos, "tile_id": tiles, "region": [region_key(number)] * pairs}
            known["split"] = ["train"] * pairs
            writer.write(rows(schemas.TRAINING_PAIRS, {n: pa.array(v) for n, v in known.items()}, pairs))
    photos, tiles = drawn[0]
    print(tiles[pairs // 2], photos[pairs // 2])


def trace_one(root: Path, item: str) -> None:
    """Look for an item as `graft trace` does."""
    from upath import UPath

    from graft_pipeline.trace import trace

    found = trace(UPath(root), item)
    assert found.regions == (region_key(0),)


def read_ids(root: Path, item: str) -> None:
    """Look for an item in whole columns."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    column = "tile_id" if item.startswith(SENSOR) else "photo_id"
    for name in (
        ("pairs", "training_set") if column == "tile_id" else ("flickr_photos", "pairs", "training_set")
    ):
        hits = 0
        for file in sorted((root / name).rglob("*.parquet")):
            with file.open("rb") as stream:
                hits += pc.sum(pc.equal(pq.ParquetFile(stream).read([column])[column], item)).as_py()
        assert hits


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--regions", type=int, default=900)
    parser.add_argument("--pairs-per-region", type=int, default=11_200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        name, item = options.step
        if name == "prepare":
            prepare(options.scratch, options.regions, options.pairs_per_region)
        else:
            {"trace": trace_one, "columns": read_ids}[name](options.scratch, item)
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        sizes = ["--regions", str(options.regions), "--pairs-per-region", str(options.pairs_per_region)]
        made = run(__file__, "--scratch", folder, "--step", "prepare", "", *sizes)
        items = dict(zip(("tile", "photo"), made.output.split(), strict=True))
        results: dict[str, dict[str, Cost]] = {
            kind: {
                name: run(__file__, "--scratch", folder, "--step", name, item)
                for name in ("trace", "columns")
            }
            for kind, item in items.items()
        }
    print(f"{options.regions * options.pairs_per_region:,} pairs in {options.regions:,} regions")
    print(f"{'':14}{'CPU s':>8}{'wall s':>8}{'peak MB':>9}")
    for kind, costs in results.items():
        for name, cost in costs.items():
            print(f"{kind + ' ' + name:14}{cost.cpu_s:8.1f}{cost.wall_s:8.1f}{cost.peak_mb:9.0f}")
    if options.json:
        numbers = {
            kind: {
                name: {"cpu_s": c.cpu_s, "wall_s": c.wall_s, "peak_mb": c.peak_mb}
                for name, c in costs.items()
            }
            for kind, costs in results.items()
        }
        options.json.write_text(json.dumps({"regions": options.regions, "items": numbers}, indent=2) + "\n")


if __name__ == "__main__":
    main()

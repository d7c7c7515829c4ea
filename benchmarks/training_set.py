"""A training set's snapshot: seconds and memory, beside the plain way that holds everything in memory.

`python benchmarks/training_set.py [--pairs N] [--width D] [--json FILE]`. Every step runs in a process of its own:
regions of 100,000 pairs are drawn, with their chips' index, images' index and ground embeddings; the snapshot is
built, then built again with nothing changed; what was written is compared with what was drawn. The plain way joins,
sorts and writes all regions at once; it runs on --plain-pairs. Peak MB counts every resident page as the kernel does;
nothing is mapped, so anonymous MB, without pages of files, is nearly the same.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from _measure import Cost, run

PAIRS_PER_REGION = 100_000
#: Pairs of a photo: the lists that hold one photo in the authors' sampling of 300,000.
PAIRS_PER_PHOTO = 1.4
PHOTOS_PER_TILE = 3.5

# --- the input -------------------------------------------------------------------------------------------------------


def draw_regions(root: Path, pairs: int, width: int, seed: int) -> None:
    """Tables of as many regions as it takes."""
    for number in range(0, pairs, PAIRS_PER_REGION):
        draw_region(root, number, min(PAIRS_PER_REGION, pairs - number), width, seed)


def draw_region(root: Path, first: int, count: int, width: int, seed: int) -> None:
    """Pairs, chips, images and embeddings of one region, written as the pipeline writes them."""
    import numpy as np
    import pyarrow as pa

    from graft_pipeline.manifests import partition_file, write_table
    from graft_pipeline.regions import Region
    from graft_pipeline.schemas import CHIPS, GROUND_EMBEDDINGS, GROUND_IMAGES, PAIRS, Dataset

    rng = np.random.default_rng([seed, first])
    row, column = divmod(first // PAIRS_PER_REGION, 100)
    region = Region(20.0 + row, -170.0 + column).key
    photos, tiles = max(1, round(count / PAIRS_PER_PHOTO)), max(1, round(count / PHOTOS_PER_TILE))
    # Numbers of photos tell when they were uploaded, not where: those of regions interleave.
    numbers = np.unique(rng.integers(1, 1 << 20, 2 * photos)) * 10_000 + first // PAIRS_PER_REGION
    numbers = rng.permutation(numbers)[:photos]
    ids = pa.array(numbers).cast(pa.string()).to_numpy(zero_copy_only=False).astype(object)
    tile_ids = np.array([f"naip-{photo_id}" for photo_id in ids[:tiles]], dtype=object)
    # Each tile has its centre; the rest are spread, no pair twice.
    drawn = np.unique(rng.integers(0, tiles, 2 * count) * photos + rng.integers(0, photos, 2 * count))
    centers = np.arange(tiles) * (photos + 1)
    others = rng.permutation(np.setdiff1d(drawn, centers))[: count - tiles]
    tile, photo = np.divmod(np.concatenate([centers, others]), photos)
    hexadecimal = rng.bytes(64 * photos).hex()
    sha256 = [hexadecimal[64 * number : 64 * number + 64] for number in range(photos)]
    acquired = np.datetime64("2020-06-01", "ms")
    scenes = np.array([f"USDA/NAIP/DOQQ/m_{number:07d}_ne_19_060_20200601" for number in range(400)], object)
    scene = rng.integers(0, len(scenes), tiles)
    split = np.where(rng.random(tiles) < 0.1, "validation", "train").astype(object)
    split[rng.random(tiles) < 0.05] = "guard"

    def write(dataset: Dataset, columns: dict[str, object], rows: int, **place: str) -> None:
        full = {
            field.name: pa.array(columns[field.name], field.type)
            if field.name in columns
            else pa.nulls(rows, field.type)
            for field in dataset.schema
        }
        write_table(partition_file(root, dataset, region=region, **place), pa.table(full), dataset)

    write(
        PAIRS,
        {
            "tile_id": tile_ids[tile], "photo_id": ids[photo], "center_photo_id": ids[tile],
            "scene_id": scenes[scene[tile]], "lon_deg": rng.uniform(-72, -71, count),
            "lat_deg": rng.uniform(42, 43, count), "col_px": rng.uniform(112, 336, count),
            "row_px": rng.uniform(112, 336, count), "acquired_at_utc": np.full(count, acquired),
            "split": split[tile],
        },
        count,
        sensor="naip",
    )  # fmt: skip
    size = rng.integers(80_000, 120_000, tiles)
    offset = np.cumsum(size) - size
    write(
        CHIPS,
        {
            "tile_id": tile_ids, "status": ["ok"] * tiles, "attempts": np.ones(tiles), "scene_id": scenes[scene],
            "acquired_at_utc": np.full(tiles, acquired), "scenes_tried": np.ones(tiles),
            "epsg": np.full(tiles, 32619), "x0_m": np.zeros(tiles), "y0_m": np.zeros(tiles),
            "gsd_m": np.ones(tiles), "chip_px": np.full(tiles, 448),
            "shard": [f"chips-{number:05d}.tar" for number in offset // 1_000_000_000],
            "offset": offset % 1_000_000_000, "size_bytes": size, "sha256": sha256[:tiles],
        },
        tiles,
        sensor="naip",
    )  # fmt: skip
    images = {
        "photo_id": ids, "status": ["ok"] * photos, "attempts": np.ones(photos), "sha256": sha256
    }  # fmt: skip
    write(GROUND_IMAGES, images, photos)
    vectors = rng.random((photos, width), dtype=np.float32) - np.float32(0.5)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    lists = pa.ListArray.from_arrays(np.arange(0, vectors.size + 1, width, dtype=np.int32), vectors.ravel())
    write(GROUND_EMBEDDINGS, {"photo_id": ids, "embedding": lists, "model_id": ["m"] * photos}, photos)


# --- ours and the plain way -------------------------------------------------------------------------------------------


def build(root: Path) -> None:
    """The pipeline's snapshot."""
    from upath import UPath

    from graft_pipeline.imagery import NAIP
    from graft_pipeline.training_sets import build_training_set

    made = build_training_set(UPath(root), NAIP)
    print(
        json.dumps({"pairs": made.pairs, "photos": made.photos, "tiles": made.tiles, "is_new": made.is_new})
    )


def build_plainly(root: Path) -> None:
    """All regions in memory: one table, one join, one sort, one matrix."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    def read(name: str) -> pa.Table:
        files = sorted(map(str, (root / name).rglob("*.parquet")))
        return ds.dataset(files, partitioning="hive", partition_base_dir=str(root / name)).to_table()

    pairs, chips, embedded = read("pairs"), read("chips"), read("ground_embeddings")
    pairs = pairs.filter(pc.is_in(pairs["split"], pa.array(["train", "validation"])))
    chips = chips.select(["tile_id", "shard", "offset", "size_bytes"])
    table = pairs.join(chips, "tile_id").sort_by([("tile_id", "ascending"), ("photo_id", "ascending")])
    ids = pc.unique(table["photo_id"])
    rows = pc.index_in(ids, embedded["photo_id"].combine_chunks())
    table = table.append_column("embedding_row", pc.index_in(table["photo_id"], ids))
    vectors = np.concatenate([np.asarray(chunk.flatten()) for chunk in embedded["embedding"].chunks])
    folder = root / "plain"
    folder.mkdir()
    np.save(folder / "ground_embeddings.npy", vectors.reshape(embedded.num_rows, -1)[rows.to_numpy()])
    pq.write_table(table, folder / "training_set.parquet", compression="zstd")
    print(
        json.dumps(
            {
                "pairs": table.num_rows,
                "photos": len(ids),
                "tiles": pc.count_distinct(table["tile_id"]).as_py(),
                "is_new": True,
            }
        )
    )


# --- what was written, compared with what was drawn -------------------------------------------------------------------


def compare(root: Path) -> None:
    """Print how many pairs and vectors of the snapshot are not those of the regions: DuckDB and one region's rows."""
    import duckdb
    import numpy as np
    import pyarrow.parquet as pq

    connection = duckdb.connect()
    connection.execute("SET memory_limit = '2GB'")
    table = f"read_parquet('{next(root.glob('training_set/*/*/training_set.parquet'))}')"
    pairs = f"read_parquet('{root}/pairs/*/*/pairs.parquet')"
    wrong = 0
    for one, other in ((table, pairs), (pairs, table)):
        wrong += connection.sql(
            f"SELECT count(*) FROM (SELECT tile_id, photo_id, split, col_px FROM {one} WHERE split != 'guard' "
            f"EXCEPT SELECT tile_id, photo_id, split, col_px FROM {other})"
        ).fetchall()[0][0]
    matrix = np.load(next(root.glob("training_set/*/*/ground_embeddings.npy")), mmap_mode="r")
    of_regions = sorted(root.glob("ground_embeddings/*/*.parquet"))
    for file in (of_regions[0], of_regions[-1]):
        embedded = pq.ParquetFile(file).read(["photo_id", "embedding"])
        rows = connection.sql(
            f"SELECT DISTINCT embedding_row, embedding FROM {table} JOIN embedded USING (photo_id)"
        ).to_arrow_table()
        vectors = np.asarray(rows["embedding"].combine_chunks().flatten()).reshape(rows.num_rows, -1)
        wrong += int((matrix[rows["embedding_row"].to_numpy()] != vectors).any(axis=1).sum())
        wrong += embedded.num_rows == 0
    print(wrong)


# --- the table --------------------------------------------------------------------------------------------------------

STEPS = {
    "draw": lambda root, pairs, width, seed: draw_regions(Path(root), int(pairs), int(width), int(seed)),
    "ours": lambda root: build(Path(root)),
    "plain": lambda root: build_plainly(Path(root)),
    "compare": lambda root: compare(Path(root)),
}
COLUMNS = {
    "pairs": "pairs", "tiles": "tiles", "photos": "photos", "cpu_s": "CPU s", "wall_s": "wall s",
    "peak_mb": "peak MB", "anonymous_mb": "anonymous MB",
}  # fmt: skip


def measured(name: str, step: str, root: Path) -> dict[str, float | str]:
    """One row of the table."""
    cost: Cost = run(__file__, "--step", step, str(root))
    costs = {
        "cpu_s": cost.cpu_s,
        "wall_s": cost.wall_s,
        "peak_mb": cost.peak_mb,
        "anonymous_mb": cost.anonymous_mb,
    }
    return {"what": name, **json.loads(cost.output), **costs}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=1_000_000, help="pairs to draw, guard pairs included")
    parser.add_argument("--width", type=int, default=512, help="width of an embedding")
    parser.add_argument("--plain-pairs", type=int, default=200_000, help="0: leave the plain way out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="folder for about 3 kB a pair (512 wide)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        STEPS[options.step[0]](*options.step[1:])
        return
    rows = []
    drawing = (str(options.width), str(options.seed))
    with tempfile.TemporaryDirectory(prefix="graft-training-set-", dir=options.scratch) as folder:
        root = Path(folder)
        run(__file__, "--step", "draw", str(root), str(options.pairs), *drawing)
        rows.append(measured("ours", "ours", root))
        rows.append(measured("ours, again", "ours", root))
        wrong = int(run(__file__, "--step", "compare", str(root)).output)
    few = min(options.plain_pairs, options.pairs)
    if few:
        with tempfile.TemporaryDirectory(prefix="graft-training-set-", dir=options.scratch) as folder:
            root = Path(folder)
            run(__file__, "--step", "draw", str(root), str(few), *drawing)
            rows.append(measured("ours", "ours", root))
            rows.append(measured("plain", "plain", root))
    print(f"embeddings {options.width} wide; pairs without guard pairs")
    print(f"{'what':<13}" + "".join(f"{title:>14}" for title in COLUMNS.values()))
    for row in rows:
        cells = (
            f"{row[key]:>14,.1f}" if isinstance(row[key], float) else f"{row[key]:>14,}" for key in COLUMNS
        )
        print(f"{row['what']:<13}" + "".join(cells))
    print(f"{wrong} pairs or vectors of the first row differ from the regions'")
    if few:
        seconds, memory = (rows[-1][key] / rows[-2][key] for key in ("wall_s", "peak_mb"))
        print(
            f"on {few:,} pairs the plain way takes {seconds:.1f} times the time, {memory:.1f} times the memory"
        )
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores: compare rows of one run only")
    if options.json:
        result = {"width": options.width, "rows": rows, "wrong": wrong}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

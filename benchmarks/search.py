"""Search among millions of chip embeddings on this machine: latency, recall, cost of the index; exact search beside it.

`python benchmarks/search.py [--vectors N] [--dim 512] [--json FILE] [--scratch FOLDER]`. Regions are drawn and written
as the pipeline writes their chips and chip embeddings; the index is made of them; the true nearest are found by a
plain product over those files, apart from the index; queries are then asked one by one, warm. Every step is a process
of its own. Ten million vectors need 35 GB of disk and up to an hour on two cores.

Vectors imitate CLIP's: images in a cone of their own, in clusters of clusters, with variances that fall as 1/n; queries
are other images, and words: apart from all images, near a cluster in few directions. They are rounded to bfloat16, so
that files of them compress.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from _measure import Cost, run

SENSOR, MODEL = "naip", "benchmark"
TOP = 100
REGION_ROWS = 11_000
#: Regions lie in rows of so many, from here (degrees).
COLUMNS, WEST, SOUTH = 30, -120, 20
YEARS = 10
KINDS = ("image", "text")
#: What is asked for: everywhere; in a quarter of the columns; scenes of one year; one region.
FILTERS = ("none", "area", "year", "region")
#: Queries that exact search is timed on: each reads all vectors.
EXACT_QUERIES = 3

# --- vectors ---------------------------------------------------------------------------------------------------------


class World:
    """Draws image and text vectors."""

    def __init__(self, width: int, seed: int, classes: int = 150, kinds: int = 20) -> None:
        import numpy as np

        self._seed, self._width = seed, width
        rng = np.random.default_rng(seed)
        spectrum = np.arange(1, width + 1) ** -1.0
        self._deviation = np.sqrt(spectrum / spectrum.sum()).astype(np.float32)
        self._rotation = np.linalg.qr(rng.standard_normal((width, width)))[0].astype(np.float32)
        self._cones = self._unit(rng.standard_normal((2, width)))
        self._class = self._shaped(rng, classes)
        self._kind = self._shaped(rng, classes * kinds)
        weight = 1 / np.arange(1, classes * kinds + 1)
        self._weight = rng.permutation(weight / weight.sum())
        self._class_of = np.arange(classes * kinds) // kinds

    def images(self, count: int, stream: int) -> Any:
        """(count, D) float32, L2-normalised."""
        import numpy as np

        rng = np.random.default_rng([self._seed, 1, stream])
        kind = rng.choice(len(self._kind), count, p=self._weight)
        own = np.sqrt(0.5) * self._shaped(rng, count)
        own += np.sqrt(0.3) * self._class[self._class_of[kind]] + np.sqrt(0.2) * self._kind[kind]
        return self._unit(np.sqrt(0.6) * own + np.sqrt(0.4) * self._cones[0])

    def texts(self, count: int) -> Any:
        """(count, D) float32, L2-normalised."""
        import numpy as np

        rng = np.random.default_rng([self._seed, 2])
        kind = rng.choice(len(self._kind), count, p=self._weight)
        is_fine = rng.random((count, 1)) < 0.6
        about = self._unit(self._class[self._class_of[kind]] + is_fine * self._kind[kind])
        own = self._unit(rng.standard_normal((count, self._width)))
        return self._unit(np.sqrt(0.6) * self._cones[1] + np.sqrt(0.15) * about + np.sqrt(0.25) * own)

    def queries(self, kind: str, count: int) -> Any:
        """(count, D) float32, L2-normalised, none of them indexed."""
        return self.texts(count) if kind == "text" else self.images(count, 2**31)

    def _shaped(self, rng: Any, count: int) -> Any:
        import numpy as np

        return (
            rng.standard_normal((count, self._width), dtype=np.float32) * self._deviation
        ) @ self._rotation

    def _unit(self, vectors: Any) -> Any:
        import numpy as np

        vectors = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
        return (vectors.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


# --- regions ---------------------------------------------------------------------------------------------------------


def region_sizes(count: int) -> list[int]:
    """Tiles of each region."""
    regions = max(4, -(-count // REGION_ROWS))
    return [count // regions + (number < count % regions) for number in range(regions)]


def corner(number: int) -> tuple[int, int]:
    """South-west corner of a region, degrees."""
    return WEST + number % COLUMNS, SOUTH + number // COLUMNS


def write_region(root: Path, world: World, number: int, rows: int, stream: int) -> None:
    """Chips and chip embeddings of one region, as the pipeline writes them."""
    import numpy as np
    import pyarrow as pa

    from graft_pipeline.embeddings import to_column
    from graft_pipeline.manifests import partition_file, write_table
    from graft_pipeline.regions import Region
    from graft_pipeline.schemas import CHIP_EMBEDDINGS, CHIPS

    west, south = corner(number)
    place = {"sensor": SENSOR, "region": Region(float(south), float(west)).key}
    rng = np.random.default_rng([stream, 3])
    tile_ids = [f"{SENSOR}-{number * 1_000_000 + row}" for row in range(rows)]
    embedded = {
        "tile_id": pa.array(tile_ids),
        "center_lon_deg": pa.array(west + rng.random(rows)),
        "center_lat_deg": pa.array(south + rng.random(rows)),
        "embedding": to_column(world.images(rows, stream)),
        "model_id": pa.repeat(pa.scalar(MODEL), rows),
        "chip_sha256": pa.array(tile_ids),
    }
    write_table(partition_file(root, CHIP_EMBEDDINGS, **place), pa.table(embedded), CHIP_EMBEDDINGS)
    years = np.datetime64("2010-07-01", "ms") + (rng.integers(0, YEARS, rows) * 365).astype("timedelta64[D]")
    known = {
        "tile_id": pa.array(tile_ids),
        "status": pa.repeat(pa.scalar("ok"), rows),
        "scene_id": pa.array([f"USDA/NAIP/DOQQ/m_{number:05d}{row % 64:02d}" for row in range(rows)]),
        "acquired_at_utc": pa.array(years),
        **{name: pa.repeat(pa.scalar(1), rows) for name in ("attempts", "scenes_tried", "epsg", "chip_px")},
        **{name: pa.repeat(pa.scalar(1.0), rows) for name in ("x0_m", "y0_m", "gsd_m")},
    }
    columns = {
        field.name: known.get(field.name, pa.nulls(rows)).cast(
            pa.timestamp("ms", tz="UTC") if field.name == "acquired_at_utc" else field.type
        )
        for field in CHIPS.schema
    }
    write_table(partition_file(root, CHIPS, **place), pa.table(columns), CHIPS)


def draw(root: Path, count: int, width: int, seed: int) -> None:
    """All regions."""
    world = World(width, seed)
    for number, rows in enumerate(region_sizes(count)):
        write_region(root, world, number, rows, number)


def filters(name: str) -> Any:
    """A search's filters."""
    from datetime import date

    import shapely

    from graft_pipeline.search import Filters

    if name == "area":
        # Through the middle of tiles' clouds, not along borders of regions.
        return Filters(area=shapely.box(WEST + 0.5, SOUTH - 1, WEST + 0.5 + COLUMNS / 4, 90))
    if name == "region":
        return Filters(area=shapely.box(WEST, SOUTH, WEST + 1, SOUTH + 1))
    return Filters(since=date(2014, 1, 1), until=date(2015, 1, 1)) if name == "year" else Filters()


# --- steps -----------------------------------------------------------------------------------------------------------


def index(root: Path) -> None:
    """Bring the index up to date; prints what it took."""
    from graft_pipeline import search_index

    made = search_index.update(root, SENSOR)
    size = search_index.size_bytes(root, SENSOR, made.manifest)
    shortlist = made.manifest.shortlist
    folder = search_index.index_folder(root, SENSOR)
    lists = 0 if shortlist is None else (folder / shortlist.file).stat().st_size
    print(
        json.dumps(
            {"regions_made": len(made.made), "seconds": made.seconds, "bytes": size, "shortlist_bytes": lists}
        )
    )


def truth(root: Path, width: int, seed: int, queries: int) -> None:
    """The true nearest of every query under every filter, from the chip embeddings themselves."""
    import numpy as np
    import pyarrow.parquet as pq
    import shapely

    world = World(width, seed)
    asked = np.concatenate([world.queries(kind, queries) for kind in KINDS])
    best = {
        name: (np.full((len(asked), TOP), -2, np.float32), np.full((len(asked), TOP), -1)) for name in FILTERS
    }
    for file in sorted(root.glob(f"chip_embeddings/sensor={SENSOR}/*/chip_embeddings.parquet")):
        table = pq.ParquetFile(file).read()
        beside = root / "chips" / file.relative_to(root / "chip_embeddings").with_name("chips.parquet")
        acquired = pq.ParquetFile(beside).read(["acquired_at_utc"])["acquired_at_utc"].to_numpy()
        vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, width)
        ids = np.array([int(tile_id.removeprefix(f"{SENSOR}-")) for tile_id in table["tile_id"].to_pylist()])
        scores = asked @ vectors.T
        for name, (nearest, numbers) in best.items():
            wanted = filters(name)
            fits = np.ones(len(ids), bool)
            if wanted.area is not None:
                places = (table[f"center_{axis}_deg"].to_numpy() for axis in ("lon", "lat"))
                fits &= shapely.contains_xy(wanted.area, *places)
            if wanted.since is not None:
                fits &= (acquired >= np.datetime64(wanted.since)) & (acquired < np.datetime64(wanted.until))
            some, of_some = scores[:, fits], ids[fits]
            order = (
                np.argpartition(-some, min(TOP, len(of_some)) - 1, axis=1)[:, :TOP] if len(of_some) else []
            )
            if not len(order):
                continue
            both = np.concatenate([nearest, np.take_along_axis(some, order, 1)], 1)
            of_both = np.concatenate([numbers, of_some[order]], 1)
            order = np.argpartition(-both, TOP - 1, axis=1)[:, :TOP]
            nearest[:], numbers[:] = np.take_along_axis(both, order, 1), np.take_along_axis(of_both, order, 1)
    np.savez(root / "truth.npz", asked=asked, **{name: numbers for name, (_, numbers) in best.items()})


def ask(root: Path, queries: int) -> None:
    """Every query under every filter, one by one, warm; prints latencies and recall."""
    import numpy as np

    from graft_pipeline.search import SearchIndex

    stored = dict(np.load(root / "truth.npz"))
    opened = time.perf_counter()
    searched = SearchIndex.open(root, SENSOR)
    opened = time.perf_counter() - opened
    rows = []
    for name in FILTERS:
        wanted = filters(name)
        for kind, first in zip(KINDS, (0, queries), strict=True):
            some = range(first, first + queries)
            for number in some:
                searched.search(stored["asked"][number], TOP, wanted)
            seconds, recall, cpu = [], [], time.process_time()
            for number in some:
                start = time.perf_counter()
                found = searched.search(stored["asked"][number], TOP, wanted)
                seconds.append(time.perf_counter() - start)
                true = {f"{SENSOR}-{tile}" for tile in stored[name][number] if tile >= 0}
                recall.append(len(true & set(found["tile_id"].to_pylist())) / len(true))
            rows.append(
                {
                    "filter": name,
                    "queries": kind,
                    "median_ms": 1e3 * float(np.median(seconds)),
                    "p95_ms": 1e3 * float(np.quantile(seconds, 0.95)),
                    "cpu_ms": 1e3 * (time.process_time() - cpu) / queries,
                    "recall": float(np.mean(recall)),
                    "least_recall": min(recall),
                }
            )
    print(json.dumps({"open_s": opened, "rows": rows}))


def ask_exactly(root: Path, queries: int) -> None:
    """The first queries by exact search, the second time; prints latencies."""
    import numpy as np

    from graft_pipeline.search import SearchIndex

    asked = np.load(root / "truth.npz")["asked"]
    searched = SearchIndex.open(root, SENSOR)
    seconds: list[float] = []
    cpu = 0.0
    for number in [0, *range(min(queries, EXACT_QUERIES))]:
        start, cpu_start = time.perf_counter(), time.process_time()
        searched.search(asked[number], TOP, is_exact=True)
        seconds.append(time.perf_counter() - start)
        cpu += (time.process_time() - cpu_start) if len(seconds) > 1 else 0.0
    print(
        json.dumps(
            {"median_ms": 1e3 * float(np.median(seconds[1:])), "cpu_ms": 1e3 * cpu / (len(seconds) - 1)}
        )
    )


def change(root: Path, width: int, seed: int, rows: int) -> None:
    """Embed one region anew."""
    write_region(root, World(width, seed), 1, rows, 2**30)


STEPS = {
    "draw": lambda root, *numbers: draw(Path(root), *map(int, numbers)),
    "index": lambda root: index(Path(root)),
    "truth": lambda root, *numbers: truth(Path(root), *map(int, numbers)),
    "ask": lambda root, queries: ask(Path(root), int(queries)),
    "exact": lambda root, queries: ask_exactly(Path(root), int(queries)),
    "change": lambda root, *numbers: change(Path(root), *map(int, numbers)),
}

# --- the table -------------------------------------------------------------------------------------------------------


def measured(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All steps in their order."""

    def step(name: str, *arguments: object) -> tuple[dict[str, Any], Cost]:
        cost = run(__file__, "--step", name, str(root), *map(str, arguments))
        return json.loads(cost.output or "{}"), cost

    def costs(found: dict[str, Any], cost: Cost) -> dict[str, Any]:
        memory = {"peak_mb": cost.peak_mb, "anonymous_mb": cost.anonymous_mb}
        return {**found, "wall_s": cost.wall_s, "cpu_s": cost.cpu_s, **memory}

    step("draw", options.vectors, options.dim, options.seed)
    built = costs(*step("index"))
    step("truth", options.dim, options.seed, options.queries)
    asked = costs(*step("ask", options.queries))
    exact = costs(*step("exact", options.queries))
    step("change", options.dim, options.seed, region_sizes(options.vectors)[1])
    updated = costs(*step("index"))
    return {"build": built, "search": asked, "exact": exact, "one_region": updated}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=int, default=1_000_000, help="tiles (1,000,000)")
    parser.add_argument("--dim", type=int, default=512, help="dimensions of a vector (512)")
    parser.add_argument("--queries", type=int, default=50, help="of each kind (50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="folder for what is written on the way")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        STEPS[options.step[0]](*options.step[1:])
        return
    with tempfile.TemporaryDirectory(prefix="graft-search-", dir=options.scratch) as folder:
        found = measured(Path(folder), options)
    regions = len(region_sizes(options.vectors))
    print(
        f"{options.vectors:,} x {options.dim} in {regions:,} regions, top {TOP}, {options.queries} queries a kind"
    )
    for name, title in (("build", "index, all regions"), ("one_region", "index, one region changed")):
        row = found[name]
        print(
            f"{title:<26} {row['seconds']:>9,.1f} s {row['cpu_s']:>9,.1f} CPU s {row['anonymous_mb']:>8,.0f} MB held "
            f"({row['peak_mb']:,.0f} with pages of files), {row['bytes'] / 1e9:.2f} GB on disk, of it "
            f"{row['shortlist_bytes'] / 1e9:.2f} GB shortlist"
        )
    print(f"{'search, warm':<26} {'median ms':>10} {'p95 ms':>8} {'CPU ms':>8} {'recall':>8} {'least':>7}")
    for row in found["search"]["rows"]:
        what = f"{row['queries']} queries, filter: {row['filter']}"
        print(
            f"{what:<26} {row['median_ms']:>10.1f} {row['p95_ms']:>8.1f} {row['cpu_ms']:>8.1f} "
            f"{row['recall']:>8.3f} {row['least_recall']:>7.2f}"
        )
    exact = found["exact"]
    print(f"{'exact, no filter':<26} {exact['median_ms']:>10.1f} {'':>8} {exact['cpu_ms']:>8.1f} {1:>8.3f}")
    print(
        f"opens in {found['search']['open_s']:.1f} s; searching holds {found['search']['anonymous_mb']:,.0f} MB, "
        f"{found['search']['peak_mb']:,.0f} with pages of files"
    )
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores: compare rows of one run only")
    if options.json:
        content = {"vectors": options.vectors, "dim": options.dim, "queries": options.queries, **found}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

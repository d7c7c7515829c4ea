"""Sampling and assignment, whole process, Parquet in, Parquet out, beside a plain form of the authors' rule.

`python benchmarks/sampling.py [--photos N] [--input FILE.parquet] [--json FILE] [--sensor naip]`. Every step runs
in a process of its own: photos are drawn; ours reads them, samples each region's tiles, assigns photos to them
with the cap of 25 and writes both; the authors' rule does the same in degrees; violations are then counted by a
k-d tree on the files written. The authors' rule is slow: it runs on --authors-photos of the same kind.

An input file has the columns photo_id, lon_deg and lat_deg; without uploaded_at_utc its rows are taken to be in
the order of upload, and without taken_at_local the authors' rule has one quarter.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from _measure import Cost, run

if TYPE_CHECKING:
    import pyarrow as pa

CAP = 25
#: West, south, east, north. The small box is the one of the authors' measured scripts (Massachusetts).
SMALL_BOX, LARGE_BOX = (-73.5, 41.2, -69.9, 42.9), (-80.0, 36.0, -70.0, 46.0)
PHOTOS_OF_SMALL_BOX = 2_000_000
CITIES_PER_MILLION = 24
METRES_PER_DEGREE = 111_320.0

# --- the input -------------------------------------------------------------------------------------------------------


def draw_photos(path: Path, count: int, seed: int) -> None:
    """Photos of a fifth uniform background and Zipf hot-spots, most of them in cities; sorted by longitude."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    west, south, east, north = SMALL_BOX if count <= PHOTOS_OF_SMALL_BOX else LARGE_BOX
    low, high = np.array([west, south]), np.array([east, north])
    spots = max(1, count // 60)
    cities = max(CITIES_PER_MILLION, CITIES_PER_MILLION * count // 1_000_000)
    city_places = rng.uniform(low, high, (cities, 2))
    spot_places = rng.uniform(low, high, (spots, 2))
    in_city = rng.random(spots) < 0.6
    near_city = city_places[rng.integers(0, cities, spots)] + rng.normal(scale=0.06, size=(spots, 2))
    spot_places[in_city] = near_city[in_city]
    spread_m = 180.0 * np.exp(rng.normal(scale=0.8, size=spots))
    weight = 1.0 / np.arange(1, spots + 1)
    places = rng.uniform(low, high, (count, 2))
    hot = np.flatnonzero(rng.random(count) < 0.8)
    spot = rng.choice(spots, hot.size, p=weight / weight.sum())
    offset_m = rng.normal(size=(hot.size, 2)) * spread_m[spot, None]
    squeeze = np.cos(np.radians(spot_places[spot, 1]))
    places[hot] = spot_places[spot] + offset_m / METRES_PER_DEGREE / np.stack([squeeze, np.ones(hot.size)], 1)
    start, end = np.datetime64("2013-01-01", "ms"), np.datetime64("2024-01-01", "ms")
    taken = start + (rng.random(count) * (end - start).astype(np.int64)).astype("timedelta64[ms]")
    # A burst: the same place and time again.
    copies = hot[rng.random(hot.size) < 0.15]
    originals = rng.choice(hot, copies.size)
    places[copies], taken[copies] = places[originals], taken[originals]
    places = np.clip(places, low, np.nextafter(high, low))
    uploaded = taken + (rng.exponential(30 * 86_400_000.0, count)).astype("timedelta64[ms]")
    # Flickr numbers photos in the order of their upload.
    number = np.empty(count, dtype=np.int64)
    number[np.argsort(uploaded, kind="stable")] = np.arange(count) * 37 + 8_000_000_000
    by_longitude = np.argsort(places[:, 0], kind="stable")
    columns = {
        "photo_id": pa.array(number).cast(pa.string()),
        "lon_deg": pa.array(places[:, 0]),
        "lat_deg": pa.array(places[:, 1]),
        "uploaded_at_utc": pa.array(uploaded),
        "taken_at_local": pa.array(taken),
    }
    pq.write_table(pa.table(columns).take(pa.array(by_longitude)), path, row_group_size=131_072)


def read_photos(path: Path) -> "pa.Table":
    """The columns that sampling needs, as FLICKR_PHOTOS has them."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from graft_pipeline.schemas import FLICKR_PHOTOS

    needed = ("photo_id", "lon_deg", "lat_deg", "uploaded_at_utc", "taken_at_local")
    file = pq.ParquetFile(path)
    table = file.read([name for name in needed if name in file.schema_arrow.names])
    if "uploaded_at_utc" not in table.column_names:
        table = table.append_column("uploaded_at_utc", pa.array(np.arange(table.num_rows)))
    if "taken_at_local" not in table.column_names:
        table = table.append_column("taken_at_local", pa.nulls(table.num_rows))
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise SystemExit(f"{path} lacks the columns {missing}: name them so.")
    return table.select(needed).cast(pa.schema([FLICKR_PHOTOS.schema.field(name) for name in needed]))


def first_photos(source: Path, path: Path, count: int) -> None:
    """The first rows of a file as a file."""
    import pyarrow.parquet as pq

    pq.write_table(read_photos(source).slice(0, count), path)


# --- ours ------------------------------------------------------------------------------------------------------------


def sample(source: Path, root: Path, sensor_name: str) -> None:
    """Tiles and assignments of all regions of a file, written where the pipeline writes its tiles and pairs."""
    import numpy as np
    import pyarrow as pa

    from graft_pipeline.imagery import NAIP, SENTINEL2
    from graft_pipeline.manifests import parquet_bytes, partition_file, write_bytes_atomic, write_table
    from graft_pipeline.pairing import assign
    from graft_pipeline.regions import Region
    from graft_pipeline.sampling import sample_tiles
    from graft_pipeline.schemas import TILES

    sensor = {sensor.name: sensor for sensor in (NAIP, SENTINEL2)}[sensor_name]
    photos = read_photos(source)
    south, west = (np.floor(photos[name].to_numpy()).astype(np.int32) for name in ("lat_deg", "lon_deg"))
    cell = south * 1000 + west
    order = np.argsort(cell, kind="stable")
    starts = np.flatnonzero(np.diff(cell[order], prepend=np.iinfo(np.int32).min))
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        first = order[start]
        region = Region(float(south[first]), float(west[first]))
        own = photos.take(pa.array(order[start:end]))
        tiles = sample_tiles(own, region, sensor, None)
        assigned = assign(tiles, own, sensor, region.epsg, CAP)
        file = partition_file(root, TILES, sensor=sensor.name, region=region.key)
        write_table(file, tiles, TILES)
        write_bytes_atomic(file.with_name("assigned.parquet"), parquet_bytes(assigned))


# --- the authors' rule -----------------------------------------------------------------------------------------------


def sample_in_degrees(source: Path, root: Path, sensor_name: str) -> None:
    """The rule of the authors' scripts, plainly: degrees, apart for each quarter and cell of ten degrees.

    From west to east, a photo in no list so far becomes a centre; its list is every photo of the same quarter and
    cell within 0.001 (NAIP) or 0.01 degrees in longitude and latitude, one radius search per centre. The first 25
    of a list are kept.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from sklearn.neighbors import KDTree

    half_deg = {"naip": 0.001, "sentinel2": 0.01}[sensor_name]
    photos = read_photos(source)
    lon, lat = photos["lon_deg"].to_numpy(), photos["lat_deg"].to_numpy()
    quarter = photos["taken_at_local"].to_numpy().astype("datetime64[M]").astype(np.int64) // 3
    bins = np.stack([quarter, np.floor(lon / 10).astype(np.int64), np.floor(lat / 10).astype(np.int64)], 1)
    _, number = np.unique(bins, axis=0, return_inverse=True)
    tiles: list[int] = []
    members: list[int] = []
    lengths: list[int] = []
    for value in range(number.max() + 1):
        rows = np.flatnonzero(number == value)
        places = np.stack([lon[rows], lat[rows]], 1)
        tree = KDTree(places, metric="chebyshev")
        is_taken = np.zeros(rows.size, dtype=bool)
        for row in np.argsort(places[:, 0], kind="stable"):
            if is_taken[row]:
                continue
            (near,) = tree.query_radius(places[row : row + 1], half_deg)
            is_taken[near] = True
            tiles.append(int(rows[row]))
            kept = near[:CAP]
            members.extend(rows[kept].tolist())
            lengths.append(len(kept))
    centers = pa.array(np.array(tiles, dtype=np.int64))
    folder = root / "tiles" / f"sensor={sensor_name}" / "region=all"
    folder.mkdir(parents=True)
    columns = {
        "center_photo_id": photos["photo_id"].take(centers),
        "center_lon_deg": photos["lon_deg"].take(centers),
        "center_lat_deg": photos["lat_deg"].take(centers),
    }
    pq.write_table(pa.table(columns), folder / "tiles.parquet")
    assigned = {
        "center_photo_id": pa.array(np.repeat(columns["center_photo_id"].to_numpy(), lengths)),
        "photo_id": photos["photo_id"].take(pa.array(np.array(members, dtype=np.int64))),
    }
    pq.write_table(pa.table(assigned), folder / "assigned.parquet")


# --- what was written, counted independently -------------------------------------------------------------------------


def count(source: Path, root: Path, sensor_name: str) -> None:
    """Print tiles, assignments and spacing violations of the files below a folder.

    Centres are projected anew and compared by a k-d tree, all regions of a UTM zone together; then those near a
    meridian between two zones in either zone's grid.
    """
    import numpy as np
    import pyarrow.parquet as pq
    from pyproj import Transformer
    from scipy.spatial import cKDTree

    from graft_pipeline.imagery import NAIP, SENTINEL2

    spacing_m = {sensor.name: sensor.spacing_m for sensor in (NAIP, SENTINEL2)}[sensor_name]
    files = sorted(root.rglob("tiles.parquet"))
    read = [pq.ParquetFile(file).read(["center_lon_deg", "center_lat_deg"]) for file in files]
    lon, lat = (np.concatenate([table[name].to_numpy() for table in read]) for name in read[0].column_names)
    zone = np.floor((lon + 180) / 6).astype(int)
    south = lat < 0

    def places(rows: np.ndarray, zone_number: int, is_south: bool) -> np.ndarray:
        epsg = (32701 if is_south else 32601) + zone_number
        to_utm = Transformer.from_crs("EPSG:4326", f"EPSG:{epsg}", always_xy=True)
        return np.stack(to_utm.transform(lon[rows], lat[rows]), 1)

    def pairs_within(one: np.ndarray, other: np.ndarray | None = None) -> int:
        # A micrometre less: exactly the spacing is allowed, and coordinates are rounded.
        radius = spacing_m - 1e-6
        if other is None:
            tree = cKDTree(one)
            return (int(tree.count_neighbors(tree, radius, p=np.inf)) - len(one)) // 2
        return int(cKDTree(one).count_neighbors(cKDTree(other), radius, p=np.inf))

    violations = across = 0
    for is_south in (False, True):
        for number in np.unique(zone[south == is_south]):
            own = np.flatnonzero((zone == number) & (south == is_south))
            violations += pairs_within(places(own, number, is_south))
            border = (number + 1) * 6 - 180
            reach = 3 * spacing_m / METRES_PER_DEGREE / np.cos(np.radians(lat[own])).min()
            west = own[lon[own] > border - reach]
            east = np.flatnonzero((zone == number + 1) & (south == is_south) & (lon < border + reach))
            if west.size and east.size:
                across += max(
                    pairs_within(places(west, grid, is_south), places(east, grid, is_south))
                    for grid in (number, number + 1)
                )
    assigned = sum(pq.ParquetFile(file).metadata.num_rows for file in root.rglob("assigned.parquet"))
    found = {
        "photos": pq.ParquetFile(source).metadata.num_rows,
        "regions": len(files),
        "tiles": len(lon),
        "assignments": assigned,
        "violations": violations,
        "violations_across_zones": across,
    }
    print(json.dumps(found))


# --- the table -------------------------------------------------------------------------------------------------------

STEPS = {
    "draw": lambda path, count, seed: draw_photos(Path(path), int(count), int(seed)),
    "first": lambda source, path, count: first_photos(Path(source), Path(path), int(count)),
    "ours": lambda source, root, sensor: sample(Path(source), Path(root), sensor),
    "authors": lambda source, root, sensor: sample_in_degrees(Path(source), Path(root), sensor),
    "count": lambda source, root, sensor: count(Path(source), Path(root), sensor),
}
COLUMNS = {
    "photos": "photos", "cpu_s": "CPU s", "wall_s": "wall s", "peak_mb": "peak MB", "regions": "regions",
    "tiles": "tiles", "assignments": "assigned", "violations": "violations",
    "violations_across_zones": "across zones",
}  # fmt: skip


def measured(name: str, source: Path, sensor: str, scratch: Path) -> dict[str, float | str]:
    """One row of the table: a rule on a file, its cost, and what it wrote."""
    with tempfile.TemporaryDirectory(dir=scratch) as root:
        cost: Cost = run(__file__, "--step", name, str(source), root, sensor)
        found = json.loads(run(__file__, "--step", "count", str(source), root, sensor).output)
    return {"rule": name, **found, "cpu_s": cost.cpu_s, "wall_s": cost.wall_s, "peak_mb": cost.peak_mb}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=1_000_000, help="photos to draw (1,000,000)")
    parser.add_argument("--input", type=Path, help="a Parquet file of photos instead")
    parser.add_argument("--authors-photos", type=int, default=100_000, help="0: leave the authors' rule out")
    parser.add_argument("--sensor", choices=("naip", "sentinel2"), default="naip")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--scratch", type=Path, help="folder for what is written on the way")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        STEPS[options.step[0]](*options.step[1:])
        return
    with tempfile.TemporaryDirectory(prefix="graft-sampling-", dir=options.scratch) as folder:
        scratch = Path(folder)
        source = options.input or scratch / "photos.parquet"
        if not options.input:
            run(__file__, "--step", "draw", str(source), str(options.photos), str(options.seed))
        rows = [measured("ours", source, options.sensor, scratch)]
        few = min(options.authors_photos, int(rows[0]["photos"]))
        if few and few < rows[0]["photos"]:
            smaller = scratch / "fewer.parquet"
            if options.input:
                run(__file__, "--step", "first", str(source), str(smaller), str(few))
            else:
                run(__file__, "--step", "draw", str(smaller), str(few), str(options.seed))
            source = smaller
            rows.append(measured("ours", source, options.sensor, scratch))
        if few:
            rows.append(measured("authors", source, options.sensor, scratch))
    print(f"{options.sensor}; ours is exact in metres, all quarters together; authors: degrees, per quarter")
    print(f"{'rule':<9}" + "".join(f"{title:>13}" for title in COLUMNS.values()))
    for row in rows:
        cells = (
            f"{row[key]:>13,.1f}" if isinstance(row[key], float) else f"{row[key]:>13,}" for key in COLUMNS
        )
        print(f"{row['rule']:<9}" + "".join(cells))
    if few:
        ratio = rows[-1]["cpu_s"] / rows[-2]["cpu_s"]
        print(f"on {few:,} photos the authors' rule takes {ratio:.1f} times the CPU")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores: compare rows of one run only")
    if options.json:
        options.json.write_text(json.dumps({"sensor": options.sensor, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

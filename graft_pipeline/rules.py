"""The rules of the data as checks: each reads stored tables and counts what violates it.

How rows come to obey the rules is in sampling, pairing, splits and scenes; these functions do not trust them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from graft_pipeline.geometry import Projection
from graft_pipeline.imagery import Sensor
from graft_pipeline.manifests import is_increasing
from graft_pipeline.schemas import STATUSES, Dataset

#: What each rule says; shown beside the check in Dagster.
DESCRIPTIONS = {
    "schema": "Columns, types, nulls, unique key and order are those of graft_pipeline.schemas.",
    "center_spacing": "Tile centres are at least half a footprint (112 px) apart in x or in y.",
    "footprint_membership": "Every photo lies in its tile's footprint, at the pixel that the chip's affine gives.",
    "photo_cap": "No tile has more photos than the cap (paper: 25).",
    "chip_georeference": "Stored chips are GeoTIFFs on the grid that their row announces, centred on the photo.",
    "cloud_and_time": "Every chip is dated, its scene holds all of it, and its clouds are below the limit of the rule "
    "in force, by scene or by chip. Chips of scenes that are listed no more stay.",
    "split_disjointness": "Train and validation share no tile, no photo and no ground.",
    "no_training_ground": "No training tile touches the ground of the benchmark.",
    "not_empty": "The region has rows. Warns: a region may be empty for good reasons, such as a lake.",
    "failure_share": "At most a tenth of the rows failed. Warns: failed rows are tried again.",
    "nodata_share": "At most a twentieth of the tiles has missing pixels in every scene. Warns.",
}
#: Rules that warn. All others block what is downstream.
WARNINGS = frozenset({"not_empty", "failure_share", "nodata_share"})
#: Shares of rows from which `failure_share` and `nodata_share` warn: more than planets and services lose on bad days.
MOST_FAILED, MOST_NODATA = 0.1, 0.05

#: A photo's stored pixel may differ by this much from the recomputed one.
PIXEL_TOLERANCE_PX = 0.01


@dataclass(frozen=True)
class Finding:
    """What checking one rule found.

    Attributes:
        rule: a key of DESCRIPTIONS.
        violations: number of rows, pairs or items against the rule.
        message: one sentence for people.
        evidence: numbers that show what was looked at, also on success.
    """

    rule: str
    violations: int
    message: str
    evidence: Mapping[str, float | int | str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing violates the rule."""
        return self.violations == 0


def status_counts(table: pa.Table) -> dict[str, int]:
    """Rows by status, and rows that are not ok by reason.

    Args:
        table: any table; without a `status` column the result is empty.

    Returns:
        `{"status/ok": n, "reason/burst": m, ...}`, sorted.
    """
    if "status" not in table.column_names:
        return {}
    statuses = Counter(table["status"].to_pylist())
    reasons = Counter(reason for reason in table["reason"].to_pylist() if reason)
    return {
        **{f"status/{name}": count for name, count in sorted(statuses.items())},
        **{f"reason/{name}": count for name, count in sorted(reasons.items())},
    }


def schema(dataset: Dataset, table: pa.Table) -> Finding:
    """Check a table against its dataset's schema: columns, types, nulls, statuses, unique key, order."""
    problems: list[str] = []
    if [(f.name, f.type) for f in table.schema] != [(f.name, f.type) for f in dataset.schema]:
        problems.append(f"columns are {table.schema.names} with types {[str(t) for t in table.schema.types]}")
    else:
        nulls = {f.name: table[f.name].null_count for f in dataset.schema if not f.nullable}
        problems += [f"{name} has {count} nulls" for name, count in nulls.items() if count]
        if "status" in table.column_names:
            unknown = set(table["status"].to_pylist()) - set(STATUSES)
            problems += [f"unknown status {name!r}" for name in sorted(unknown)]
            silent = (
                pc.sum(pc.and_(pc.not_equal(table["status"], "ok"), pc.is_null(table["reason"]))).as_py() or 0
            )
            problems += [f"{silent} rows are not ok and give no reason"] if silent else []
        by = list(dict.fromkeys([*dataset.order, *dataset.key]))
        is_sorted = is_increasing(table, by)
        if not (is_sorted and set(by) == set(dataset.key)):
            keys = table.select(list(dataset.key))
            if keys.group_by(list(dataset.key)).aggregate([]).num_rows != table.num_rows:
                problems.append(f"{'+'.join(dataset.key)} is not unique")
        if not is_sorted:
            # Rows with equal keys or nulls may still be in order.
            ordered = table.select(by)
            indices = pc.sort_indices(ordered, [(name, "ascending") for name in dataset.order])
            in_order = ordered.take(indices).select(list(dataset.order))
            if not in_order.equals(ordered.select(list(dataset.order))):
                problems.append(f"rows are not sorted by {'+'.join(dataset.order)}")
    evidence = {"rows": table.num_rows, "columns": table.num_columns}
    return Finding("schema", len(problems), "; ".join(problems) or "as in graft_pipeline.schemas", evidence)


def not_empty(table: pa.Table, advice: str) -> Finding:
    """Check that a region has rows.

    Args:
        table: of any dataset.
        advice: why it may have none, and what to do.

    Returns:
        The finding, with the advice where there are none.
    """
    empty = table.num_rows == 0
    return Finding(
        "not_empty", int(empty), advice if empty else f"{table.num_rows} rows", {"rows": table.num_rows}
    )


def failure_share(table: pa.Table) -> Finding:
    """Count failed rows if they are an unusual share; the commonest reason is named.

    Args:
        table: rows with `status` and `reason`.
    """
    reasons = Counter(table.filter(pc.equal(table["status"], "failed"))["reason"].to_pylist())
    failed = sum(reasons.values())
    share = failed / max(1, table.num_rows)
    worst = f", {reasons.most_common(1)[0][0]} most often" if reasons else ""
    return Finding(
        "failure_share",
        failed if share > MOST_FAILED else 0,
        f"{failed} of {table.num_rows} rows failed{worst}: see their reasons and `retry_on`",
        {"share": share, "most": MOST_FAILED},
    )


def nodata_share(chips: pa.Table) -> Finding:
    """Count tiles with missing pixels in every scene if they are an unusual share.

    Args:
        chips: CHIPS rows.
    """
    without = int(pc.sum(pc.equal(chips["reason"], "nodata")).as_py() or 0)
    share = without / max(1, chips.num_rows)
    return Finding(
        "nodata_share",
        without if share > MOST_NODATA else 0,
        f"{without} of {chips.num_rows} tiles have missing pixels in every scene, as at a collection's edge",
        {"share": share, "most": MOST_NODATA},
    )


def center_spacing(tiles: pa.Table, sensor: Sensor) -> Finding:
    """Count pairs of one region's centres that are closer than the spacing in x and in y (Chebyshev)."""
    from scipy.spatial import cKDTree

    xy = np.column_stack([tiles["center_x_m"].to_numpy(), tiles["center_y_m"].to_numpy()])
    smallest = float("inf")
    violations = 0
    if len(xy) > 1:
        tree = cKDTree(xy)
        nearest, _ = tree.query(xy, k=2, p=np.inf)
        smallest = float(nearest[:, 1].min())
        # Less a micrometre: coordinates are sums of floats.
        violations = len(tree.query_pairs(sensor.spacing_m - 1e-6, p=np.inf))
    return Finding(
        "center_spacing",
        violations,
        f"{violations} pairs of centres are closer than {sensor.spacing_m:g} m",
        {"tiles": len(xy), "spacing_m": sensor.spacing_m, "smallest_m": min(smallest, 1e9)},
    )


def footprint_membership(pairs: pa.Table, tiles: pa.Table, sensor: Sensor) -> Finding:
    """Recompute every pair's pixel from the geotag and the tile's affine; count those outside or off."""
    joined = pairs.select(["tile_id", "lon_deg", "lat_deg", "col_px", "row_px"]).join(
        tiles.select(["tile_id", "epsg", "x0_m", "y0_m", "gsd_m", "center_x_m", "center_y_m"]),
        "tile_id",
        join_type="left outer",
    )
    orphans = joined["epsg"].null_count
    error_px = np.zeros(0)
    outside = 0
    for epsg in pc.unique(joined["epsg"].drop_null()).to_pylist():
        rows = joined.filter(pc.equal(joined["epsg"], epsg))
        get = {name: rows[name].to_numpy() for name in rows.column_names if name != "tile_id"}
        x, y = Projection(epsg).forward(get["lon_deg"], get["lat_deg"])
        columns, lines = (x - get["x0_m"]) / get["gsd_m"], (get["y0_m"] - y) / get["gsd_m"]
        error = np.maximum(abs(columns - get["col_px"]), abs(lines - get["row_px"]))
        error_px = np.concatenate([error_px, error])
        half = sensor.footprint_m / 2
        outside += int(((abs(x - get["center_x_m"]) > half) | (abs(y - get["center_y_m"]) > half)).sum())
    worst = float(error_px.max(initial=0.0))
    violations = orphans + outside + int((error_px > PIXEL_TOLERANCE_PX).sum())
    return Finding(
        "footprint_membership",
        violations,
        f"{outside} photos outside their footprint, {orphans} without tile, worst pixel error {worst:.2g} px",
        {"pairs": pairs.num_rows, "worst_pixel_error_px": worst},
    )


def photo_cap(pairs: pa.Table, cap: int) -> Finding:
    """Count tiles with more photos than the cap."""
    counts = np.array(list(Counter(pairs["tile_id"].to_pylist()).values()) or [0])
    above = int((counts > cap).sum())
    return Finding(
        "photo_cap",
        above,
        f"{above} tiles have more than {cap} photos",
        {
            "tiles": int((counts > 0).sum()),
            "most_photos": int(counts.max()),
            "mean_photos": float(counts.mean()),
        },
    )


def chip_georeference(
    chips: pa.Table, tiles: pa.Table, read: Callable[[dict[str, object]], bytes], sample: int = 200
) -> Finding:
    """Open stored chips and compare their georeference with their rows and their tile's centre.

    Args:
        chips: rows of CHIPS; only those that are ok are looked at.
        tiles: rows of TILES.
        read: gives the stored bytes of one row.
        sample: at most this many, evenly spread over the rows.

    Returns:
        The finding; the evidence says how many were opened.
    """
    from rasterio.errors import RasterioError
    from rasterio.io import MemoryFile

    ok = chips.filter(pc.equal(chips["status"], "ok"))
    rows = ok.take(
        np.unique(np.linspace(0, max(0, ok.num_rows - 1), min(sample, ok.num_rows)).astype(int))
    ).to_pylist()
    centers = {
        tile["tile_id"]: tile for tile in tiles.select(["tile_id", "center_x_m", "center_y_m"]).to_pylist()
    }
    problems: list[str] = []
    for row in rows:
        try:
            with MemoryFile(read(row)) as memory, memory.open() as chip:
                expected = (row["gsd_m"], 0.0, row["x0_m"], 0.0, -row["gsd_m"], row["y0_m"])
                center = centers[row["tile_id"]]
                column, line = ~chip.transform @ (center["center_x_m"], center["center_y_m"])
                half = row["chip_px"] / 2
                if chip.crs.to_epsg() != row["epsg"] or tuple(chip.transform)[:6] != expected:
                    problems.append(f"{row['tile_id']}: georeference {chip.crs} {tuple(chip.transform)[:6]}")
                elif (chip.width, chip.height, chip.count) != (row["chip_px"], row["chip_px"], 3):
                    problems.append(f"{row['tile_id']}: {chip.width}x{chip.height}x{chip.count}")
                elif max(abs(column - half), abs(line - half)) > 0.5 + 1e-6:
                    problems.append(
                        f"{row['tile_id']}: centre photo {column - half:.2f}, {line - half:.2f} px off"
                    )
        except (RasterioError, OSError) as error:
            problems.append(f"{row['tile_id']}: cannot be opened ({error})")
    return Finding(
        "chip_georeference",
        len(problems),
        "; ".join(problems[:5]) or f"{len(rows)} chips opened, all on their grid",
        {"opened": len(rows), "ok_chips": ok.num_rows},
    )


def cloud_and_time(
    chips: pa.Table, tiles: pa.Table, photos: pa.Table, scenes: pa.Table, sensor: Sensor
) -> Finding:
    """Check each chip: dated, its clouds below the limit of the rule in force, and all of it held by its scene.

    By scene, clouds are the scene's percentage when the chip was fetched; by chip, the chip's own. Either has to be
    known where there is a limit. Sources withdraw scenes and list them under other ids: a chip whose scene is listed
    no more was paid for, and what the scene was is in its row. The evidence counts these, and how many chips have
    the choice that the rule would make today: scenes that were listed later may be nearer in time.
    """
    from graft_pipeline.scenes import chip_candidates, regardless_of_clouds

    ok = chips.filter(pc.equal(chips["status"], "ok"))
    limits = {"cloud_pct": sensor.scene_limit_pct}
    if sensor.has_mask:
        limits["chip_cloud_pct"] = sensor.max_cloud_pct
    used = ok.select(["tile_id", "scene_id", "acquired_at_utc", *limits]).to_pylist()
    cloudy = sum(
        any(limit is not None and (row[name] is None or row[name] >= limit) for name, limit in limits.items())
        for row in used
    )
    undated = ok["acquired_at_utc"].null_count
    clouds = dict(zip(scenes["scene_id"].to_pylist(), scenes["cloud_pct"].to_pylist(), strict=True))
    unlisted = sum(row["scene_id"] not in clouds for row in used)
    # What the listing says of clouds may have changed.
    clear = regardless_of_clouds(sensor)
    holding = chip_candidates(tiles, photos, scenes, clear, ok["tile_id"].to_pylist(), limit=scenes.num_rows)
    not_held = sum(
        row["scene_id"] in clouds and row["scene_id"] not in holding[row["tile_id"]] for row in used
    )
    limit = sensor.scene_limit_pct
    below = {name for name, cloud in clouds.items() if limit is None or (cloud is not None and cloud < limit)}
    first = sum(
        next((name for name in holding[row["tile_id"]] if name in below), None) == row["scene_id"]
        for row in used
    )
    days = np.abs(ok["time_difference_days"].drop_null().to_numpy())
    return Finding(
        "cloud_and_time",
        undated + cloudy + not_held,
        f"{undated} undated chips, {cloudy} above the cloud limit, {not_held} that their scene does not hold; "
        f"{unlisted} of scenes that are listed no more, judged by their rows",
        {
            "chips": ok.num_rows,
            "first_choice": first,
            "unlisted_scenes": unlisted,
            "median_days": float(np.median(days)) if len(days) else 0.0,
        },
    )


def chip_squares(tiles: pa.Table) -> np.ndarray:
    """The ground that chips of tiles show, as bounding boxes.

    Args:
        tiles: TILES rows of any UTM zones.

    Returns:
        (N, 4) float64 west, south, east, north, EPSG:4326 degrees.
    """
    columns = {name: tiles[name].to_numpy() for name in ("epsg", "x0_m", "y0_m", "gsd_m", "chip_px")}
    side = columns["chip_px"] * columns["gsd_m"]
    squares = np.zeros((tiles.num_rows, 4))
    for epsg in np.unique(columns["epsg"]):
        rows = np.flatnonzero(columns["epsg"] == epsg)
        x = columns["x0_m"][rows, None] + side[rows, None] * np.array([0, 1, 1, 0])
        y = columns["y0_m"][rows, None] - side[rows, None] * np.array([0, 0, 1, 1])
        lon, lat = Projection(int(epsg)).inverse(x, y)
        squares[rows] = np.column_stack([lon.min(1), lat.min(1), lon.max(1), lat.max(1)])
    return squares


def _overlaps(first: np.ndarray, second: np.ndarray) -> int:
    """Number of overlapping pairs between two sets of (N, 4) boxes."""
    from shapely import STRtree, box

    if not len(first) or not len(second):
        return 0
    return int(STRtree(box(*first.T)).query(box(*second.T), predicate="intersects").shape[1])


def split_disjointness(tiles: Sequence[pa.Table], pairs: pa.Table) -> Finding:
    """Check that train and validation share no tile, photo or ground.

    Args:
        tiles: TILES tables of regions, each in its own UTM zone.
        pairs: rows with tile_id, photo_id and split.

    Returns:
        The finding; ground is compared as bounding boxes of chips in EPSG:4326. Pairs whose tile is not there in
        their split, as it was split anew since, are violations too: their ground is compared with nothing.
    """
    squares = {
        split: np.concatenate(
            [
                np.zeros((0, 4)),
                *(chip_squares(table.filter(pc.equal(table["split"], split))) for table in tiles),
            ]
        )
        for split in ("train", "validation")
    }
    overlaps = _overlaps(squares["train"], squares["validation"])
    shared: dict[str, int] = {}
    for column in ("tile_id", "photo_id"):
        # In Arrow: sets of ten million Python strings would take gigabytes.
        train, validation = (
            pc.unique(pairs[column].filter(pc.equal(pairs["split"], split))) for split in squares
        )
        shared[column] = pc.sum(pc.is_in(validation, train)).as_py() or 0
    now = pa.chunked_array([_tiles_in_splits(table) for table in tiles], pa.string())
    stale = pc.sum(pc.invert(pc.is_in(pc.unique(_tiles_in_splits(pairs)), now))).as_py() or 0
    violations = overlaps + sum(shared.values()) + stale
    return Finding(
        "split_disjointness",
        violations,
        f"{shared['tile_id']} tiles, {shared['photo_id']} photos and {overlaps} pieces of ground in both splits; "
        f"{stale} tiles are split otherwise than their pairs, which are to be materialised again",
        {"train_tiles": len(squares["train"]), "validation_tiles": len(squares["validation"])},
    )


def _tiles_in_splits(rows: pa.Table) -> pa.Array:
    """Tile and split of each row as one text."""
    return pc.binary_join_element_wise(rows["tile_id"].combine_chunks(), rows["split"].combine_chunks(), " ")


def no_training_ground(tiles: Sequence[pa.Table], squares: np.ndarray) -> Finding:
    """Check that a benchmark shows no ground of any tile, of whatever split.

    Args:
        tiles: TILES tables of all regions.
        squares: (M, 4) west, south, east, north of the benchmark's crops, EPSG:4326 degrees.

    Returns:
        The finding.
    """
    ground = np.concatenate([np.zeros((0, 4)), *map(chip_squares, tiles)])
    overlaps = _overlaps(ground, squares)
    return Finding(
        "no_training_ground",
        overlaps,
        f"{overlaps} overlaps of benchmark crops and tiles",
        {"tiles": len(ground), "crops": len(squares)},
    )


def read_chip(folder: UPath) -> Callable[[dict[str, object]], bytes]:
    """A reader of stored chips for `chip_georeference`."""
    from graft_pipeline.shards import read_member

    def read(row: dict[str, object]) -> bytes:
        return read_member(folder, str(row["shard"]), int(str(row["offset"])), int(str(row["size_bytes"])))

    return read

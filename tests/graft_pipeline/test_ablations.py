"""What variants learn from: data of their own beside the main ones, chips shared, alt-texts in the photos' order."""

from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import shapely
from upath import UPath

from graft_pipeline import ablations, chips, pairing, photos, sampling, training_sets
from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Grid
from graft_pipeline.imagery import Sensor
from graft_pipeline.manifests import partition_file, partition_folder, read_table, write_table
from graft_pipeline.regions import Region
from graft_pipeline.schemas import (
    ABLATIONS,
    CHIPS,
    FLICKR_PHOTOS,
    GROUND_EMBEDDINGS,
    GROUND_IMAGES,
    OUTDOOR_PHOTOS,
    PAIRS,
    SCENES,
    TILES,
)
from graft_pipeline.shards import read_member

KEY = "N42.25W071.75"
REGION = Region.parse(KEY, 0.25)
SMALL = Sensor(name="small", collection="X", bands=("R", "G", "B"), gsd_m=10.0, chip_px=32, crop_px=16)
PLACE = {"sensor": "small", "region": KEY}
NOW = datetime(2024, 5, 6, tzinfo=UTC)
RANDOM, ALL = ablations.variants_named(["random_tiles", "all_photos"])
#: Every third photo is taken indoors; they are the only ones at their places.
INDOOR = {f"{1000 + n}" for n in range(2, 36, 3)}


def pixels(grid: Grid) -> Any:
    generator = np.random.default_rng([int(grid.x0_m), int(grid.y0_m)])
    return generator.integers(1, 256, (grid.height_px, grid.width_px, 3), dtype=np.uint8)


class Service:
    """Gives pixels, and counts."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, _: Sensor, scene_id: str, grid: Grid) -> Any:
        self.asked += 1
        return pixels(grid)


def store(root: UPath, table: pa.Table | list[dict[str, Any]], dataset: Any, **place: str) -> pa.Table:
    if isinstance(table, list):
        table = pa.Table.from_pylist(
            [dict.fromkeys(dataset.schema.names) | row for row in table], schema=dataset.schema
        )
    write_table(partition_file(root, dataset, **place), table, dataset)
    return table


@pytest.fixture
def collected(root: UPath, make_photos: Callable[..., pa.Table]) -> UPath:
    """A region as its assets leave it: crowds of outdoor photos, and indoor photos away from them."""
    rows = [
        {
            "photo_id": f"{1000 + n}",
            "lon_deg": -71.70 + 0.006 * (n // 3) + 0.0002 * (n % 3) + (0.002 if n % 3 == 2 else 0),
            "title": None if n % 5 == 0 else f"IMG_{n}",
            "tags": "lake summer" if n % 2 else None,
        }
        for n in range(36)
    ]
    taken = store(root, make_photos(rows), FLICKR_PHOTOS, region=KEY)
    ids = taken["photo_id"].to_pylist()
    images = [{"photo_id": name, "status": "ok", "attempts": 1, "sha256": name} for name in ids]
    stored = store(root, images, GROUND_IMAGES, region=KEY)
    vectors = [{"photo_id": name, "embedding": [1.0, float(name)], "model_id": "m"} for name in ids]
    store(root, vectors, GROUND_EMBEDDINGS, region=KEY)
    scores = [
        {"photo_id": name, "outdoor_score": 0.5, "is_outdoor": name not in INDOOR, "classifier_id": "c"}
        for name in ids
    ]
    outdoor = store(root, scores, OUTDOOR_PHOTOS, region=KEY)
    scene = {"scene_id": "A", "acquired_at_utc": NOW, "cloud_pct": 0.0, "crs": "EPSG:32619"}
    scene |= {"x_min_m": 2e5, "y_min_m": 4.6e6, "x_max_m": 4e5, "y_max_m": 4.8e6}
    scenes = store(root, [scene | {"footprint_wkb": shapely.box(-73, 41, -70, 44).wkb}], SCENES, **PLACE)
    usable = photos.eligible(taken, stored, outdoor)
    tiles = store(root, sampling.sample_tiles(usable, REGION, SMALL, None), TILES, **PLACE)
    folder = partition_folder(root, CHIPS, **PLACE)
    made, _ = chips.update(
        tiles, scenes, taken, SMALL, folder, Service(),
        concurrency=2, max_attempts=3, shard_size=4, today=date(2024, 1, 1),
    )  # fmt: skip
    store(root, pairing.make_pairs(tiles, made, usable, REGION, SMALL, 25), PAIRS, **PLACE)
    training_sets.build_training_set(root, SMALL)
    return root


def make(root: UPath, variant: ablations.Variant, service: Service) -> int:
    return ablations.make_region(
        root,
        REGION,
        SMALL,
        variant,
        service,
        concurrency=2,
        max_attempts=3,
        photos_per_tile=25,
        seed=0,
        validation_fraction=0.1,
        today=date(2024, 1, 1),
    )


@pytest.mark.parametrize("variant", [RANDOM, ALL], ids=lambda variant: variant.name)
def test_a_variant_has_data_of_its_own_and_shares_chips(
    collected: UPath, variant: ablations.Variant, snapshot_of: Callable[[UPath], dict[str, bytes]]
) -> None:
    before, service = snapshot_of(collected), Service()
    fetched = make(collected, variant, service)
    here = ablations.variant_root(collected, SMALL, variant)
    tiles = read_table(partition_file(here, TILES, **PLACE), TILES)
    main = read_table(partition_file(collected, TILES, **PLACE), TILES)
    new = set(tiles["tile_id"].to_pylist()) - set(main["tile_id"].to_pylist())
    assert service.asked == fetched == len(new)
    assert 0 < len(new) < tiles.num_rows
    after = snapshot_of(collected)
    assert {name: content for name, content in after.items() if name in before} == before

    made = training_sets.build_training_set(here, SMALL)
    table = training_sets.read(made.folder)
    corner = {row["tile_id"]: row for row in tiles.to_pylist()}
    for row in table.to_pylist():
        content = read_member(here, row["chip_shard"], row["chip_offset"], row["chip_size_bytes"])
        at = corner[row["tile_id"]]
        grid = Grid(at["epsg"], at["x0_m"], at["y0_m"], 10.0, 32, 32)
        assert np.array_equal(chips.decode(content), pixels(grid))
    paired = set(table["photo_id"].to_pylist())
    if variant is ALL:
        assert paired & INDOOR
        assert tiles.num_rows > main.num_rows
    else:
        assert not paired & INDOOR
        assert tiles.num_rows == main.num_rows

    make(collected, variant, service)
    assert service.asked == len(new), "nothing is fetched twice"


def test_alt_texts_lie_in_the_order_of_the_embeddings(collected: UPath) -> None:
    seen: list[str] = []

    def embed(texts: Any) -> Any:
        seen.extend(texts)
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

    snapshot = training_sets.latest(collected, SMALL)
    described = ablations.write_alt_texts(collected, snapshot, embed)
    table = training_sets.read(snapshot)
    with (snapshot / ablations.ALT_TEXTS).open("rb") as file:
        texts = np.load(file)
    metadata = read_table(partition_file(collected, FLICKR_PHOTOS, region=KEY), FLICKR_PHOTOS)
    of_photo = {row["photo_id"]: row for row in metadata.to_pylist()}
    assert len(seen) == len(set(seen))
    for photo_id, row in zip(table["photo_id"].to_pylist(), table["embedding_row"].to_pylist(), strict=True):
        words = [word for word in (of_photo[photo_id]["title"], of_photo[photo_id]["tags"]) if word]
        expected = [len(" ".join(words)), 1.0] if words else [0.0, 0.0]
        assert texts[row].tolist() == expected
    assert described == np.count_nonzero(texts[:, 1])
    assert 0 < described < len(texts)


def rows_of(scores: dict[tuple[str, int], float]) -> pa.Table:
    base = {"setup_id": "r", "snapshot": "s", "train_tiles": 10, "train_pairs": 20, "best_step": 1}
    base |= {"training_seconds": 1.0}
    rows = [
        base | {"variant": variant, "seed": seed} | dict.fromkeys(ablations.SCORES, score)
        for (variant, seed), score in scores.items()
    ]
    return pa.Table.from_pylist(rows, schema=ABLATIONS.schema)


def test_the_table_compares_seed_by_seed() -> None:
    rows = rows_of({("graft", 0): 0.5, ("graft", 1): 0.7, ("alt_text", 1): 0.4, ("alt_text", 2): 0.8})
    graft, alt_text = ablations.summarise(rows)
    assert (graft["variant"], alt_text["variant"]) == ("graft", "alt_text")
    assert (graft["accuracy"], graft["accuracy_low"], graft["accuracy_high"]) == pytest.approx(
        (0.6, 0.5, 0.7)
    )
    assert alt_text["accuracy"] == pytest.approx(0.6)
    assert alt_text["mean_iou_gain"] == pytest.approx(-0.3), "only seed 1 has both"
    text = ablations.to_markdown([graft, alt_text])
    assert "0.600 (0.400 to 0.800) **-0.300**" in text
    assert ablations.summarise(rows_of({("pixel_level", 0): 0.5}))[0]["accuracy_gain"] is None


def test_variants_are_named() -> None:
    assert [variant.name for variant in ablations.variants_named([])] == [v.name for v in ablations.VARIANTS]
    with pytest.raises(InputError, match="use some of graft, random_tiles"):
        ablations.variants_named(["graft", "nonsense"])
    assert len({variant.name for variant in ablations.VARIANTS}) == len(ablations.VARIANTS)
    own = [v for v in ablations.VARIANTS if not v.is_main_data]
    assert pc.count_distinct(pa.array([v.data_name for v in own])).as_py() == len(own)

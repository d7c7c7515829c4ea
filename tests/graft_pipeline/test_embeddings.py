"""Outdoor scores and chip embeddings: each item with its own, once, whatever the order of the tables."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from upath import UPath

from graft_pipeline.embeddings import embed_chips, score_outdoor, to_column
from graft_pipeline.errors import DataError
from graft_pipeline.schemas import (
    CHIP_EMBEDDINGS,
    CHIPS,
    GROUND_EMBEDDINGS,
    GROUND_IMAGES,
    OUTDOOR_PHOTOS,
    TILES,
)
from graft_pipeline.shards import ShardWriter

IDS = [f"{number}" for number in (9, 101, 15, 4, 77, 230)]


class Meter:
    """A classifier of this test: the score is written in the image, or is the embedding's first number."""

    def __init__(self, *, needs_images: bool, classifier_id: str = "meter") -> None:
        self.needs_images, self.classifier_id = needs_images, classifier_id
        self.embedding_model_id = None if needs_images else "m"
        self.scored = 0

    def score(self, embeddings: np.ndarray) -> np.ndarray:
        self.scored += len(embeddings)
        return embeddings[:, 0]

    def score_images(self, contents: Sequence[bytes]) -> np.ndarray:
        self.scored += len(contents)
        return np.array([float(content) for content in contents], np.float32)


def score_of(photo_id: str) -> float:
    return int(photo_id) / 256


def embedded(ids: Sequence[str]) -> pa.Table:
    columns = {
        "photo_id": pa.array(ids, pa.string()),
        "embedding": to_column(np.array([[score_of(i), 1.0] for i in ids], np.float32).reshape(-1, 2)),
        "model_id": pa.array(["m"] * len(ids), pa.string()),
    }
    return pa.table(columns).cast(GROUND_EMBEDDINGS.schema)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[UPath, list[dict[str, object]]]:
    """Images whose bytes are their score, and their index; a rejected one among them."""
    folder = UPath(tmp_path_factory.mktemp("images"))
    rows: list[dict[str, object]] = []
    with ShardWriter(folder, "images-00000.tar") as shard:
        for photo_id in IDS:
            place = shard.add(f"{photo_id}.jpg", repr(score_of(photo_id)).encode())
            row = dict.fromkeys(GROUND_IMAGES.schema.names) | place.__dict__
            rows.append(row | {"photo_id": photo_id, "status": "ok", "attempts": 1})
    other = dict.fromkeys(GROUND_IMAGES.schema.names)
    rows.append(other | {"photo_id": "500", "status": "rejected", "reason": "near_duplicate", "attempts": 1})
    return folder, rows


def decided(table: pa.Table) -> dict[str, tuple[float, bool]]:
    return {r["photo_id"]: (r["outdoor_score"], r["is_outdoor"]) for r in table.to_pylist()}


@given(ids=st.permutations(IDS), places=st.permutations(range(len(IDS) + 1)), needs_images=st.booleans())
def test_each_photo_has_its_own_score_in_any_order(
    stored: tuple[UPath, list[dict[str, object]]], ids: list[str], places: list[int], needs_images: bool
) -> None:
    folder, rows = stored
    images = pa.Table.from_pylist([rows[n] for n in places], schema=GROUND_IMAGES.schema)
    meter = Meter(needs_images=needs_images)
    table = score_outdoor(embedded(ids), images, OUTDOOR_PHOTOS.empty(), folder, meter, 0.1)
    assert table["photo_id"].to_pylist() == sorted(IDS)
    assert decided(table) == {i: (np.float32(score_of(i)), score_of(i) >= 0.1) for i in IDS}


@pytest.mark.parametrize("needs_images", [False, True])
def test_photos_are_scored_once(stored: tuple[UPath, list[dict[str, object]]], needs_images: bool) -> None:
    folder, rows = stored
    images = pa.Table.from_pylist(rows, schema=GROUND_IMAGES.schema)
    meter = Meter(needs_images=needs_images)
    first = score_outdoor(embedded(IDS[:4]), images, OUTDOOR_PHOTOS.empty(), folder, meter, 0.1)
    assert meter.scored == 4
    told: list[tuple[int, int]] = []
    later = score_outdoor(
        embedded(IDS), images, first, folder, meter, 0.5, lambda done, total: told.append((done, total))
    )
    assert meter.scored == 6
    assert told == [(2, 2)]
    # Kept scores are decided anew, and the table is the one that a single call gives.
    fresh = Meter(needs_images=needs_images)
    assert later.equals(score_outdoor(embedded(IDS), images, OUTDOOR_PHOTOS.empty(), folder, fresh, 0.5))
    assert pc.sum(later["is_outdoor"]).as_py() == 1
    # Another classifier starts over.
    other = Meter(needs_images=needs_images, classifier_id="other")
    table = score_outdoor(embedded(IDS), images, later, folder, other, 0.5)
    assert other.scored == 6
    assert set(table["classifier_id"].to_pylist()) == {"other"}


@pytest.mark.parametrize("needs_images", [False, True])
def test_photos_that_are_gone_have_no_score(
    stored: tuple[UPath, list[dict[str, object]]], needs_images: bool
) -> None:
    folder, rows = stored
    images = pa.Table.from_pylist(rows, schema=GROUND_IMAGES.schema)
    meter = Meter(needs_images=needs_images)
    known = score_outdoor(embedded(IDS), images, OUTDOOR_PHOTOS.empty(), folder, meter, 0.5)
    table = score_outdoor(embedded(IDS), images.slice(2), known, folder, meter, 0.5)
    assert table["photo_id"].to_pylist() == sorted(IDS[2:])
    assert meter.scored == len(IDS)
    none = score_outdoor(GROUND_EMBEDDINGS.empty(), images, known, folder, meter, 0.5)
    assert none.equals(OUTDOOR_PHOTOS.empty())


def test_embeddings_of_another_model_are_not_scored(
    stored: tuple[UPath, list[dict[str, object]]],
) -> None:
    """Their scores would mean nothing, and be kept: the classifier is the same once they are embedded anew."""
    folder, rows = stored
    images = pa.Table.from_pylist(rows, schema=GROUND_IMAGES.schema)
    table = embedded(IDS)
    position = table.schema.get_field_index("model_id")
    other = table.set_column(position, table.schema.field(position), pa.array(["m"] * 5 + ["old"]))
    meter = Meter(needs_images=False)
    with pytest.raises(DataError, match=r"model old, .* materialise ground_embeddings"):
        score_outdoor(other, images, OUTDOOR_PHOTOS.empty(), folder, meter, 0.5)
    assert meter.scored == 0
    of_images = Meter(needs_images=True)
    assert score_outdoor(other, images, OUTDOOR_PHOTOS.empty(), folder, of_images, 0.5).num_rows == len(IDS)


def chip_table(folder: UPath, contents: dict[str, bytes], shard: str) -> pa.Table:
    """Stored chips whose bytes are a number; one more has failed."""
    plain = dict.fromkeys(CHIPS.schema.names) | {"attempts": 1, "scenes_tried": 1}
    plain |= {"epsg": 32619, "x0_m": 0.0, "y0_m": 0.0, "gsd_m": 1.0, "chip_px": 448}
    rows = [plain | {"tile_id": "t-failed", "status": "failed", "reason": "nodata"}]
    with ShardWriter(folder, shard) as writer:
        for tile_id, content in contents.items():
            stored = writer.add(f"{tile_id}.tif", content)
            rows.append(plain | vars(stored) | {"tile_id": tile_id, "status": "ok"})
    return pa.Table.from_pylist(rows, schema=CHIPS.schema)


def test_a_chip_that_changed_is_embedded_anew_and_no_other(tmp_path: Path) -> None:
    seen: list[bytes] = []

    def embed(contents: Iterable[bytes]) -> np.ndarray:
        batch = list(contents)
        seen.extend(batch)
        return np.array([[float(content), 1.0] for content in batch], np.float32)

    def vectors(table: pa.Table) -> dict[str, float]:
        return {row["tile_id"]: row["embedding"][0] for row in table.to_pylist()}

    folder, names = UPath(tmp_path), ["t-1", "t-2", "t-3", "t-failed"]
    numbers = {name: pa.array([0] * len(names)) for name in TILES.schema.names}
    tiles = pa.table(
        numbers | {"tile_id": names, "center_lon_deg": [-70.0] * 4, "center_lat_deg": [42.0] * 4}
    )
    first = chip_table(folder, {"t-1": b"1", "t-2": b"2", "t-3": b"3"}, "chips-00000.tar")
    known = embed_chips(first, tiles, CHIP_EMBEDDINGS.empty(), folder, embed, "m")
    assert vectors(known) == {"t-1": 1.0, "t-2": 2.0, "t-3": 3.0}
    seen.clear()
    assert embed_chips(first, tiles, known, folder, embed, "m").equals(known)
    assert seen == []
    # The first is the same file elsewhere, the second another image, the third is no more.
    later = chip_table(folder, {"t-1": b"1", "t-2": b"20"}, "chips-00001.tar")
    assert vectors(embed_chips(later, tiles, known, folder, embed, "m")) == {"t-1": 1.0, "t-2": 20.0}
    assert seen == [b"20"]
    seen.clear()
    embed_chips(later, tiles, known, folder, embed, "another encoder")
    assert seen == [b"1", b"20"]

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from upath import UPath

from graft_pipeline import training_sets
from graft_pipeline.errors import DataError
from graft_pipeline.imagery import NAIP, SENTINEL2
from graft_pipeline.manifests import partition_file, read_table, write_table
from graft_pipeline.schemas import CHIPS, GROUND_EMBEDDINGS, PAIRS, TRAINING_PAIRS

TIME = datetime(2020, 1, 1, tzinfo=UTC)


def vector(photo_id: str) -> list[float]:
    values = np.random.default_rng(int(photo_id)).normal(size=8).astype(np.float32)
    return [float(value) for value in values]


def write_region(
    root: UPath, region: str, pairs: list[tuple[str, str, str]], embedded: list[str], model_id: str = "m"
) -> None:
    """Store a region: (tile, photo, split) pairs, their chips, embeddings of some photos."""
    base = {
        "scene_id": "S",
        "lon_deg": -71.5,
        "lat_deg": 42.5,
        "col_px": 1.5,
        "row_px": 2.5,
        "acquired_at_utc": TIME,
    }
    rows = [
        dict.fromkeys(PAIRS.schema.names)
        | base
        | {"tile_id": tile, "photo_id": photo, "center_photo_id": photo, "split": split}
        for tile, photo, split in pairs
    ]
    table = pa.Table.from_pylist(rows, schema=PAIRS.schema)
    write_table(partition_file(root, PAIRS, sensor="naip", region=region), table, PAIRS)
    chip_rows = [
        dict.fromkeys(CHIPS.schema.names)
        | {"tile_id": tile, "status": "ok", "attempts": 1, "scenes_tried": 1, "shard": "chips-00000.tar"}
        | {"offset": 512 * number, "size_bytes": 100 + number, "sha256": "0"}
        | {"epsg": 32619, "x0_m": 0.0, "y0_m": 0.0, "gsd_m": 1.0, "chip_px": 448}
        for number, tile in enumerate(sorted({tile for tile, _, _ in pairs}))
    ]
    table = pa.Table.from_pylist(chip_rows, schema=CHIPS.schema)
    write_table(partition_file(root, CHIPS, sensor="naip", region=region), table, CHIPS)
    vectors = [{"photo_id": photo, "embedding": vector(photo), "model_id": model_id} for photo in embedded]
    table = pa.Table.from_pylist(vectors, schema=GROUND_EMBEDDINGS.schema)
    write_table(partition_file(root, GROUND_EMBEDDINGS, region=region), table, GROUND_EMBEDDINGS)


@pytest.fixture
def stored(root: UPath) -> UPath:
    write_region(
        root,
        "N42W072",
        [
            ("naip-20", "20", "train"),
            ("naip-20", "3", "train"),
            ("naip-7", "7", "guard"),
            ("naip-8", "9", "validation"),
        ],
        ["20", "3", "7", "9", "11"],
    )
    write_region(root, "N42W071", [("naip-100", "100", "train"), ("naip-100", "5", "train")], ["100"])
    write_region(root, "N41W071", [], [])
    return root


def test_a_snapshot_joins_pairs_chips_and_embeddings(stored: UPath) -> None:
    made = training_sets.build_training_set(stored, NAIP)
    assert (made.tiles, made.photos, made.pairs) == (3, 4, 4)
    assert made.pairs_by_split == {"train": 3, "validation": 1}
    assert (made.guard_pairs, made.unembedded_pairs, made.model_id) == (1, 1, "m")
    assert made.regions == ("N42W071", "N42W072")
    assert (
        made.folder == partition_file(stored, TRAINING_PAIRS, sensor="naip", snapshot=made.fingerprint).parent
    )
    table = training_sets.read(made.folder)
    matrix = np.load(made.folder.joinpath("ground_embeddings.npy").open("rb"))
    assert (matrix.dtype, matrix.shape) == (np.float32, (4, 8))
    for row in table.to_pylist():
        np.testing.assert_array_equal(matrix[row["embedding_row"]], np.float32(vector(row["photo_id"])))
        chips = read_table(stored / row["chip_shard"].replace("chips-00000.tar", "chips.parquet"), CHIPS)
        assert chips is not None
        (chip,) = [chip for chip in chips.to_pylist() if chip["tile_id"] == row["tile_id"]]
        assert (row["chip_offset"], row["chip_size_bytes"]) == (chip["offset"], chip["size_bytes"])
    order = [table["photo_id"].to_pylist()[table["embedding_row"].to_pylist().index(n)] for n in range(4)]
    assert order == sorted(order) == ["100", "20", "3", "9"]


def test_same_content_same_snapshot_untouched(stored: UPath, snapshot_of: Any) -> None:
    made = training_sets.build_training_set(stored, NAIP)
    before = snapshot_of(stored)
    again = training_sets.build_training_set(stored, NAIP)
    assert (made.is_new, again.is_new) == (True, False)
    assert again.fingerprint == made.fingerprint
    assert snapshot_of(stored) == before


def test_other_content_another_snapshot_and_the_latest_is_known(stored: UPath) -> None:
    first = training_sets.build_training_set(stored, NAIP)
    assert training_sets.latest(stored, NAIP) == first.folder
    write_region(stored, "N41W071", [("naip-1", "1", "train")], ["1"])
    second = training_sets.build_training_set(stored, NAIP)
    assert second.fingerprint != first.fingerprint
    assert training_sets.latest(stored, NAIP) == second.folder
    assert training_sets.read(first.folder).num_rows == 4, "snapshots stay"
    some = training_sets.build_training_set(stored, NAIP, ["N42W072"])
    assert some.regions == ("N42W072",)
    assert len({first.fingerprint, second.fingerprint, some.fingerprint}) == 3


def test_an_embedding_that_changes_changes_the_snapshot(stored: UPath) -> None:
    first = training_sets.build_training_set(stored, NAIP)
    path = partition_file(stored, GROUND_EMBEDDINGS, region="N42W071")
    row = {"photo_id": "100", "embedding": vector("101"), "model_id": "m"}
    write_table(path, pa.Table.from_pylist([row], schema=GROUND_EMBEDDINGS.schema), GROUND_EMBEDDINGS)
    assert training_sets.build_training_set(stored, NAIP).fingerprint != first.fingerprint


def test_embeddings_of_two_models_are_not_mixed(stored: UPath) -> None:
    write_region(stored, "N41W071", [("naip-1", "1", "train")], ["1"], model_id="other")
    with pytest.raises(DataError, match="several foundation models"):
        training_sets.build_training_set(stored, NAIP)


def test_nothing_to_train_with_is_said(stored: UPath) -> None:
    with pytest.raises(DataError, match="materialise pairs"):
        training_sets.build_training_set(stored, SENTINEL2)
    with pytest.raises(DataError, match="materialise training_set"):
        training_sets.latest(stored, NAIP)
    with pytest.raises(DataError, match="materialise training_set"):
        training_sets.read(stored / "nowhere")


def test_pairs_without_their_chip_are_refused(stored: UPath) -> None:
    path = partition_file(stored, CHIPS, sensor="naip", region="N42W072")
    chips = read_table(path, CHIPS)
    assert chips is not None
    write_table(path, chips.slice(0, 1), CHIPS)
    with pytest.raises(DataError, match="no stored chip"):
        training_sets.build_training_set(stored, NAIP)

import json

import numpy as np
import pytest
from upath import UPath

from graft_pipeline.errors import DataError, InputError
from graft_pipeline.imagery import Sensor
from training.data import TrainingSet
from training.encoders import encode_texts, load_clip
from training.loop import TrainConfig, train

TOY = Sensor(name="toy", collection="none", bands=("R", "G", "B"), gsd_m=1.0, chip_px=64, crop_px=32)


@pytest.fixture
def described(toy_world, tmp_path):
    """A snapshot of the toy training set whose photos have alt-texts, but for the first: (folder, f_T)."""
    folder = UPath(tmp_path / "snapshot=described")
    folder.mkdir()
    for name in ("training_set.parquet", "ground_embeddings.npy"):
        (folder / name).write_bytes((toy_world.folder / name).read_bytes())
    photos = sorted(toy_world.photo_class)
    texts = encode_texts(
        load_clip(toy_world.architecture), [toy_world.photo_class[photo] for photo in photos]
    )
    texts[0] = 0
    np.save(str(folder / "alt_text_embeddings.npy"), texts)
    return folder, texts


def run(toy_world, folder, output, **changes):
    config = TrainConfig(
        level=changes.pop("level", "image"),
        **{
            "architecture": toy_world.architecture,
            "pretrained": None,
            "sensor": TOY,
            "steps": 2,
            "batch_tiles": 16,
            "photos_per_tile": 3,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "validate_every": 1,
            "device": "cpu",
        }
        | changes,
    )
    return train(config, folder, toy_world.root, UPath(output))


def test_photos_without_text_are_left_out_and_the_others_have_both(toy_world, described):
    folder, texts = described
    data = TrainingSet(folder, toy_world.root, alt_text=True)
    plain = TrainingSet(folder, toy_world.root)
    assert data.pair_count == plain.pair_count - 1
    rows = np.array([3, 1, 3])
    np.testing.assert_array_equal(
        data.targets[rows], np.concatenate([plain.embeddings[rows], texts[rows]], axis=1)
    )
    for split in ("train", "validation"):
        assert 0 not in data.split(split).embedding_row


@pytest.mark.parametrize("level", ["image", "pixel"])
def test_the_loss_is_the_weighted_sum_of_both(toy_world, described, tmp_path, level):
    folder, _ = described

    def first(name, photo_weight, alt_text_weight):
        weights = {"photo_weight": photo_weight, "alt_text_weight": alt_text_weight}
        return run(toy_world, folder, tmp_path / name, level=level, **weights).validations[0]["loss"]

    # A weight of 1e-12 keeps the photos without text out, and adds nothing.
    photos, texts = first("photos", 1.0, 1e-12), first("texts", 0.0, 1.0)
    assert photos != pytest.approx(texts)
    assert first("both", 1.0, 0.5) == pytest.approx(photos + 0.5 * texts, abs=1e-5)


def test_texts_alone_bring_tiles_to_their_words(toy_world, described, tmp_path):
    folder, _ = described
    result = run(toy_world, folder, tmp_path / "out", steps=30, photo_weight=0.0, alt_text_weight=1.0)
    losses = [row["loss"] for row in result.validations]
    assert losses[-1] < losses[0] - 0.1
    card = json.loads((result.folder / "model_card.json").read_text())
    assert (card["training"]["photo_weight"], card["training"]["alt_text_weight"]) == (0.0, 1.0)


def test_what_does_not_fit_is_refused(toy_world, described, tmp_path):
    with pytest.raises(InputError, match=r"alt_text_embeddings\.npy is not there"):
        run(toy_world, toy_world.folder, tmp_path / "a", alt_text_weight=1.0)
    folder, texts = described
    np.save(str(folder / "alt_text_embeddings.npy"), texts[1:])
    with pytest.raises(DataError, match="alt_text_embeddings"):
        run(toy_world, folder, tmp_path / "b", alt_text_weight=1.0)
    for weights in ((0.0, 0.0), (-1.0, 2.0)):
        with pytest.raises(InputError, match="photo_weight"):
            TrainConfig(level="image", photo_weight=weights[0], alt_text_weight=weights[1])

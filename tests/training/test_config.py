"""Every field of a configuration changes something; a field without a case here fails."""

import gc
import json
import sys
import threading
import time
from dataclasses import fields, replace

import numpy as np
import open_clip
import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.modules.module import register_module_forward_pre_hook
from upath import UPath

from graft_pipeline.errors import DataError, InputError
from graft_pipeline.imagery import Sensor
from training.data import Batch
from training.encoders import load_clip
from training.export import save_encoder
from training.foundation import FoundationConfig, new_clip, train_foundation
from training.loop import COST_FIELDS, TrainConfig, train

TOY = Sensor(name="toy", collection="none", bands=("R", "G", "B"), gsd_m=1.0, chip_px=64, crop_px=32)

#: What is learnt is other with these values.
LEARNT = {
    "level": "pixel",
    "sensor": replace(TOY, crop_px=28),
    "steps": 3,
    "batch_tiles": 8,
    "photos_per_tile": 1,
    "learning_rate": 5e-4,
    "warmup_steps": 0,
    "weight_decay": 0.5,
    "betas": (0.8, 0.9),
    "grad_clip": 0.01,
    "temperature": 0.2,
    "photo_weight": 2.0,
    "alt_text_weight": 0.5,
    "mask_shared_photos": True,
    "max_shift": 0.0,
    "precision": "bf16",
    "seed": 1,
}


@pytest.fixture(scope="module")
def run(toy_world, crowded, tmp_path_factory):
    """Trains on the crowded training set with some fields changed."""

    def run(progress=None, **changes):
        options = {
            "level": "image",
            "architecture": toy_world.architecture,
            "pretrained": None,
            "sensor": TOY,
            "steps": 4,
            "batch_tiles": 16,
            "photos_per_tile": 3,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "validate_every": 2,
            "device": "cpu",
        } | changes
        output = UPath(tmp_path_factory.mktemp("run"))
        return train(TrainConfig(**options), crowded, toy_world.root, output, progress)

    return run


@pytest.fixture(scope="module")
def plain(run):
    return run()


@pytest.mark.parametrize("name", LEARNT)
def test_it_changes_what_is_learnt(name, run, plain):
    assert run(**{name: LEARNT[name]}).model_id != plain.model_id


def test_architecture(toy_world, run, plain, tmp_path):
    other = new_clip(FoundationConfig(image_px=16, width=32, head_width=16, vision_layers=2, text_layers=1))
    save_encoder(UPath(tmp_path / "other"), other)
    assert run(architecture=f"local-dir:{tmp_path / 'other'}").model_id != plain.model_id


def test_pretrained(toy_world, run, plain, tmp_path, monkeypatch):
    # The foundation model as a named architecture with a checkpoint file, and the same with other weights.
    config = json.loads((toy_world.foundation / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "toy-vit.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    open_clip.add_model_config(tmp_path / "toy-vit.json")
    other = load_clip(toy_world.architecture)
    torch.nn.init.normal_(other.model.visual.proj)
    changed = save_encoder(UPath(tmp_path / "changed"), other) / "open_clip_model.safetensors"
    original = toy_world.foundation / "open_clip_model.safetensors"
    options = {"architecture": "toy-vit"}
    losses = [run(pretrained=str(file), **options).history for file in (original, changed)]
    assert losses[0] != losses[1]


def test_epochs(run):
    # 50 tiles, 16 a step: three steps an epoch.
    assert run(steps=None, epochs=2.0).steps == 6
    assert run(steps=None, epochs=1.0).steps == 3


def test_validate_every(run, plain):
    assert [row["step"] for row in plain.validations] == [0, 2, 4]
    assert [row["step"] for row in run(validate_every=1).validations] == [0, 1, 2, 3, 4]


def test_keep(run):
    # Long enough to learn the training tiles by heart: an earlier step is the best one.
    options = {"learning_rate": 1e-2, "validate_every": 5, "steps": 60}
    best, last = run(**options), run(keep="last", **options)
    losses = {row["step"]: row["loss"] for row in best.validations if row["step"]}
    assert best.best_step == min(losses, key=losses.get) < 60
    assert last.best_step == 60
    assert best.model_id != last.model_id


def test_validation_tiles(run, plain):
    assert plain.validations[0]["tiles"] == 10
    assert run(validation_tiles=3).validations[0]["tiles"] == 3


def seen_by(kind):
    """Batch sizes that modules of a kind get while the block lasts; validations' too."""

    class Seen:
        def __enter__(self):
            self.sizes = []
            self._hook = register_module_forward_pre_hook(self._note)
            return self.sizes

        def _note(self, module, arguments):
            if isinstance(module, kind) and torch.is_grad_enabled():
                self.sizes.append(len(arguments[0]))

        def __exit__(self, *_):
            self._hook.remove()

    return Seen()


def test_accumulation_steps(run, plain):
    with seen_by(torch.nn.Conv2d) as sizes:
        result = run(accumulation_steps=3)
    assert sizes == [6, 5, 5] * 4
    losses = [[row["loss"] for row in some.history] for some in (result, plain)]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)


def test_grad_checkpointing(run, plain):
    # Each block runs twice: for its output, and again for its gradient.
    with seen_by(open_clip.transformer.ResidualAttentionBlock) as blocks:
        result = run(grad_checkpointing=True)
    assert blocks == [16, 16] * 4
    assert result.model_id == plain.model_id


def test_compile_backend(run, plain):
    counters.clear()
    # Traced and differentiated ahead of time, but not compiled: that would take most of a minute.
    result = run(compile_backend="aot_eager")
    assert counters["stats"]["unique_graphs"] > 0
    losses = [[row["loss"] for row in some.history] for some in (result, plain)]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)
    with pytest.raises(InputError, match=r"use one of .*inductor"):
        run(compile_backend="abacus")


def test_chip_memory_gb(toy_world, crowded, run, plain, tmp_path):
    shard = toy_world.root / "chips" / "chips-00000.tar"
    away = shard.with_name("away.tar")
    try:
        # In memory, chips are not read again; on disk, they are.
        kept = run(lambda at: shard.rename(away) if at.step == 1 else None)
        assert kept.model_id == plain.model_id
        away.rename(shard)
        assert run(chip_memory_gb=0.0).model_id == plain.model_id
        with pytest.raises(DataError, match="is missing"):
            run(lambda at: shard.rename(away) if at.step == 1 else None, chip_memory_gb=0.0)
    finally:
        if away.exists():
            away.rename(shard)


def test_chip_cache(toy_world, run, plain, tmp_path):
    cache = str(tmp_path / "cache")
    first = run(chip_memory_gb=0.0, chip_cache=cache)
    shard = toy_world.root / "chips" / "chips-00000.tar"
    away = shard.rename(shard.with_name("away.tar"))
    try:
        second = run(chip_memory_gb=0.0, chip_cache=cache)
    finally:
        away.rename(shard)
    assert first.model_id == second.model_id == plain.model_id


@pytest.mark.parametrize("count", [1, 4])
def test_decode_threads(count, run, plain):
    names = set()

    def note(*_):
        names.add(threading.current_thread().name)
        sys.setprofile(None)

    threading.setprofile(note)
    try:
        assert run(decode_threads=count, chip_memory_gb=0.0).model_id == plain.model_id
    finally:
        threading.setprofile(None)
    decoding = {name.rsplit("_", 1)[1] for name in names if name.startswith("chips")}
    assert len(decoding) == 1 if count == 1 else 1 < len(decoding) <= count


@pytest.mark.parametrize("count", [1, 3])
def test_prefetch_batches(count, run, plain):
    # The validation's batch, the one in use, and those ahead of it.
    def live():
        return sum(type(some) is Batch for some in gc.get_objects())

    def wait(at):
        if at.step == 1:
            end = time.monotonic() + 20
            while live() - before < 2 + count and time.monotonic() < end:
                time.sleep(0.02)
            time.sleep(0.1)
            seen.append(live() - before)

    gc.collect()
    seen, before = [], live()
    assert run(wait, prefetch_batches=count).model_id == plain.model_id
    assert seen == [2 + count]


def test_device(run):
    if torch.cuda.is_available():
        assert run(device="cuda").peak_device_memory_gb > 0
    else:
        with pytest.raises(InputError, match="not available"):
            run(device="cuda")


def test_threads(run, plain):
    before = torch.get_num_threads()
    seen = set()
    try:
        run(lambda at: seen.add(torch.get_num_threads()), threads=before + 1)
    finally:
        torch.set_num_threads(before)
    assert seen == {before + 1}


def test_every_field_of_a_training_has_a_case():
    cases = set(LEARNT) | {
        name.removeprefix("test_") for name, value in globals().items() if name.startswith("test_")
    }
    assert [field.name for field in fields(TrainConfig) if field.name not in cases] == []
    assert set(COST_FIELDS) < {field.name for field in fields(TrainConfig)}


SMALL = FoundationConfig(
    image_px=16, width=32, head_width=16, vision_layers=1, text_layers=1, context=12, steps=3, batch_size=32
)
FOUNDATION = {
    "image_px": 24,
    "patch_px": 4,
    "width": 64,
    "head_width": 8,
    "vision_layers": 2,
    "text_layers": 2,
    "context": 10,
    "steps": 2,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "weight_decay": 0.5,
    "grad_clip": 0.1,
    "patch_dropout": 0.0,
    "seed": 1,
}


@pytest.fixture(scope="module")
def small_id(toy_captions, tmp_path_factory):
    return train_foundation(*toy_captions, UPath(tmp_path_factory.mktemp("small")), SMALL).model_id


@pytest.mark.parametrize("name", [field.name for field in fields(FoundationConfig)])
def test_it_changes_the_foundation_model(name, small_id, toy_captions, tmp_path):
    changed = replace(SMALL, **{name: FOUNDATION[name]})
    assert train_foundation(*toy_captions, UPath(tmp_path / "model"), changed).model_id != small_id

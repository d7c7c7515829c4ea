import dataclasses
import json
import math
import shutil

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from upath import UPath

from graft_pipeline.errors import DataError, GraftError, InputError, TrainingError
from graft_pipeline.imagery import Sensor
from training.checkpoint import load_checkpoint
from training.encoders import encode_images, encode_texts, load_clip
from training.export import read_card, save_encoder
from training.loop import TrainConfig, at_pixels, recall, resolve_device, train

TOY = Sensor(name="toy", collection="none", bands=("R", "G", "B"), gsd_m=1.0, chip_px=64, crop_px=32)


def config_of(world, level="image", **changes):
    options = {
        "architecture": world.architecture,
        "pretrained": None,
        "sensor": TOY,
        "steps": 6,
        "batch_tiles": 16,
        "photos_per_tile": 3,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "validate_every": 2,
        "device": "cpu",
    } | changes
    return TrainConfig(level=level, **options)


def run(world, output, level="image", progress=None, **changes):
    return train(config_of(world, level, **changes), world.folder, world.root, UPath(output), progress)


def weights(folder):
    return load_clip(f"local-dir:{folder}").model.state_dict()


@pytest.fixture(scope="module", params=["image", "pixel"])
def trained(request, toy_world, tmp_path_factory):
    output = tmp_path_factory.mktemp(request.param)
    return (
        request.param,
        run(toy_world, output, request.param, steps=40, validate_every=20, learning_rate=3e-3),
        output,
    )


def test_training_brings_tiles_to_their_photos(trained):
    _, result, _ = trained
    first, last = result.validations[0], result.validations[-1]
    assert first["step"] == 0
    assert last["step"] == 40
    assert last["loss"] < first["loss"] - 0.1
    assert last["recall_at_10"] >= first["recall_at_10"]
    losses = [row["loss"] for row in result.history]
    assert len(losses) == 40
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert result.train_tiles == 50
    assert result.seconds > 0
    assert result.peak_memory_gb > 0
    assert result.peak_device_memory_gb is None


def test_the_output_is_an_open_clip_folder_with_a_card(trained, toy_world):
    level, result, output = trained
    assert sorted(path.name for path in output.iterdir()) == ["checkpoints", "encoder", "history.json"]
    assert list((output / "checkpoints").iterdir()) == []
    clip = load_clip(f"local-dir:{result.folder}")
    assert clip.fingerprint() == result.model_id
    card = read_card(result.folder)
    assert card["level"] == level
    assert card["training_set"]["fingerprint"] == "0123456789abcdef"
    assert card["sensor"]["bands"] == ["R", "G", "B"]
    assert card["validation"]["step"] == result.best_step
    assert card["model_id"] == result.model_id
    foundation = load_clip(toy_world.architecture)
    assert card["foundation"]["model_id"] == foundation.fingerprint()
    assert str(toy_world.root) not in json.dumps(card)
    # Each thing that whoever uses the model has to know is said, for machines and for people.
    assert card["input"]["mean"] == list(clip.preprocess_config["mean"])
    assert card["training"]["steps"] == 40
    assert card["validation_before"]["loss"] > card["validation"]["loss"]
    assert min(len(card[key]) for key in ("code_version", "intended_use", "limits")) > 0
    assert card["code_version"] in (result.folder / "README.md").read_text()
    # f_T is the foundation model's own, f_S is not its image tower any more.
    texts = ["a photo of red", "blue"]
    np.testing.assert_array_equal(encode_texts(clip, texts), encode_texts(foundation, texts))
    chips = np.random.default_rng(0).integers(0, 256, (2, 448, 448, 3), dtype=np.uint8)
    assert np.abs(encode_images(clip, chips) - encode_images(foundation, chips)).max() > 1e-2
    history = json.loads((output / "history.json").read_text())
    assert history["history"] == result.history


def test_open_clip_alone_pairs_the_satellite_tower_with_the_foundations_text_tower(trained, toy_world):
    _, result, _ = trained
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{result.folder}")
    before, _, _ = open_clip.create_model_and_transforms(toy_world.architecture)
    ours, theirs = model.state_dict(), before.state_dict()
    assert ours.keys() == theirs.keys()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {name for name in ours if name.startswith("visual.")}
    pixels = preprocess(Image.new("RGB", (448, 448), (200, 40, 40)))[None]
    tokens = open_clip.get_tokenizer(f"local-dir:{result.folder}")(["a photo of red"])
    with torch.no_grad():
        image, text, _ = model.eval()(pixels, tokens)
    assert image.shape == text.shape == (1, 32)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(toy_world, tmp_path):
    first = run(toy_world, tmp_path / "a")
    second = run(toy_world, tmp_path / "b")
    other = run(toy_world, tmp_path / "c", seed=1)
    assert first.model_id == second.model_id
    assert first.history == second.history
    assert other.model_id != first.model_id
    for name in ("open_clip_config.json", "open_clip_model.safetensors", "model_card.json", "README.md"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


class Killed(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("level", ["image", "pixel"])
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(toy_world, tmp_path, level):
    def kill(progress):
        seen.append(progress.step)
        if progress.step == 5:
            raise Killed

    straight = run(toy_world, tmp_path / "straight", level)
    seen = []
    with pytest.raises(Killed):
        run(toy_world, tmp_path / "killed", level, kill)
    assert not (tmp_path / "killed" / "encoder").exists()
    resumed_steps = []
    resumed = run(toy_world, tmp_path / "killed", level, lambda progress: resumed_steps.append(progress.step))
    # Validations, and checkpoints, are after steps 2, 4 and 6.
    assert resumed_steps == [5, 6]
    assert resumed.history == straight.history
    assert resumed.validations == straight.validations
    assert resumed.model_id == straight.model_id


def test_the_best_weights_survive_a_kill_between_two_files(toy_world, tmp_path):
    checkpoints = tmp_path / "out" / "checkpoints"

    def kill(progress):
        if progress.step == 2:
            shutil.copytree(checkpoints, tmp_path / "earlier")
        if progress.step == 4:
            raise Killed

    def spoil(module, _, output):
        # As if a GPU's rounding had made step 4 worse than before; in validations alone.
        is_seen = isinstance(module, torch.nn.LayerNorm) and not torch.is_grad_enabled()
        return -output if is_seen else None

    with pytest.raises(Killed):
        run(toy_world, tmp_path / "out", progress=kill, steps=4)
    # The best weights of step 4 are written, `last` is not yet.
    for best in checkpoints.glob("best*"):
        best.rename(tmp_path / "earlier" / best.name)
    shutil.rmtree(checkpoints)
    (tmp_path / "earlier").rename(checkpoints)
    of_step_2, _ = load_checkpoint(UPath(checkpoints / "last.safetensors"))
    hook = register_module_forward_hook(spoil)
    try:
        result = run(toy_world, tmp_path / "out", steps=4)
    finally:
        hook.remove()
    assert result.best_step == 2
    exported = weights(result.folder)
    for name, tensor in of_step_2.items():
        if name.startswith("tower/"):
            assert torch.equal(exported[f"visual.{name.removeprefix('tower/')}"], tensor)


def test_what_killed_runs_left_half_written_goes(toy_world, tmp_path):
    half = tmp_path / "checkpoints" / ".last.safetensors.0123456789ab.partial"
    half.parent.mkdir()
    half.write_bytes(b"half")
    (tmp_path / ".encoder.0123456789ab.partial").mkdir()
    run(toy_world, tmp_path, steps=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "encoder", "history.json"]
    assert list(half.parent.iterdir()) == []


def test_another_configuration_starts_anew(toy_world, tmp_path):
    def kill(progress):
        if progress.step == 4:
            raise Killed

    with pytest.raises(Killed):
        run(toy_world, tmp_path, progress=kill)
    steps = []
    run(toy_world, tmp_path, progress=lambda progress: steps.append(progress.step), temperature=0.1)
    assert steps[0] == 1


def test_progress_tells_loss_rate_and_validations(toy_world, tmp_path):
    told = []
    result = run(toy_world, tmp_path, progress=told.append)
    assert [at.step for at in told] == [1, 2, 3, 4, 5, 6]
    assert [at.validation is not None for at in told] == [False, True] * 3
    assert told[0].learning_rate == pytest.approx(5e-4)
    assert told[1].learning_rate == pytest.approx(1e-3)
    assert told[-1].learning_rate < told[2].learning_rate
    assert [at.loss for at in told] == [row["loss"] for row in result.history]


def test_the_best_weights_are_exported_not_the_last(toy_world, tmp_path):
    # Far too large a rate: the validation loss rises after the first steps.
    result = run(
        toy_world, tmp_path, learning_rate=0.3, warmup_steps=6, steps=8, validate_every=1, grad_clip=1e9
    )
    losses = {row["step"]: row["loss"] for row in result.validations if row["step"]}
    assert result.best_step == min(losses, key=losses.get)
    assert result.best_step < 8
    stopped = run(
        toy_world,
        tmp_path / "again",
        learning_rate=0.3,
        warmup_steps=6,
        steps=8,
        validate_every=1,
        grad_clip=1e9,
    )
    assert stopped.model_id == result.model_id


def test_a_loss_that_is_no_number_stops_with_advice(toy_world, tmp_path):
    broken = tmp_path / "snapshot=broken"
    broken.mkdir()
    (broken / "training_set.parquet").write_bytes((toy_world.folder / "training_set.parquet").read_bytes())
    table = pq.read_table(str(toy_world.folder / "training_set.parquet"))
    row, split = np.asarray(table["embedding_row"]), np.asarray(table["split"])
    for name, what in (("train", "loss"), ("validation", "validation loss")):
        embeddings = np.load(str(toy_world.folder / "ground_embeddings.npy"))
        embeddings[row[split == name]] = np.nan
        np.save(broken / "ground_embeddings.npy", embeddings)
        with pytest.raises(GraftError, match=f"The {what} of step 0 is nan: lower the learning rate"):
            train(config_of(toy_world), UPath(broken), toy_world.root, UPath(tmp_path / "out"))
        assert not (tmp_path / "out" / "encoder").exists()


def last_step(output):
    """Step that a run would go on after."""
    return load_checkpoint(UPath(output) / "checkpoints" / "last.safetensors")[1]["run"]["step"]


def test_running_out_of_memory_stops_with_advice_and_goes_on_with_less(toy_world, tmp_path):
    def ask_for_too_much(*_):
        torch.empty(2**60, dtype=torch.uint8)

    def fill(progress):
        if progress.step == 3:
            hooks.append(register_module_forward_pre_hook(ask_for_too_much))

    hooks, steps = [], []
    try:
        with pytest.raises(
            TrainingError, match=r"raise accumulation_steps .* goes on at its last checkpoint"
        ):
            run(toy_world, tmp_path / "out", progress=fill)
    finally:
        hooks[0].remove()
    assert last_step(tmp_path / "out") == 2
    # What the message says to do does not start the run anew.
    less = {"accumulation_steps": 2, "grad_checkpointing": True}
    resumed = run(toy_world, tmp_path / "out", progress=lambda at: steps.append(at.step), **less)
    assert steps == [3, 4, 5, 6]
    straight = run(toy_world, tmp_path / "straight")
    losses = [[row["loss"] for row in some.history] for some in (resumed, straight)]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)


def test_other_errors_of_pytorch_are_not_taken_for_a_lack_of_memory(toy_world, tmp_path):
    def fail(*_):
        torch.zeros(2) @ torch.zeros(3)

    hook = register_module_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="size"):
            run(toy_world, tmp_path)
    finally:
        hook.remove()


def test_a_corrupt_shard_stops_with_advice_and_the_run_goes_on_once_it_is_restored(toy_world, tmp_path):
    root = UPath(tmp_path / "storage")
    shutil.copytree(toy_world.root, root)
    shard = root / "chips" / "chips-00000.tar"
    whole = shard.read_bytes()
    rows = pq.read_table(str(toy_world.folder / "training_set.parquet")).to_pylist()

    def damage(progress):
        if progress.step == 3:
            rotten = bytearray(whole)
            for row in rows:
                rotten[row["chip_offset"] + row["chip_size_bytes"] // 2] ^= 0x10
            shard.write_bytes(rotten)

    def attempt(progress):
        config = config_of(toy_world, chip_memory_gb=0.0)
        return train(config, toy_world.folder, root, UPath(tmp_path / "out"), progress)

    with pytest.raises(
        DataError, match=r"Chip toy-\d+, at byte \d+ of chips/chips-00000.tar: .* materialise"
    ):
        attempt(damage)
    assert last_step(tmp_path / "out") in (2, 4)
    shard.write_bytes(whole)
    resumed = attempt(None)
    straight = run(toy_world, tmp_path / "straight")
    assert resumed.history == straight.history
    assert resumed.model_id == straight.model_id


def test_a_broken_gradient_stops_before_it_reaches_the_weights(toy_world, tmp_path):
    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, features):
            return features.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.inf

    def broken(module, _, output):
        return Break.apply(output) if isinstance(module, torch.nn.LayerNorm) else output

    hooks = []

    def break_it(progress):
        if progress.step == 3:
            hooks.append(register_module_forward_hook(broken))

    try:
        with pytest.raises(TrainingError, match="gradient of step 3"):
            run(toy_world, tmp_path, progress=break_it)
    finally:
        hooks[0].remove()
    assert last_step(tmp_path) == 2


def test_what_a_run_tells_of_its_pace(toy_world, tmp_path):
    result = run(toy_world, tmp_path)
    assert result.steps == 6
    assert result.tiles_per_second > 0
    assert 0 <= result.waiting_share <= 1


def test_embeddings_of_another_model_are_refused(toy_world, tmp_path):
    other = tmp_path / "snapshot=other"
    other.mkdir()
    (other / "training_set.parquet").write_bytes((toy_world.folder / "training_set.parquet").read_bytes())
    np.save(other / "ground_embeddings.npy", np.zeros((500, 7), np.float32))
    with pytest.raises(DataError, match="7 dimensions"):
        train(config_of(toy_world), UPath(other), toy_world.root, UPath(tmp_path / "out"))
    # As wide, but another: f_S would be in the space of one model and f_T in that of the other.
    retrained = load_clip(toy_world.architecture)
    torch.nn.init.normal_(retrained.model.visual.proj)
    folder = save_encoder(UPath(tmp_path / "retrained"), retrained)
    with pytest.raises(DataError, match=r"embedded by model \w{16}, retrained is .* materialise"):
        run(toy_world, tmp_path / "out", architecture=f"local-dir:{folder}")


def test_the_feature_at_a_pixel_is_that_of_its_patch():
    patches = torch.arange(2 * 4 * 4).reshape(2, 4, 4, 1)
    position = np.array([[0.0, 0.0], [7.99, 8.0], [31.9, 31.9], [8.0, 24.5]])
    values = at_pixels(patches, position, np.array([0, 0, 0, 1]), 32)
    assert values[:, 0].tolist() == [0, 4, 15, 16 + 3 * 4 + 1]


def test_recall_by_hand():
    photos = torch.eye(4)
    queries = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.0, 0.9, 0.8, 0.1]])
    # The first tile owns photo 1 (second nearest), the second photos 2 and 3 (second and third nearest).
    recalls = recall(queries, photos, np.array([0, 1]), np.array([9, 0, 1, 1]), np.arange(4), (1, 2, 10))
    assert recalls == [0.0, 1.0, 1.0]


def test_a_photo_under_two_tiles_is_found_by_both():
    # Photo 7 lies under both tiles, photo 3 under the second: each tile's nearest photo is its own.
    photos, identity = torch.eye(2)[[0, 0, 1]], np.array([7, 7, 3])
    queries = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]])
    assert recall(queries, photos, np.array([0, 1, 0]), np.array([0, 1, 1]), identity, (1, 2)) == [2 / 3, 1.0]


def test_configurations_and_devices_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="steps, temperature"):
        TrainConfig(level="image", steps=0, temperature=0)
    with pytest.raises(InputError, match="grad_clip of a TrainConfig must be positive"):
        TrainConfig(level="image", grad_clip=0)
    with pytest.raises(InputError, match="validation_tiles, seed of a TrainConfig must not be negative"):
        TrainConfig(level="image", seed=-1, validation_tiles=-1)
    with pytest.raises(InputError, match="betas"):
        TrainConfig(level="image", betas=(0.9, 1.0))
    with pytest.raises(InputError, match="precision of a TrainConfig must be one of fp32, bf16"):
        TrainConfig(level="image", precision="fp8")
    with pytest.raises(InputError, match="not known"):
        resolve_device("abacus")
    assert resolve_device("cpu").type == "cpu"


def test_the_schedule_warms_up_and_ends_near_zero(toy_world, tmp_path):
    rates = []
    run(
        toy_world,
        tmp_path,
        progress=lambda at: rates.append(at.learning_rate),
        steps=20,
        warmup_steps=4,
        validate_every=20,
    )
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert rates[4:] == pytest.approx(expected)


def test_a_config_is_frozen(toy_world):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_of(toy_world).steps = 3

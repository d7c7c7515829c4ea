import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from upath import UPath

from graft_pipeline.errors import GraftError, InputError
from training.encoders import load_clip
from training.foundation import FoundationConfig, clip_loss, square_images, train_foundation

TINY = FoundationConfig(
    image_px=16, width=32, head_width=16, vision_layers=1, text_layers=1, context=12, steps=3, batch_size=32
)


def test_it_learns_the_captions(toy_world, toy_captions):
    images, captions = toy_captions
    model, _, preprocess = open_clip.create_model_and_transforms(toy_world.architecture)
    tokenize = open_clip.get_tokenizer(toy_world.architecture)
    names = sorted(set(captions))
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.fromarray(image)) for image in images])
        image = F.normalize(model.eval().encode_image(pixels), dim=1)
        text = F.normalize(model.encode_text(tokenize(names)), dim=1)
    right = [names[i] == caption for i, caption in zip((image @ text.T).argmax(dim=1), captions, strict=True)]
    assert np.mean(right) > 0.95


def test_the_folder_loads_as_what_was_trained(tmp_path, toy_captions):
    told = []
    result = train_foundation(
        *toy_captions,
        UPath(tmp_path / "model"),
        TINY,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert len(result.losses) == 3
    assert load_clip(f"local-dir:{tmp_path / 'model'}").fingerprint() == result.model_id
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]


def test_the_same_seed_gives_the_same_model_and_leaves_global_randomness_alone(tmp_path, toy_captions):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = train_foundation(*toy_captions, UPath(tmp_path / "a"), TINY)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    second = train_foundation(*toy_captions, UPath(tmp_path / "b"), TINY)
    other = train_foundation(
        *toy_captions, UPath(tmp_path / "c"), FoundationConfig(**(TINY.__dict__ | {"seed": 1}))
    )
    assert first.model_id == second.model_id != other.model_id


def test_an_older_model_is_replaced(tmp_path, toy_captions):
    folder = UPath(tmp_path / "model")
    folder.mkdir()
    (folder / "stale.txt").write_text("old")
    train_foundation(*toy_captions, folder, TINY)
    assert not (folder / "stale.txt").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_the_loss_is_open_clips():
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(6, 8, generator=generator), dim=1) for _ in range(2))
    scale = torch.tensor(2.0)
    expected = open_clip.ClipLoss()(image, text, scale.exp())
    torch.testing.assert_close(clip_loss(image, text, scale), expected)


def test_squares_are_central():
    image = np.zeros((10, 20, 3), dtype=np.uint8)
    image[:, 5:15] = 255
    assert square_images([image], 10).min() == 255
    assert square_images([image], 5).shape == (1, 5, 5, 3)


def test_too_few_captions_are_refused(tmp_path, toy_captions):
    images, captions = toy_captions
    with pytest.raises(InputError, match="one caption per image"):
        train_foundation(images[:-1], captions, UPath(tmp_path), TINY)
    with pytest.raises(InputError, match="at least 32"):
        train_foundation(images[:5], captions[:5], UPath(tmp_path), TINY)


def test_a_broken_loss_stops(tmp_path, toy_captions):
    config = FoundationConfig(**(TINY.__dict__ | {"learning_rate": float("inf"), "warmup_steps": 0}))
    with pytest.raises(GraftError, match="loss of step 1"):
        train_foundation(*toy_captions, UPath(tmp_path / "model"), config)
    assert not (tmp_path / "model").exists()

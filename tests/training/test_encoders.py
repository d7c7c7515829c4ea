import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from graft_pipeline.errors import InputError, SettingsError
from resources.foundation import FoundationModel
from training.encoders import (
    Clip,
    encode_images,
    encode_patches,
    encode_texts,
    load_clip,
    patch_features,
    position_embedding,
    reduce_chips,
    to_input,
)
from training.foundation import FoundationConfig, new_clip

SMALL = FoundationConfig(image_px=32, width=32, head_width=16, vision_layers=2, text_layers=1, context=16)


@pytest.fixture(scope="module")
def clip():
    return new_clip(SMALL)


def chips(count, side_px=448, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side_px, side_px, 3), dtype=np.uint8)


def test_images_are_the_tower_on_the_central_crop(clip):
    image = chips(2)
    crop = reduce_chips(np.ascontiguousarray(image[:, 112:336, 112:336]), 32)
    with torch.no_grad():
        pixels = to_input(clip, torch.from_numpy(crop).permute(0, 3, 1, 2).float())
        expected = torch.nn.functional.normalize(clip.model.encode_image(pixels), dim=1).numpy()
    embedded = encode_images(clip, image)
    np.testing.assert_allclose(embedded, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(encode_images(clip, image, batch_size=1), embedded, atol=1e-5)
    # A crop as it comes, without margin, is the same image.
    np.testing.assert_allclose(encode_images(clip, image[:, 112:336, 112:336]), embedded, atol=1e-6)


def test_patches_are_the_projected_tokens_of_open_clips_own_tower(clip):
    tower = clip.model.visual
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = patch_features(tower, pixels)
        tower.output_tokens = True
        _, tokens = tower(pixels)
        tower.output_tokens = False
        expected = torch.nn.functional.normalize(tokens @ tower.proj, dim=-1).reshape(2, 4, 4, 32)
    torch.testing.assert_close(ours, expected)
    assert encode_patches(clip, chips(3)).shape == (3, 4, 4, 32)


def test_rows_of_patches_run_north_to_south_and_columns_west_to_east(clip):
    # With the last block's mixing undone by a tower without blocks, a patch feature is its own pixels' only.
    tower = new_clip(SMALL).model.visual
    tower.transformer.resblocks = torch.nn.ModuleList([torch.nn.Identity()])
    tower.transformer.forward_intermediates = lambda x, **_: (x, [x])
    with torch.no_grad():
        plain = torch.zeros(1, 3, 32, 32)
        changed = plain.clone()
        changed[:, :, 8:16, 24:32] = 1.0
        difference = (patch_features(tower, changed) - patch_features(tower, plain)).abs().sum(dim=-1)[0]
    assert np.argwhere(difference.numpy() > 1e-6).tolist() == [[1, 3]]


def test_larger_crops_at_the_same_resolution(clip):
    image = chips(1)
    assert encode_patches(clip, image, crop_px=448).shape == (1, 8, 8, 32)
    with pytest.raises(InputError, match="no whole number"):
        encode_patches(clip, image, crop_px=225)
    with pytest.raises(InputError, match="not a multiple"):
        encode_patches(clip, image, crop_px=231)


def test_position_embeddings_are_interpolated_as_open_clip_does(clip):
    model = open_clip.CLIP(
        **(SMALL.model_config() | {"vision_cfg": SMALL.model_config()["vision_cfg"] | {"image_size": 64}})
    )
    state = {key: value.clone() for key, value in clip.model.state_dict().items()}
    open_clip.model.resize_pos_embed(state, model)
    ours = position_embedding(clip.model.visual, 64, 64)
    torch.testing.assert_close(ours, state["visual.positional_embedding"])
    # The same tower, built for that size.
    model.load_state_dict(state)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            patch_features(clip.model.visual, pixels), patch_features(model.visual, pixels)
        )


def test_patches_of_any_size_train_the_towers_own_positions(clip):
    tower = clip.model.visual
    pixels = torch.randn(1, 3, 48, 24, generator=torch.Generator().manual_seed(0))
    features = patch_features(tower, pixels)
    assert features.shape == (1, 6, 3, 32)
    (gradient,) = torch.autograd.grad(features[..., 0].sum(), tower.positional_embedding)
    assert (gradient[1:].abs().sum(dim=1) > 0).all()
    with pytest.raises(InputError, match="30 x 32 px is not a multiple"):
        patch_features(tower, pixels.new_zeros(1, 3, 30, 32))


def test_towers_without_projected_patch_tokens_are_refused():
    model = open_clip.create_model("RN50", precision="fp32")
    with pytest.raises(InputError, match="pixel level needs"):
        patch_features(model.visual, torch.zeros(1, 3, 224, 224))


def test_texts_are_unit_vectors(clip):
    embedded = encode_texts(clip, ["a lake", "a forest", "a lake"], batch_size=2)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(embedded[0], embedded[2], atol=1e-6)
    assert encode_texts(clip, []).shape == (0, 32)
    assert encode_images(clip, chips(0)).shape == (0, 32)
    assert encode_patches(clip, chips(0)).shape == (0, 4, 4, 32)


def test_reducing_averages_areas():
    image = np.zeros((1, 448, 448, 3), dtype=np.uint8)
    image[0, ::2] = 200
    # Stripes of one pixel would alias to 0 or 200 if pixels were picked.
    np.testing.assert_allclose(reduce_chips(image, 64), 100, atol=15)
    assert reduce_chips(image, 448) is not image
    np.testing.assert_array_equal(reduce_chips(image, 448), image)
    with pytest.raises(InputError, match="uint8"):
        reduce_chips(image.astype(np.float32), 64)
    with pytest.raises(InputError, match="at least 224"):
        encode_images(new_clip(SMALL), chips(1, 100))


def test_fingerprints_follow_content(clip):
    assert clip.fingerprint() == new_clip(SMALL).fingerprint()
    other = new_clip(SMALL)
    with torch.no_grad():
        other.model.visual.proj[0, 0] += 1e-3
    assert other.fingerprint() != clip.fingerprint()
    preprocess = clip.preprocess_config | {"mean": [0.5, 0.5, 0.5]}
    shown_otherwise = Clip(clip.model, clip.tokenize, clip.model_config, preprocess, "x")
    assert shown_otherwise.fingerprint() != clip.fingerprint()


def test_a_checkpoint_file_of_a_known_architecture(tmp_path, monkeypatch):
    # A small variant under a name of its own, as ViT-B-16 has; open_clip finds it among its model configs.
    (tmp_path / "small-vit.json").write_text(json.dumps(SMALL.model_config()))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    open_clip.add_model_config(tmp_path / "small-vit.json")
    clip = new_clip(SMALL)
    save_file(clip.model.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_clip("small-vit", str(tmp_path / "weights.safetensors"))
    np.testing.assert_allclose(encode_images(loaded, chips(2)), encode_images(clip, chips(2)), atol=1e-6)
    assert loaded.name == "small-vit/weights.safetensors"
    assert loaded.image_px == 32


@pytest.mark.parametrize(
    ("architecture", "pretrained", "problem"),
    [
        ("ViT-B-16", None, "needs weights"),
        ("ViT-B-16", "no-such-tag", "Cannot load ViT-B-16"),
        ("no-such-architecture", "openai", "Cannot load no-such-architecture"),
        ("local-dir:no/such/folder", None, "Cannot load local-dir"),
    ],
)
def test_models_that_cannot_be_had_say_so(architecture, pretrained, problem):
    with pytest.raises(SettingsError, match=problem):
        load_clip(architecture, pretrained)


def test_quick_gelu_follows_the_pretrained_tag(tmp_path, monkeypatch):
    # OpenAI's weights want QuickGELU, but the architecture ViT-B-16 has plain GELU and open_clip only warns.
    built = {}

    def download(config, **_):
        built.update(config)
        path = tmp_path / "weights.safetensors"
        save_file(open_clip.CLIP(**SMALL.model_config()).state_dict(), path)
        return str(path)

    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    monkeypatch.setattr(
        open_clip.factory,
        "_MODEL_CONFIGS",
        open_clip.factory._MODEL_CONFIGS | {"ViT-B-16": SMALL.model_config()},
    )
    clip = load_clip("ViT-B-16", "openai")
    assert built["quick_gelu"]
    assert clip.model_config["quick_gelu"]
    assert isinstance(clip.model.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)


def test_a_file_of_weights_needs_the_architecture_that_says_quickgelu(tmp_path, monkeypatch, caplog):
    small = SMALL.model_config()
    known = {"ViT-B-16": small, "ViT-B-16-quickgelu": small | {"quick_gelu": True}}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", open_clip.factory._MODEL_CONFIGS | known)
    file = tmp_path / "ViT-B-16.safetensors"
    save_file(open_clip.CLIP(**small).state_dict(), file)
    load_clip("ViT-B-16-quickgelu", str(file))
    FoundationModel("ViT-B-16-quickgelu", str(file), device="cpu").model_id  # noqa: B018 -- loads it
    assert "plain GELU" not in caplog.text
    for load in (load_clip, lambda *named: FoundationModel(*named, device="cpu").model_id):
        caplog.clear()
        load("ViT-B-16", str(file))
        assert "plain GELU: name ViT-B-16-quickgelu if" in caplog.text
        with pytest.raises(SettingsError, match="OpenAI's weights name ViT-B-16-quickgelu"):
            load("ViT-B-16", str(tmp_path / "missing.pt"))

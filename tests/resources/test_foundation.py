import io

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from upath import UPath

from graft_pipeline.errors import DataError, SettingsError
from resources.foundation import FoundationModel, prepared_batches
from training.export import save_encoder
from training.foundation import FoundationConfig, new_clip

SMALL = FoundationConfig(image_px=32, width=32, head_width=16, vision_layers=1, text_layers=1, context=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_encoder(UPath(tmp_path_factory.mktemp("models") / "foundation"), new_clip(SMALL))


@pytest.fixture(scope="module")
def model(folder):
    return FoundationModel.from_folder(folder, device="cpu", batch_size=4, decode_threads=2)


def photos(count, seed=0):
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (40, 50 + i, 3), dtype=np.uint8)) for i in range(count)]


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_embeddings_are_open_clips_own(model, folder):
    reference, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    images = photos(10)
    with torch.no_grad():
        expected = reference.encode_image(
            torch.stack([preprocess(image) for image in images]), normalize=True
        )
        texts = reference.encode_text(tokenize(["a lake", "a forest"]), normalize=True)
    embedded = model.embed_images(images)
    assert embedded.dtype == np.float32
    np.testing.assert_allclose(embedded, expected, atol=1e-5)
    np.testing.assert_allclose(model.embed_texts(["a lake", "a forest"]), texts, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-5)
    assert model.width == 32
    assert model.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)


def test_encoded_bytes_and_opened_images_are_the_same_photos(model):
    images = photos(6)
    np.testing.assert_allclose(
        model.embed_images([encoded(image) for image in images]), model.embed_images(images)
    )
    # Any mode that a JPEG comes in.
    grey = images[0].convert("L")
    np.testing.assert_allclose(
        model.embed_images([encoded(grey, "JPEG")]),
        model.embed_images([Image.open(io.BytesIO(encoded(grey, "JPEG"))).convert("RGB")]),
    )


def test_nothing_in_nothing_out(model):
    assert model.embed_images([]).shape == (0, 32)
    assert model.embed_texts([]).shape == (0, 32)


def test_a_broken_image_is_a_data_error(model):
    with pytest.raises(DataError, match="cannot be decoded"):
        model.embed_images([encoded(photos(1)[0])[:60]])
    with pytest.raises(DataError, match="cannot be decoded"):
        model.embed_images([b"<html>not found</html>"])


def test_the_id_follows_the_weights_not_the_place(model, folder, tmp_path):
    copy = save_encoder(UPath(tmp_path / "elsewhere"), new_clip(SMALL))
    assert FoundationModel.from_folder(copy, device="cpu").model_id == model.model_id
    # The trainer calls the same model by the same id.
    assert new_clip(SMALL).fingerprint() == model.model_id
    other = save_encoder(
        UPath(tmp_path / "other"), new_clip(FoundationConfig(**(SMALL.__dict__ | {"seed": 1})))
    )
    assert FoundationModel.from_folder(other, device="cpu").model_id != model.model_id


def test_a_model_on_an_object_store(model):
    remote = save_encoder(UPath("memory://foundation/model"), new_clip(SMALL))
    stored = FoundationModel.from_folder(remote, device="cpu")
    assert stored.model_id == model.model_id
    assert stored.name == "model"


def test_a_checkpoint_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        open_clip.factory,
        "_MODEL_CONFIGS",
        open_clip.factory._MODEL_CONFIGS | {"small-vit": SMALL.model_config()},
    )
    clip = new_clip(SMALL)
    save_file(clip.model.state_dict(), tmp_path / "weights.safetensors")
    model = FoundationModel("small-vit", str(tmp_path / "weights.safetensors"), device="cpu")
    assert model.name == "small-vit/weights.safetensors"
    assert model.embed_images(photos(2)).shape == (2, 32)


def test_nothing_is_loaded_before_it_is_needed(tmp_path):
    model = FoundationModel.from_folder(UPath(tmp_path / "not-there-yet"), device="cpu")
    save_encoder(UPath(tmp_path / "not-there-yet"), new_clip(SMALL))
    assert model.embed_texts(["a lake"]).shape == (1, 32)


@pytest.mark.parametrize(
    ("architecture", "pretrained", "problem"),
    [
        ("ViT-B-16", None, "GRAFT_FOUNDATION_PRETRAINED"),
        ("ViT-B-16", "no-such-tag", "cannot be loaded"),
        ("no-such-architecture", "openai", "cannot be loaded"),
        ("local-dir:no/such/folder", None, "cannot be loaded"),
    ],
)
def test_weights_that_cannot_be_had_are_a_settings_error(architecture, pretrained, problem):
    with pytest.raises(SettingsError, match=problem):
        _ = FoundationModel(architecture, pretrained, device="cpu").model_id


def test_half_a_folder_is_a_settings_error(folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    with pytest.raises(SettingsError, match="cannot be loaded"):
        _ = FoundationModel.from_folder(UPath(tmp_path), device="cpu").model_id
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"half a file")
    with pytest.raises(SettingsError, match="cannot be loaded"):
        _ = FoundationModel.from_folder(UPath(tmp_path), device="cpu").model_id


def test_quick_gelu_follows_the_pretrained_tag(tmp_path, monkeypatch):
    # OpenAI's weights want QuickGELU, but the architecture ViT-B-16 has plain GELU and open_clip only warns.
    weights = tmp_path / "weights.safetensors"
    save_file(new_clip(SMALL).model.state_dict(), weights)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(weights))
    monkeypatch.setattr(
        open_clip.factory,
        "_MODEL_CONFIGS",
        open_clip.factory._MODEL_CONFIGS | {"ViT-B-16": SMALL.model_config()},
    )
    quick = FoundationModel("ViT-B-16", "openai", device="cpu").embed_images(photos(1))
    plain = FoundationModel("ViT-B-16", str(weights), device="cpu").embed_images(photos(1))
    assert np.abs(quick - plain).max() > 1e-4


def test_batches_keep_order_and_read_one_ahead():
    taken = []

    def images():
        for number in range(7):
            taken.append(number)
            yield Image.new("RGB", (1, 1), (number, 0, 0))

    batches = prepared_batches(images(), lambda image: image.getpixel((0, 0))[0], batch_size=2, threads=3)
    assert next(batches) == [0, 1]
    assert taken == [0, 1, 2, 3]
    assert [number for batch in batches for number in batch] == [2, 3, 4, 5, 6]


def test_an_embedding_does_not_depend_on_what_is_embedded_with_it(folder):
    model = FoundationModel.from_folder(folder, device="cpu", batch_size=8)
    images = photos(13, seed=3)
    together = model.embed_images(images)
    for number, image in enumerate(images):
        np.testing.assert_array_equal(model.embed_images([image])[0], together[number])

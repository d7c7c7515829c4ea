import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import ResNet18_Weights, resnet18
from upath import UPath

from graft_pipeline.errors import DataError, InputError, SettingsError
from graft_pipeline.scene_header import SceneHeader
from resources.foundation import FoundationModel
from resources.scene_classifier import SceneClassifier
from training.export import save_encoder
from training.foundation import FoundationConfig, new_clip

SMALL = FoundationConfig(image_px=32, width=32, head_width=16, vision_layers=1, text_layers=1, context=16)


@pytest.fixture(scope="module")
def foundation(tmp_path_factory):
    return FoundationModel.from_folder(
        save_encoder(UPath(tmp_path_factory.mktemp("m") / "f"), new_clip(SMALL))
    )


def photos(count):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (300, 260, 3), dtype=np.uint8)) for _ in range(count)]


def prompt_file(folder, indoor, outdoor):
    path = folder / "prompts.json"
    path.write_text(json.dumps({"indoor": indoor, "outdoor": outdoor}))
    return path


# --- zero-shot ---


def test_scores_are_the_outdoor_share_of_the_softmax(foundation, tmp_path):
    indoor, outdoor = ["a kitchen"], ["a lake", "a forest"]
    classifier = SceneClassifier.zero_shot(foundation, prompt_file(tmp_path, indoor, outdoor))
    assert not classifier.needs_images
    embeddings = foundation.embed_images(photos(5))
    logits = foundation.logit_scale * embeddings @ foundation.embed_texts(indoor + outdoor).T
    expected = torch.from_numpy(logits).softmax(dim=1)[:, 1:].sum(dim=1)
    scores = classifier.score(embeddings)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(classifier.score_images(photos(5)), scores, atol=1e-5)
    own = classifier.score(foundation.embed_texts(["a kitchen", "a lake"]))
    assert own[0] < 0.5 < own[1]
    assert classifier.score(embeddings[:0]).shape == (0,)


def test_the_prompts_that_come_with_it(foundation):
    scores = SceneClassifier.zero_shot(foundation).score(foundation.embed_images(photos(3)))
    assert ((scores >= 0) & (scores <= 1)).all()


def test_its_id_follows_prompts_and_model(foundation, tmp_path):
    first = SceneClassifier.zero_shot(foundation, prompt_file(tmp_path, ["a"], ["b"])).classifier_id
    assert SceneClassifier.zero_shot(foundation, prompt_file(tmp_path, ["a"], ["b"])).classifier_id == first
    assert SceneClassifier.zero_shot(foundation, prompt_file(tmp_path, ["b"], ["a"])).classifier_id != first


@pytest.mark.parametrize("content", ["{", "{}", '{"indoor": [], "outdoor": ["a"]}'])
def test_malformed_prompts_are_refused(foundation, tmp_path, content):
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(SettingsError, match="prompt"):
        SceneClassifier.zero_shot(foundation, tmp_path / "prompts.json")


def test_embeddings_of_another_model_are_refused(foundation):
    with pytest.raises(InputError, match="not 32 wide"):
        SceneClassifier.zero_shot(foundation).score(np.zeros((2, 512), np.float32))


# --- ResNet-18 checkpoint ---


def checkpoint(folder, classes, metadata=None):
    torch.manual_seed(0)
    model = resnet18(weights=None, num_classes=classes).eval()
    save_file(model.state_dict(), folder / "scene.safetensors", metadata)
    return model, folder / "scene.safetensors"


def test_two_classes_are_indoor_and_outdoor(tmp_path):
    model, path = checkpoint(tmp_path, 2)
    classifier = SceneClassifier.checkpoint(path, device="cpu")
    assert classifier.needs_images
    images = photos(3)
    preprocess = ResNet18_Weights.IMAGENET1K_V1.transforms()
    with torch.no_grad():
        expected = model(torch.stack([preprocess(image) for image in images])).softmax(dim=1)[:, 1]
    np.testing.assert_allclose(classifier.score_images(images), expected, atol=1e-5)
    buffer = io.BytesIO()
    images[0].save(buffer, "PNG")
    np.testing.assert_allclose(classifier.score_images([buffer.getvalue()])[0], expected[0], atol=1e-5)
    assert classifier.score_images([]).shape == (0,)


def test_images_are_prepared_as_the_file_says(tmp_path):
    header = SceneHeader(("outdoor", "indoor"), (0,), 40, 32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    model, path = checkpoint(tmp_path, 2, header.to_metadata())
    preprocess = ResNet18_Weights.IMAGENET1K_V1.transforms(
        crop_size=32, resize_size=40, mean=header.mean, std=header.std
    )
    images = photos(3)
    with torch.no_grad():
        expected = model(torch.stack([preprocess(image) for image in images])).softmax(dim=1)[:, 0]
    classifier = SceneClassifier.checkpoint(path, device="cpu")
    np.testing.assert_allclose(classifier.score_images(images), expected, atol=1e-5)
    plain = SceneClassifier.checkpoint(checkpoint(tmp_path, 2)[1], device="cpu")
    assert plain.classifier_id != classifier.classifier_id


def test_a_photos_score_does_not_depend_on_the_photos_beside_it(foundation, tmp_path):
    header = SceneHeader(("indoor", "outdoor"), (1,), 32, 32)
    pixels = SceneClassifier.checkpoint(checkpoint(tmp_path, 2, header.to_metadata())[1], device="cpu")
    images = photos(70)
    scores = pixels.score_images(images)
    embeddings = foundation.embed_images(images)
    zero_shot = SceneClassifier.zero_shot(foundation)
    for some in (slice(3, 4), slice(11, 40), slice(60, 70)):
        np.testing.assert_array_equal(pixels.score_images(images[some]), scores[some])
        np.testing.assert_array_equal(zero_shot.score(embeddings[some]), zero_shot.score(embeddings)[some])


def test_a_checkpoint_on_an_object_store(tmp_path):
    _, path = checkpoint(tmp_path, 2)
    remote = UPath("memory://scenes/scene.safetensors")
    remote.write_bytes(path.read_bytes())
    here, there = (SceneClassifier.checkpoint(where, device="cpu") for where in (path, remote))
    assert here.classifier_id == there.classifier_id


def test_many_classes_say_which_are_outdoors(tmp_path):
    model, path = checkpoint(tmp_path, 397, {"outdoor_classes": json.dumps([3, 5, 396])})
    classifier = SceneClassifier.checkpoint(path, device="cpu")
    with torch.no_grad():
        pixels = ResNet18_Weights.IMAGENET1K_V1.transforms()(photos(1)[0])[None]
        expected = model(pixels).softmax(dim=1)[0, [3, 5, 396]].sum()
    np.testing.assert_allclose(classifier.score_images(photos(1))[0], expected, atol=1e-6)
    other = SceneClassifier.checkpoint(
        checkpoint(tmp_path, 397, {"outdoor_classes": "[3]"})[1], device="cpu"
    ).classifier_id
    assert classifier.classifier_id != other


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"outdoor_classes": "[]"},
        {"outdoor_classes": "[397]"},
        {"outdoor_classes": "x"},
        {"outdoor_classes": "5"},
        {"scene_classifier": '{"outdoor_classes": [1], "classes": ["a", "b"]}'},
        {"scene_classifier": '{"outdoor_classes": [1], "crop_px": 0}'},
        {"scene_classifier": '{"outdoor_classes": [1], "colour": "red"}'},
    ],
)
def test_many_classes_without_a_mapping_are_refused(tmp_path, metadata):
    _, path = checkpoint(tmp_path, 397, metadata)
    with pytest.raises(SettingsError):
        _ = SceneClassifier.checkpoint(path, device="cpu").classifier_id


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "scene.safetensors").write_bytes(b"not weights")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name in ("scene", "other", "absent"):
        with pytest.raises(SettingsError, match="no ResNet-18 checkpoint"):
            SceneClassifier.checkpoint(tmp_path / f"{name}.safetensors", device="cpu").score_images(photos(1))
    with pytest.raises(SettingsError, match="GRAFT_SCENE_CHECKPOINT"):
        SceneClassifier.checkpoint(None)


def test_it_refuses_embeddings_and_broken_images(tmp_path):
    classifier = SceneClassifier.checkpoint(checkpoint(tmp_path, 2)[1], device="cpu")
    with pytest.raises(InputError, match="scores images"):
        classifier.score(np.zeros((1, 32), np.float32))
    with pytest.raises(DataError, match="cannot be decoded"):
        classifier.score_images([b"not an image"])

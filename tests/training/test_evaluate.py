"""Scores of image sets, against plain loops over the definitions; images are the planet's, in published formats."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
from PIL import Image
from scipy.io import savemat

from graft_pipeline.errors import InputError, SettingsError
from graft_pipeline.geometry import Grid, Projection
from resources.foundation import FoundationModel
from resources.planet.world import World
from training.encoders import load_clip
from training.foundation import FoundationConfig, new_clip
from training.zero_shot.benchmarks import foundation_spec
from training.zero_shot.classify import class_embeddings
from training.zero_shot.contenders import Contender, open_contender
from training.zero_shot.datasets import EUROSAT_CLASSES, ImageSet, open_image_set
from training.zero_shot.evaluate import evaluate_images
from training.zero_shot.prompts import PromptSet, load_prompts

CLIP = FoundationConfig(image_px=32, width=32, head_width=16, vision_layers=1, text_layers=1, context=24)


@pytest.fixture(scope="module")
def contender():
    return Contender.of_clip("small", new_clip(CLIP))


@pytest.fixture(scope="module")
def pictures():
    """60 places of the planet, (60, 120, 120, 3) uint8."""
    world, random = World(0), np.random.default_rng(0)
    made = []
    for lon, lat in zip(random.uniform(-70.5, -70, 60), random.uniform(42, 42.5, 60), strict=True):
        x, y = Projection(32619).forward(np.array([lon]), np.array([lat]))
        grid = Grid.snapped(32619, float(x[0]), float(y[0]), 1.0, 120)
        made.append(world.render_naip(grid, 2021, 5)[:3].transpose(1, 2, 0))
    return np.stack(made)


# --- the formats ---


def as_eurosat(root, pictures):
    for number, picture in enumerate(pictures):
        name = EUROSAT_CLASSES[number % 10]
        (root / "2750" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[:64, :64]).save(root / "2750" / name / f"{name}_{number}.jpg", quality=95)
    (root / "2750" / "River" / "River_999.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    return root


def as_bigearthnet(root, pictures):
    names, random, rows = load_prompts("bigearthnet").names, np.random.default_rng(1), []
    for number, picture in enumerate(pictures):
        patch = f"S2A_T33UUP_{number:02d}_10"
        folder = root / "BigEarthNet-S2" / "S2A_T33UUP" / patch
        folder.mkdir(parents=True)
        for band, values in zip(("B04", "B03", "B02"), np.moveaxis(picture, -1, 0), strict=True):
            with rasterio.open(
                folder / f"{patch}_{band}.tif", "w", driver="GTiff", width=120, height=120, count=1, dtype="uint16",
                crs="EPSG:32633", transform=rasterio.Affine(10, 0, 500_000, 0, -10, 4_700_000),
            ) as file:  # fmt: skip
                file.write(values.astype(np.uint16) * 10, 1)
        labels = sorted(random.choice(names, 1 + number % 3, replace=False).tolist())
        common = {"split": "test", "contains_seasonal_snow": False, "contains_cloud_or_shadow": False}
        rows.append({"patch_id": patch, "labels": labels, **common})
    pq.write_table(pa.Table.from_pylist(rows), root / "metadata.parquet")
    return root


def as_sat6(root, pictures):
    images = np.zeros((28, 28, 4, len(pictures)), np.uint8)
    images[:, :, :3] = pictures[:, :28, :28].transpose(1, 2, 3, 0)
    savemat(root / "sat-6-full.mat", {"test_x": images, "test_y": np.eye(6)[:, np.arange(len(pictures)) % 6]})
    return root


# --- the definitions, as loops ---


def precision_at_relevant(ranking, relevant):
    hits, precisions = 0, []
    for place, image in enumerate(ranking, start=1):
        if image in relevant:
            hits += 1
            precisions.append(hits / place)
    return precisions


def reference(scores, labels, *, is_multi_label):
    count, classes = scores.shape
    rankings = [sorted(range(count), key=lambda i, c=c: (-scores[i, c], i)) for c in range(classes)]
    relevants = [{i for i in range(count) if labels[i, c]} for c in range(classes)]
    cases = [(ranking, own) for ranking, own in zip(rankings, relevants, strict=True) if own]
    whole = float(np.mean([sum(precision_at_relevant(r, own)) / len(own) for r, own in cases]))
    values = {"retrieval mAP": whole}
    for k in (100, 20):
        each = [sum(precision_at_relevant(r[:k], own)) / min(k, len(own)) for r, own in cases]
        values[f"retrieval mAP@{k}"] = float(np.mean(each))
    if is_multi_label:
        return values | {"mAP": whole}
    right = [labels[i, max(range(classes), key=lambda c, i=i: (scores[i, c], -c))] for i in range(count)]
    return values | {"accuracy": float(np.mean(right))}


@pytest.mark.parametrize(
    ("name", "write"), [("eurosat", as_eurosat), ("bigearthnet", as_bigearthnet), ("sat6", as_sat6)]
)
def test_every_metric_is_its_definition(tmp_path, pictures, contender, name, write):
    images = open_image_set(name, write(tmp_path, pictures))
    prompts = load_prompts(name)
    made = evaluate_images([contender], images, prompts, draws=3, resamples=20, batch_size=7)
    readable = [n for n in range(len(images)) if images.ids[n] != "River_999"]
    assert made.images == len(readable) == 60
    assert made.skipped.get("image cannot be decoded", 0) == len(images) - 60
    vectors = contender.encode(np.stack([contender.prepare(images.read(n)) for n in readable]))
    labels = images.labels[readable]
    scores = vectors @ class_embeddings(prompts, contender.encode_texts).T
    expected = reference(scores, labels, is_multi_label=images.is_multi_label)
    measured = made.metrics["zero-shot"]["small"]
    assert {key: measure.value for key, measure in measured.items()} == pytest.approx(expected, abs=1e-6)
    assert all(m.low <= m.high for m in measured.values())
    present = np.flatnonzero(labels.any(axis=0))
    runs = []
    for draw in range(3):
        random = np.random.default_rng([0, draw])
        examples = [int(random.choice(np.flatnonzero(labels[:, n]))) for n in present]
        others = [n for n in range(60) if n not in examples and labels[n].any()]
        own = reference(
            vectors[others] @ vectors[examples].T,
            labels[others][:, present],
            is_multi_label=images.is_multi_label,
        )
        runs.append(own)
    for key, measure in made.metrics["one-shot"]["small"].items():
        column = [run[key] for run in runs]
        assert measure.value == pytest.approx(np.mean(column), abs=1e-6)
        assert measure.high - measure.low == pytest.approx(2 * np.std(column), abs=1e-6)


# --- what may go wrong ---


def small_set(labels, is_multi_label=False, classes=("a", "b", "c")):
    random = np.random.default_rng(5)
    pictures = random.integers(0, 256, (len(labels), 20, 24, 3), dtype=np.uint8)
    rows = np.array([[name in row for name in classes] for row in labels])
    return ImageSet(
        "small", classes, tuple(map(str, range(len(labels)))), rows, lambda n: pictures[n], is_multi_label
    )


def test_classes_without_words_are_left_out_and_counted(contender, caplog):
    prompts = PromptSet({"a": ("a",), "b": ("b",), "z": ("z",)}, ("{}",))
    made = evaluate_images([contender], small_set("abcabc"), prompts, draws=0, resamples=0)
    assert (made.classes, made.images) == (("a", "b"), 4)
    assert made.skipped == {"class without words": 2}
    assert "no class z" in caplog.text
    assert "one-shot" not in made.metrics


def test_prompts_of_another_set_are_refused(contender):
    with pytest.raises(InputError, match="its classes are a, b, c"):
        evaluate_images([contender], small_set("abc"), PromptSet({"z": ("z",)}, ("{}",)))
    with pytest.raises(InputError, match="names of their own"):
        evaluate_images([contender, contender], small_set("abc"), PromptSet({"a": ("a",)}, ("{}",)))


def test_a_perfect_model_scores_one_and_chance_scores_chance(toy_world, paint):
    names = ("red", "green", "blue", "yellow")
    labels = [names[n % 4] for n in range(40)]
    pictures = paint(labels, 24, np.random.default_rng(2))
    rows = np.array([[name == own for name in names] for own in labels])
    images = ImageSet("toy", names, tuple(map(str, range(40))), rows, lambda n: pictures[n], False)
    prompts = PromptSet({name: (name,) for name in names}, ("a photo of {}",))
    clip = Contender.of_clip("clip", load_clip(toy_world.architecture))
    made = evaluate_images([clip], images, prompts, resamples=50)
    of = made.metrics["zero-shot"]
    assert of["clip"]["accuracy"].value > 0.9
    assert of["chance"]["accuracy"].value == pytest.approx(0.25, abs=0.08)
    assert of["clip"]["accuracy"].low > of["chance"]["accuracy"].high
    assert made.metrics["one-shot"]["clip"]["accuracy"].value > 0.8
    assert all(labels[n] == "red" for n in made.best["clip"][0][:5])
    assert all(labels[n] == "blue" for n in made.worst["clip"][2])
    again = evaluate_images([clip], images, prompts, resamples=50, batch_size=9, threads=1)
    assert again.metrics == made.metrics


# --- contenders ---


def test_backbones_are_scored_from_examples_alone(tmp_path, pictures):
    import timm

    torch.manual_seed(0)
    backbone = timm.create_model("resnet10t", num_classes=0)
    # As SeCo and CACo are published: a Lightning checkpoint around MoCo's query encoder.
    wrapped = {f"encoder_q.{key}": value for key, value in backbone.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped | {"queue": torch.zeros(3)}}, tmp_path / "seco.ckpt")
    loaded = open_contender(f"SeCo=timm:resnet10t:{tmp_path / 'seco.ckpt'}")
    assert not loaded.has_text
    images = open_image_set("sat6", as_sat6(tmp_path, pictures[:24]))
    made = evaluate_images([loaded], images, load_prompts("sat6"), draws=2, resamples=0)
    assert set(made.metrics["zero-shot"]) == {"chance"}
    assert set(made.metrics["one-shot"]) == {"SeCo"}
    batch = np.stack([loaded.prepare(images.read(n)) for n in range(4)])
    expected = backbone.eval()(
        (torch.from_numpy(batch).permute(0, 3, 1, 2) / 255 - torch.tensor(loaded.mean).view(1, 3, 1, 1))
        / torch.tensor(loaded.std).view(1, 3, 1, 1)
    )
    expected = torch.nn.functional.normalize(expected, dim=1).detach().numpy()
    assert loaded.encode(batch) == pytest.approx(expected, abs=1e-5)


def test_torchvisions_backbones_lose_their_classifier(tmp_path):
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = get_model("resnet18", weights=None)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = open_contender(f"torchvision:resnet18:{tmp_path / 'weights.pth'}")
    assert loaded.encode(np.zeros((2, 224, 224, 3), np.uint8)).shape == (2, 512)


def test_seco_and_caco_are_loaded_as_published(tmp_path):
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = get_model("resnet18", weights=None)
    # Their MoCo keeps the encoder as a Sequential of a ResNet's children, without names.
    encoder = torch.nn.Sequential(*list(model.children())[:-1], torch.nn.Flatten()).eval()
    moco = {
        f"{side}.{key}": value
        for side in ("encoder_q", "encoder_k")
        for key, value in encoder.state_dict().items()
    }
    moco |= {"heads_q.0.0.weight": torch.zeros(128, 512), "queue": torch.zeros(3, 128, 8)}
    torch.save({"epoch": 3, "state_dict": moco}, tmp_path / "seco_resnet18_1m.ckpt")
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    for kind in ("torchvision", "timm"):
        loaded = open_contender(f"SeCo={kind}:resnet18:{tmp_path / 'seco_resnet18_1m.ckpt'}")
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (loaded.mean, loaded.std))
        expected = encoder((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std)
        expected = torch.nn.functional.normalize(expected, dim=1).detach().numpy()
        assert loaded.encode(images) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("architecture", "prefix", "head"),
    [
        ("swin_v2_t", "backbone.backbone.", "head"),
        ("resnet18", "backbone.resnet.", "fc"),
        ("resnet18", "backbone.backbone.resnet.", "fc"),
    ],
)
def test_satlas_is_loaded_as_published_and_sees_pixels_from_0_to_1(tmp_path, architecture, prefix, head):
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = get_model(architecture, weights=None)
    setattr(model, head, torch.nn.Identity())
    published = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    published |= {
        "fpn.layer_blocks.0.0.weight": torch.zeros(2, 2),
        "heads.0.layers.0.0.weight": torch.zeros(2, 2),
    }
    torch.save(published, tmp_path / "satlas.pth")
    loaded = open_contender(f"Satlas=torchvision:{architecture}:{tmp_path / 'satlas.pth'}")
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    expected = model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    expected = torch.nn.functional.normalize(expected, dim=1).detach().numpy()
    assert loaded.encode(images) == pytest.approx(expected, abs=1e-5)


def test_a_path_may_hold_what_ends_a_name(toy_world, tmp_path):
    folder = tmp_path / "sensor=naip" / "image_encoder" / "encoder"
    shutil.copytree(toy_world.foundation, folder)
    unnamed = open_contender(f"folder:{folder}")
    assert (unnamed.name, unnamed.image_px) == (f"folder:{folder}", 16)
    assert open_contender(f"ours=folder:{folder}").name == "ours"
    assert open_contender(f"seed=1=folder:{folder}").name == "seed=1"


def test_a_foundation_model_of_the_hub_is_a_contender(toy_world, tmp_path, monkeypatch):
    # The hub's own cache, as a download leaves it.
    cached = tmp_path / "models--owner--name"
    shutil.copytree(toy_world.foundation, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # GRAFT_FOUNDATION_PRETRAINED has a default, which a model of the hub has no use for.
    spec = foundation_spec(FoundationModel("hf-hub:owner/name", "openai"))
    loaded = open_contender(spec)
    assert (loaded.name, loaded.image_px) == ("foundation (CLIP)", 16)
    own = Contender.of_clip("own", load_clip(toy_world.architecture))
    assert np.array_equal(loaded.encode_texts(["red"]), own.encode_texts(["red"]))


def test_clips_are_loaded_from_folders_and_checkpoints(toy_world, tmp_path):
    folder = open_contender(f"ours=folder:{toy_world.foundation}")
    assert (folder.name, folder.image_px, folder.has_text) == ("ours", 16, True)
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "RemoteCLIP.pt")
    loaded = open_contender(f"RemoteCLIP=open_clip:ViT-S-32-alt:{tmp_path / 'RemoteCLIP.pt'}")
    assert loaded.encode_texts(["a lake"]).shape == (1, 256)


def test_contenders_that_cannot_be_had(tmp_path):
    for spec in ("ours", "x=folder", "x=keras:resnet", "x=timm:"):
        with pytest.raises(InputError, match="write NAME=folder:PATH"):
            open_contender(spec)
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(SettingsError, match="download it again"):
        open_contender(f"x=timm:resnet10t:{tmp_path / 'cut.pth'}")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(SettingsError, match="lacks"):
        open_contender(f"x=timm:resnet10t:{tmp_path / 'other.pth'}")
    with pytest.raises(SettingsError, match="timm has no"):
        open_contender(f"x=timm:no_such_net:{tmp_path / 'other.pth'}")
    torch.save({"state_dict": tmp_path}, tmp_path / "code.pth")
    with pytest.raises(SettingsError):
        open_contender(f"x=timm:resnet10t:{tmp_path / 'code.pth'}")

"""SUN397 in its own format, in small, and scene classifiers that are trained on it."""

import csv
import json
import subprocess
import sys

import numpy as np
import openpyxl
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torchvision.models import resnet18
from typer.testing import CliRunner
from upath import UPath

from graft_pipeline.errors import InputError
from resources.scene_classifier import SceneClassifier
from training.__main__ import app
from training.scenes import LabelledPhotos, SceneConfig, new_network, random_crop, train_scenes
from training.sun397 import INDOOR, OUTDOOR, read_hierarchy, read_sun397

#: Classes and their flags: indoor; outdoor, natural; outdoor, man-made.
CLASSES = {
    "/a/abbey": (0, 0, 1),
    "/a/apartment_building/outdoor": (0, 0, 1),
    "/b/bayou": (0, 1, 0),
    "/c/cottage_garden": (0, 1, 1),
    "/k/kitchen": (1, 0, 0),
    "/l/library/indoor": (1, 0, 0),
    "/t/train_station/platform": (1, 0, 1),
}
PER_CLASS = 6
SMALL = SceneConfig(
    crop_px=32, resize_px=36, epochs=3, batch_size=16, learning_rate=1e-3, weights="scratch", device="cpu"
)


def sheet_rows(classes):
    """The sheet as published: titles, header, quoted classes."""
    level_2 = ["shopping and dining", "water, ice, snow"]
    yield ["", "Level 1", "", "", "Level 2 indoor", "Level 2 outdoor"]
    yield ["category", "indoor", "outdoor, natural", "outdoor, man-made", *level_2]
    for name, flags in classes.items():
        yield [f"'{name}'", *flags, 0, 1]


def write_workbook(path, classes=CLASSES):
    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook()
    book.active.title = "SUN908"
    book.active.append(["of all categories"])
    sheet = book.create_sheet("SUN397")
    for row in sheet_rows(classes):
        sheet.append([None if cell == "" else cell for cell in row])
    book.save(path)


def photo(is_outdoor, random):
    """Blue above green, or lamp light; of odd sizes."""
    height, width = random.integers(40, 80, 2)
    picture = np.empty((height, width, 3))
    picture[: height // 2] = (90, 150, 230) if is_outdoor else (220, 190, 140)
    picture[height // 2 :] = (60, 140, 60) if is_outdoor else (150, 100, 70)
    return (picture + random.normal(0, 20, picture.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture
def sun397(tmp_path):
    """SUN397 as its authors publish it, with seven classes of twelve images."""
    random = np.random.default_rng(0)
    folder = tmp_path / "sun"
    partitions = folder / "Partitions"
    partitions.mkdir(parents=True)
    lines = {"Training_01": [], "Testing_01": []}
    for name, flags in CLASSES.items():
        (folder / "SUN397" / name[1:]).mkdir(parents=True)
        for number in range(2 * PER_CLASS):
            file = f"{name}/sun_{number:016x}.jpg"
            Image.fromarray(photo(not flags[0], random)).save(folder / "SUN397" / file[1:])
            lines["Training_01" if number < PER_CLASS else "Testing_01"].append(file)
    for part, files in lines.items():
        (partitions / f"{part}.txt").write_text("\r\n".join(files) + "\r\n")
    (partitions / "ClassName.txt").write_text("\n".join(CLASSES) + "\n")
    write_workbook(folder / "hierarchy_three_levels" / "three_levels.xlsx")
    return folder


def coloured_photos(count, seed=0):
    random = np.random.default_rng(seed)
    labels = (np.arange(count) % 3 > 0).astype(np.int64)
    return LabelledPhotos([photo(bool(label), random) for label in labels], labels)


# --- SUN397's own format ---


def test_a_split_of_sun397_is_read_with_its_sides(sun397):
    found = read_sun397(sun397)
    for part, numbers in ((found.train, range(PER_CLASS)), (found.test, range(PER_CLASS, 2 * PER_CLASS))):
        expected = {
            sun397 / "SUN397" / f"{name[1:]}/sun_{number:016x}.jpg": INDOOR if flags[0] else OUTDOOR
            for name, flags in CLASSES.items()
            if name != "/t/train_station/platform"
            for number in numbers
        }
        assert dict(zip(part.images, part.labels.tolist(), strict=True)) == expected
    assert found.ambiguous == ("/t/train_station/platform",)
    assert found.classes == tuple(sorted(set(CLASSES) - set(found.ambiguous)))
    assert found.absent == 0


def test_the_image_folder_itself_may_be_named(sun397):
    (sun397 / "Partitions").rename(sun397 / "SUN397" / "Partitions")
    (sun397 / "hierarchy_three_levels").rename(sun397 / "SUN397" / "hierarchy_three_levels")
    assert len(read_sun397(sun397 / "SUN397").train.images) == 6 * PER_CLASS


def test_a_csv_export_says_the_same_as_the_workbook(sun397, tmp_path):
    exported = tmp_path / "three_levels.csv"
    with exported.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([*sheet_rows(CLASSES), [""] * 6, ["", 175, 100, 200, "", ""]])
    book = read_hierarchy(sun397 / "hierarchy_three_levels" / "three_levels.xlsx")
    assert read_hierarchy(exported) == book
    assert book["/c/cottage_garden"] == {OUTDOOR}
    assert book["/t/train_station/platform"] == {INDOOR, OUTDOOR}
    assert len(book) == len(CLASSES)


def test_absent_images_are_counted_and_left_out(sun397):
    for number in (0, 1):
        (sun397 / "SUN397" / "b" / "bayou" / f"sun_{number:016x}.jpg").unlink()
    found = read_sun397(sun397)
    assert found.absent == 2
    assert len(found.train.images) == 6 * PER_CLASS - 2


def test_what_is_missing_or_wrong_is_named(sun397, tmp_path):
    partitions, workbook = sun397 / "Partitions", sun397 / "hierarchy_three_levels" / "three_levels.xlsx"
    with pytest.raises(InputError, match=r"elsewhere holds no SUN397.*SUN397\.tar\.gz"):
        read_sun397(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"Training_02\.txt.*--partitions"):
        read_sun397(sun397, split=2)
    with pytest.raises(InputError, match="1 to 10"):
        read_sun397(sun397, split=11)
    with pytest.raises(InputError, match="--hierarchy"):
        read_sun397(sun397, hierarchy=tmp_path / "none.xlsx")
    (tmp_path / "broken.xlsx").write_bytes(b"PK not a workbook")
    with pytest.raises(InputError, match="no Excel workbook"):
        read_sun397(sun397, hierarchy=tmp_path / "broken.xlsx")
    (tmp_path / "other.csv").write_text("category,indoor\n'/a/abbey',0\n")
    with pytest.raises(InputError, match="no column outdoor, natural, outdoor, man-made"):
        read_sun397(sun397, hierarchy=tmp_path / "other.csv")
    write_workbook(workbook, {n: f for n, f in CLASSES.items() if n != "/b/bayou"} | {"/a/abbey": (0, 0, 0)})
    with pytest.raises(InputError, match=r"/a/abbey, /b/bayou of ClassName\.txt on no side"):
        read_sun397(sun397)
    write_workbook(workbook)
    with (partitions / "Testing_01.txt").open("a") as file:
        file.write("/z/zoo/sun_a.jpg\n")
    with pytest.raises(InputError, match=r"sun_a\.jpg is of the unknown class /z/zoo"):
        read_sun397(sun397)


def test_without_openpyxl_the_csv_is_offered(sun397):
    program = (
        "import sys; sys.modules['openpyxl'] = None\n"
        "from pathlib import Path\n"
        "from training.sun397 import read_hierarchy\n"
        f"read_hierarchy(Path({str(sun397 / 'hierarchy_three_levels' / 'three_levels.xlsx')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "graft-pipeline[sun397]" in done.stderr
    assert "CSV" in done.stderr


# --- training ---


def test_from_the_command_line_to_the_resource(sun397, tmp_path):
    broken = sun397 / "SUN397" / "k" / "kitchen" / f"sun_{0:016x}.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    (sun397 / "SUN397" / "b" / "bayou" / f"sun_{PER_CLASS:016x}.jpg").write_text("<html>gone</html>")
    output = tmp_path / "scene.safetensors"
    options = ["--weights=scratch", "--image-px=32", "--epochs=5", "--batch-size=12", "--device=cpu"]
    options += ["--learning-rate=0.003"]
    done = CliRunner().invoke(app, ["scenes", str(output), "--sun397", str(sun397), *options])
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "Left out: 2 images that cannot be decoded, 0 absent ones, 1 classes on both sides." in text
    with safe_open(output, framework="pt") as file:
        header = json.loads(file.metadata()["scene_classifier"])
    assert header["classes"] == ["indoor", "outdoor"]
    assert (header["crop_px"], header["resize_px"]) == (32, 37)
    assert header["mean"] == [0.485, 0.456, 0.406]
    assert header["facts"]["ambiguous_classes"] == ["/t/train_station/platform"]
    assert header["facts"]["unreadable_photos"] == 2
    # The resource's own decisions on the testing part have the accuracy that the file announces.
    found = read_sun397(sun397).test
    readable = [n for n, file in enumerate(found.images) if not file.read_bytes().startswith(b"<html>")]
    scores = SceneClassifier.checkpoint(output, device="cpu").score_images(
        [found.images[n].read_bytes() for n in readable]
    )
    is_right = (scores > 0.5) == (found.labels[readable] == OUTDOOR)
    assert is_right.mean() == pytest.approx(header["accuracy"])
    assert is_right.mean() > 0.9
    assert f"accuracy {header['accuracy']:.4f}" in text


def test_the_same_seed_gives_the_same_bytes_and_a_killed_training_goes_on(tmp_path):
    photos, held_out = coloured_photos(40), coloured_photos(12, seed=1)
    files = {name: UPath(tmp_path / f"{name}.safetensors") for name in ("whole", "killed", "other")}
    told = []
    before = torch.get_rng_state()
    whole = train_scenes(
        photos, held_out, files["whole"], SMALL, progress=lambda done, total: told.append((done, total))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert told == [(step, 9) for step in range(1, 10)]
    assert [row["epoch"] for row in whole.history] == [1, 2, 3]

    def die(done, total):
        seen.append(done)
        if done == 5:
            raise KeyboardInterrupt

    seen = []
    with pytest.raises(KeyboardInterrupt):
        train_scenes(photos, held_out, files["killed"], SMALL, progress=die)
    assert not files["killed"].exists()
    seen = []
    train_scenes(photos, held_out, files["killed"], SMALL, progress=lambda done, total: seen.append(done))
    assert seen == [4, 5, 6, 7, 8, 9]
    assert files["killed"].read_bytes() == files["whole"].read_bytes()
    config = SceneConfig(**(SMALL.__dict__ | {"seed": 1}))
    train_scenes(photos, held_out, files["other"], config)
    assert files["other"].read_bytes() != files["whole"].read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_run_of_another_configuration_starts_over(tmp_path):
    photos, file = coloured_photos(40), UPath(tmp_path / "scene.safetensors")

    def die(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_scenes(photos, photos, file, SMALL, progress=die)
    seen = []
    config = SceneConfig(**(SMALL.__dict__ | {"learning_rate": 2e-3}))
    train_scenes(photos, photos, file, config, progress=lambda done, total: seen.append(done))
    assert seen[0] == 1


def test_it_starts_from_weights_of_a_file(tmp_path):
    torch.manual_seed(3)
    imagenet = resnet18(weights=None)
    torch.save(imagenet.state_dict(), tmp_path / "resnet18.pth")
    config = SceneConfig(weights=str(tmp_path / "resnet18.pth"))
    model = new_network(config).model
    assert torch.equal(model.conv1.weight, imagenet.conv1.weight)
    assert model.fc.weight.shape == (2, 512)
    for name, content in {"none.pth": None, "text.pth": b"hello", "text.safetensors": b"hello"}.items():
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="holds no ResNet-18"):
            new_network(SceneConfig(weights=str(tmp_path / name)))
    torch.save({"conv1.weight": imagenet.conv1.weight.detach()}, tmp_path / "part.pth")
    with pytest.raises(InputError, match="no state dict of torchvision's resnet18"):
        new_network(SceneConfig(weights=str(tmp_path / "part.pth")))


def test_imagenets_weights_are_taken_where_torchvision_left_them(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert new_network(SceneConfig()).name == "scratch"
    assert "training from scratch" in caplog.text
    imagenet = resnet18(weights=None).state_dict()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(imagenet, tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    found = new_network(SceneConfig())
    assert found.name.startswith("resnet18-f37072fd.pth")
    assert torch.equal(found.model.conv1.weight, imagenet["conv1.weight"])


def test_crops_lie_inside_and_show_enough():
    # Each pixel tells its place, so a crop tells which part it is.
    height, width = 60, 90
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(width)[None] * 2, np.arange(height)[:, None] * 2
    for seed in range(50):
        crop = random_crop(Image.fromarray(ramp), 48, 0.35, np.random.default_rng(seed)).astype(float) / 2
        assert crop.shape == (48, 48, 3)
        shown = np.ptp(crop[..., 0]) * np.ptp(crop[..., 1]) / (width * height)
        assert 0.28 < shown <= 1


def test_what_cannot_train_is_refused(tmp_path):
    photos = coloured_photos(12)
    one_side = LabelledPhotos(photos.photos[:1], photos.labels[:1])
    with pytest.raises(InputError, match="photos of both sides"):
        train_scenes(photos, one_side, UPath(tmp_path / "x"), SMALL)
    files = [tmp_path / f"{n}.jpg" for n in range(4)]
    for file in files:
        file.write_bytes(b"nothing")
    unreadable = LabelledPhotos(files, np.array([0, 1, 0, 1]))
    with pytest.raises(InputError, match="No training photo can be decoded"):
        train_scenes(unreadable, photos, UPath(tmp_path / "x"), SMALL)
    for wrong in ({"epochs": 0}, {"batch_size": 1}, {"crop_px": 64, "resize_px": 32}, {"least_area": 1.5}):
        with pytest.raises(InputError, match="cannot train"):
            SceneConfig(**wrong)

"""Satlas's files as published, with colours for classes so that the toy CLIP can tell them apart."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, jaccard_score

from graft_pipeline.errors import DataError, InputError
from training.encoders import load_clip
from training.zero_shot.evaluate_masks import PatchSegmenter, evaluate_masks
from training.zero_shot.mask_sets import SATLAS_CLASSES, UNLABELLED, MaskSet, read_satlas
from training.zero_shot.prompts import PromptSet, load_prompts

WATER, DEVELOPED, GRASS = (SATLAS_CLASSES.index(name) + 1 for name in ("water", "developed", "grass"))
COLOURS = {WATER: "blue", DEVELOPED: "red", GRASS: "green"}
PROMPTS = PromptSet({"water": ("blue",), "developed": ("red",), "grass": ("green",)}, ("a photo of {}",))


def png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def picture(paint, values, scale, seed):
    """An RGB image of the colours of an array of label values, each `scale` pixels wide."""
    random = np.random.default_rng(seed)
    image = np.zeros((*[side * scale for side in values.shape], 3), np.uint8)
    full = np.kron(values, np.ones((scale, scale), int))
    for value in np.unique(values):
        noise = paint([COLOURS.get(int(value), "yellow")], max(image.shape), random)[0]
        image[full == value] = noise[: image.shape[0], : image.shape[1]][full == value]
    return image


@pytest.fixture
def high(tmp_path, paint):
    """One label tile, two of its NAIP images, one of them in two years; a tile without land cover."""
    label = np.full((512, 512), DEVELOPED, np.uint8)
    label[:32, :16], label[:32, 16:32] = WATER, GRASS
    label[32:64, :32], label[40:48, :32] = GRASS, 0
    png(tmp_path / "static" / "2273_3482" / "land_cover.png", label)
    x, y = 2273 * 16, 3482 * 16
    old, new = "m_2508008_nw_17_1_20131013", "m_2508008_nw_17_1_20151013"
    png(tmp_path / "naip" / old / "tci" / f"{x}_{y}.png", np.zeros((512, 512, 3), np.uint8))
    for place, rows in ((f"{x}_{y}", slice(0, 32)), (f"{x}_{y + 1}", slice(32, 64))):
        png(tmp_path / "naip" / new / "tci" / f"{place}.png", picture(paint, label[rows, :32], 16, 1))
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "test_highres.json").write_text(json.dumps([[2273, 3482], [1, 1]]))
    times = {old: "2013-10-13T00:00:00+00:00", new: "2015-10-13T00:00:00+00:00"}
    (tmp_path / "metadata" / "image_times.json").write_text(json.dumps(times))
    return tmp_path


def test_high_resolution_masks_are_sixteen_times_coarser(high):
    made = read_satlas(high, "high")
    # Tiles that the images do not reach still name the classes of the test set.
    assert made.classes == ("water", "developed", "grass")
    assert len(made) == 2
    assert all(name.startswith("m_2508008_nw_17_1_20151013/") for name in made.ids)
    assert made.skipped == {"tile without land cover": 1}
    image, mask = made.read(0)
    assert (image.shape, mask.shape) == ((512, 512, 3), (32, 32))
    assert (mask[:, :16] == 0).all()
    assert (mask[:, 16:] == 2).all()
    assert image[10, 10, 2] > image[10, 10, 0]
    assert (made.read(1)[1][8:16] == UNLABELLED).all()


def test_low_resolution_masks_are_as_large_as_the_images(tmp_path):
    png(tmp_path / "static" / "1867_3287" / "land_cover.png", np.full((512, 512), GRASS, np.uint8))
    for name, value in (("S2A_MSIL1C_20160808T181452_N0204_X", 7), ("S2B_MSIL1C_20150808T181452_N0204_X", 8)):
        png(tmp_path / "sentinel2" / name / "tci" / "1867_3287.png", np.full((512, 512, 3), value, np.uint8))
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "test_lowres.json").write_text(json.dumps([[1867, 3287]]))
    made = read_satlas(tmp_path, "low")
    image, mask = made.read(0)
    assert (mask.shape, made.classes) == ((512, 512), ("grass",))
    # Without image_times.json the name tells the date.
    assert image[0, 0, 0] == 7


def test_of_a_tiles_images_the_newest_good_one_is_read(high, caplog):
    x, y = 2273 * 16, 3482 * 16
    old, new = "m_2508008_nw_17_1_20131013", "m_2508008_nw_17_1_20151013"
    read_satlas(high, "high")
    assert "good_images_highres_all.json is missing: cloudy and black images are scored too" in caplog.text
    listing = high / "metadata" / "good_images_highres_all.json"
    # The newest image of the first place is cloudy; what is listed and not downloaded is nothing.
    listing.write_text(json.dumps([[x, y, old], [x, y + 1, new], [x, y, "m_2508008_nw_17_1_20191013"]]))
    caplog.clear()
    assert read_satlas(high, "high").ids == (f"{old}/{x}_{y}", f"{new}/{x}_{y + 1}")
    assert "good_images" not in caplog.text
    listing.write_text(json.dumps([[x, y + 1, new]]))
    assert read_satlas(high, "high").ids == (f"{new}/{x}_{y + 1}",)
    listing.write_text("[[1, 2")
    with pytest.raises(InputError, match="download the metadata of SatlasPretrain again"):
        read_satlas(high, "high")


def test_scores_are_scikit_learns(high, toy_world):
    masks = read_satlas(high, "high")
    segmenter = PatchSegmenter("clip", load_clip(toy_world.architecture))
    made = evaluate_masks([segmenter], masks, PROMPTS, resamples=30)
    truth = np.concatenate([masks.read(n)[1].ravel() for n in range(2)])
    maps = np.concatenate([maps["clip"].ravel() for _, _, maps in made.shown])
    labelled = truth != UNLABELLED
    truth, maps = truth[labelled], maps[labelled]
    of = made.metrics["segmentation"]["clip"]
    present = np.unique(truth)
    assert of["pixel accuracy"].value == pytest.approx((truth == maps).mean(), abs=1e-6)
    assert of["per-class accuracy"].value == pytest.approx(balanced_accuracy_score(truth, maps), abs=1e-6)
    expected = jaccard_score(truth, maps, labels=present, average=None).mean()
    assert of["mIoU"].value == pytest.approx(expected, abs=1e-6)
    assert of["per-class accuracy"].value > 0.8
    assert of["per-class accuracy"].low <= of["per-class accuracy"].value <= of["per-class accuracy"].high
    assert made.metrics["segmentation"]["chance"]["pixel accuracy"].value == pytest.approx(1 / 3, abs=0.1)


def test_patches_that_reach_beyond_an_image_are_not_squeezed_into_it(toy_world, paint):
    # The toy's patches are 112 px: 580 px are five and a bit, 672 px are six, and beyond an image it is mirrored.
    red, blue = paint(["red", "blue"], 580, np.random.default_rng(0))
    cut = np.concatenate([red[:, :224], blue[:, 224:]], axis=1)
    whole = np.pad(cut, ((0, 92), (0, 92), (0, 0)), mode="symmetric")
    prompts = PromptSet({"red": ("red",), "blue": ("blue",)}, ("a photo of {}",))
    segmenter = PatchSegmenter("clip", load_clip(toy_world.architecture))
    for step in (1, 4):
        maps = []
        for image in (cut, whole):
            truth = np.zeros((len(image) // step, len(image) // step), np.uint8)
            masks = MaskSet("two", ("red", "blue"), ("0",), lambda _, of=(image, truth): of)
            maps.append(evaluate_masks([segmenter], masks, prompts, resamples=0).shown[0][2]["clip"])
        side = 580 // step
        assert 0 < maps[0].mean() < 1
        assert (maps[0] == maps[1][:side, :side]).mean() > 0.999


def test_broken_files_are_counted_and_the_rest_is_scored(high, toy_world):
    image = next(high.glob("naip/*2015*/tci/*_55712.png"))
    image.write_bytes(image.read_bytes()[:200])
    masks = read_satlas(high, "high")
    with pytest.raises(DataError, match="download it again"):
        masks.read(0)
    segmenter = PatchSegmenter("clip", load_clip(toy_world.architecture))
    made = evaluate_masks([segmenter], masks, PROMPTS, resamples=5)
    assert made.images == 1
    assert made.skipped == {"tile without land cover": 1, "image or mask cannot be decoded": 1}
    label = high / "static" / "2273_3482" / "land_cover.png"
    label.write_bytes(b"no image")
    with pytest.raises(InputError, match="label cannot be decoded"):
        read_satlas(high, "high")


def test_what_is_absent_is_named(high, toy_world, tmp_path):
    with pytest.raises(InputError, match=r"SatlasPretrain \(https://"):
        read_satlas(tmp_path / "nowhere", "low")
    segmenter = PatchSegmenter("clip", load_clip(toy_world.architecture))
    with pytest.raises(InputError, match="no words for grass"):
        evaluate_masks([segmenter], read_satlas(high, "high"), PROMPTS.restricted_to(("water", "developed")))
    assert set(SATLAS_CLASSES) == set(load_prompts("satlas").names)

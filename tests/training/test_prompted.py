"""SAM and CLIPSeg in their published formats, small and with random weights."""

import json

import numpy as np
import pytest
import torch

from graft_pipeline.errors import SettingsError
from training.encoders import load_clip
from training.zero_shot.evaluate_masks import PatchSegmenter
from training.zero_shot.prompted import ClipSeg, Sam, SamRefined, best_patches
from training.zero_shot.prompts import PromptSet

PROMPTS = PromptSet({"red": ("red",), "blue": ("blue", "navy")}, ("a photo of {}",))


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory):
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    folder = tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    config = SamConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8,
            "output_channels": 16, "global_attn_indexes": [1], "mlp_dim": 32, "window_size": 4,
            "num_pos_feats": 8,
        },
        prompt_encoder_config={
            "hidden_size": 16, "image_size": 64, "patch_size": 8, "image_embedding_size": 8, "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32,
            "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    SamModel(config).save_pretrained(folder)
    SamProcessor(
        SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clipseg_folder(tmp_path_factory):
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPTokenizer, ViTImageProcessor

    folder = tmp_path_factory.mktemp("clipseg")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    torch.manual_seed(0)
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = CLIPSegConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": len(vocabulary), "max_position_embeddings": 16, "projection_dim": 16, **ends,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8, "projection_dim": 16,
        },
        projection_dim=16, reduce_dim=8, extract_layers=[0, 1, 2], decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )  # fmt: skip
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image(paint):
    random = np.random.default_rng(0)
    return np.concatenate(list(paint(["red", "blue"], 224, random)), axis=1)


def test_sam_draws_the_classes_of_points_to_its_masks(sam_folder, toy_world, image):
    base = PatchSegmenter("toy", load_clip(toy_world.architecture))
    sam = Sam(sam_folder, points_per_class=2)
    refined = SamRefined(base, sam)
    assert refined.name == "toy + SAM"
    # "navy" is no word of the toy's captions.
    refined.prepare(PromptSet({"red": ("red",), "blue": ("blue",)}, ("a photo of {}",)))
    coarse, fine = base.scores(image), refined.scores(image)
    assert fine.shape == (2, 224, 448)
    places, classes, values = best_patches(coarse, 2)
    assert set(classes) == {0, 1}
    # Masks are the model's own, prompted at the centres of these patches.
    points = (places[:, ::-1] + 0.5) * 112
    masks = sam.masks(image, points)
    assert masks.shape == (len(points), 224, 448)
    for mask, number, value in zip(masks, classes, values, strict=True):
        assert (fine[number][mask] >= value - 1e-6).all()
    touched = np.stack([masks[classes == number].any(axis=0) for number in (0, 1)])
    plain = torch.nn.functional.interpolate(
        torch.from_numpy(coarse.copy())[None], size=(224, 448), mode="bilinear"
    )
    np.testing.assert_allclose(fine[~touched], plain[0].numpy()[~touched], atol=1e-6)
    np.testing.assert_array_equal(fine, refined.scores(image))


def test_points_are_centres_of_patches_that_reach_beyond_the_image(sam_folder, toy_world, image):
    base, sam = PatchSegmenter("toy", load_clip(toy_world.architecture)), Sam(sam_folder, points_per_class=1)
    refined = SamRefined(base, sam)
    refined.prepare(PromptSet({"red": ("red",), "blue": ("blue",)}, ("a photo of {}",)))
    cut = image[:, :400]
    coarse, fine = base.scores(cut), refined.scores(cut)
    assert (coarse.shape, fine.shape) == ((2, 2, 4), (2, 224, 400))
    places, classes, values = best_patches(coarse, 1)
    masks = sam.masks(cut, np.minimum((places[:, ::-1] + 0.5) * 112, [399, 223]))
    plain = torch.nn.functional.interpolate(
        torch.from_numpy(coarse.copy())[None], size=(224, 448), mode="bilinear"
    )
    expected = plain[0, :, :, :400].numpy().copy()
    for mask, number, value in zip(masks, classes, values, strict=True):
        expected[number][mask] = np.maximum(expected[number][mask], value)
    np.testing.assert_allclose(fine, expected, atol=1e-6)


def test_the_best_patches_are_the_highest_of_their_class():
    scores = np.array([[[0.9, 0.2], [0.8, 0.1]], [[0.1, 0.6], [0.7, 0.3]], [[0, 0], [0, 0]]], np.float32)
    places, classes, values = best_patches(scores, 1)
    assert places.tolist() == [[0, 0], [0, 1]]
    assert classes.tolist() == [0, 1]
    assert values.tolist() == pytest.approx([0.9, 0.6])


def test_clipseg_scores_a_class_as_its_best_word(clipseg_folder, image):
    model = ClipSeg("CLIPSeg", clipseg_folder)
    model.prepare(PROMPTS)
    both = model.scores(image)
    assert both.shape == (2, 32, 32)
    single = []
    for word in ("red", "blue", "navy"):
        model.prepare(PromptSet({word: (word,)}, ("{}",)))
        single.append(model.scores(image)[0])
    np.testing.assert_allclose(both[0], single[0], atol=1e-5)
    np.testing.assert_allclose(both[1], np.maximum(single[1], single[2]), atol=1e-5)
    assert np.ptp(single[1] - single[2]) > 0
    model.prepare(PromptSet({"red": ("red " * 20,)}, ("{}",)))
    assert model.scores(image).shape == (1, 32, 32)


def test_folders_without_weights_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="give a folder with its files"):
        ClipSeg("CLIPSeg", tmp_path)
    with pytest.raises(SettingsError, match="SamModel"):
        Sam(tmp_path)


def test_segmentation_is_scored_with_and_without_refinement_beside_clipseg(
    sam_folder, clipseg_folder, toy_world, tmp_path
):
    from PIL import Image
    from upath import UPath

    from training.zero_shot.benchmarks import evaluate_dataset

    label = np.full((512, 512), 1, np.uint8)
    label[:, 256:] = 5
    for place in ("static/3_4/land_cover.png", "sentinel2/S2A_MSIL1C_20160808T181452_X/tci/3_4.png"):
        (tmp_path / place).parent.mkdir(parents=True)
    Image.fromarray(label).save(tmp_path / "static/3_4/land_cover.png")
    picture = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "sentinel2/S2A_MSIL1C_20160808T181452_X/tci/3_4.png")
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata/test_lowres.json").write_text("[[3, 4]]")
    specs = [f"toy=folder:{toy_world.foundation}", f"CLIPSeg=clipseg:{clipseg_folder}"]
    made = evaluate_dataset(
        "satlas_sentinel2", tmp_path, specs, None, UPath(tmp_path), sam=str(sam_folder), seed=0
    )
    assert set(made.metrics["segmentation"]) == {"toy", "toy + SAM", "CLIPSeg", "chance"}
    assert made.classes == ("water", "grass")


def test_rasters_are_refined_block_by_block(sam_folder, toy_world, tmp_path, paint):
    import rasterio

    from training.zero_shot.raster import segment_raster

    clip = load_clip(toy_world.architecture)
    prompts = PromptSet({"red": ("red",), "blue": ("blue",)}, ("a photo of {}",))
    random = np.random.default_rng(4)
    pixels = np.concatenate(list(paint(["red"] * 5 + ["blue"] * 4, 250, random)), axis=1)
    with rasterio.open(
        tmp_path / "scene.tif", "w", driver="GTiff", width=pixels.shape[1], height=250, count=3, dtype="uint8",
        crs="EPSG:32619", transform=rasterio.Affine(1, 0, 500_000, 0, -1, 4_700_000),
    ) as file:  # fmt: skip
        file.write(np.moveaxis(pixels, -1, 0))
    seen = []

    def refine(image, scores, patch_px):
        seen.append((image, scores, patch_px))
        return Sam(sam_folder, points_per_class=1).refine(image, scores, patch_px)

    segment_raster(clip, tmp_path / "scene.tif", tmp_path / "map.tif", prompts, refine=refine)
    # 2250 px are 21 patches of 112 px: blocks of nine patches, and the three that are left, with the patches around.
    own, shown = [(0, 1008), (1008, 2016), (2016, 2250)], [(0, 1120), (896, 2128), (1904, 2250)]
    assert [scores.shape for _, scores, _ in seen] == [(2, 3, 10), (2, 3, 11), (2, 3, 4)]
    # The last row and column of patches reach beyond the raster.
    assert {patch_px for _, _, patch_px in seen} == {(112, 112)}
    for (image, _, _), (left, right) in zip(seen, shown, strict=True):
        np.testing.assert_array_equal(image, pixels[:, left:right])
    with rasterio.open(tmp_path / "map.tif") as file:
        written = file.read(1)
    model = Sam(sam_folder, points_per_class=1)
    for each, (left, right), (west, _) in zip(seen, own, shown, strict=True):
        expected = model.refine(*each).argmax(axis=0)[:, left - west : right - west]
        np.testing.assert_array_equal(written[:, left:right], expected)

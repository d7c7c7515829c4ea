import os
import warnings

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.transform import Affine

from graft_pipeline.errors import InputError
from training.encoders import encode_patches, encode_texts, load_clip
from training.zero_shot.classify import class_embeddings
from training.zero_shot.prompts import PromptSet
from training.zero_shot.raster import NODATA, RasterOptions, pixel_size_m, segment_raster
from training.zero_shot.segment import segment, spread

NAMES = ("red", "green", "blue", "yellow")
PROMPTS = PromptSet({name: (name,) for name in NAMES}, ("a photo of {}",))
UTM = Affine(1, 0, 500_000, 0, -1, 4_700_000)
#: Patches of the toy model are 112 pixels: half of the 224 that its input shows.
PATCH = 112


@pytest.fixture(scope="module")
def clip(toy_world):
    return load_clip(toy_world.architecture)


@pytest.fixture(scope="module")
def checkered(paint):
    """(672, 896, 3) uint8 of 4 x 3 squares of 224 px, and their (672, 896) classes."""
    squares = np.array([[0, 1, 2, 3], [2, 3, 0, 1], [1, 0, 3, 2]])
    random = np.random.default_rng(3)
    rows = [
        np.concatenate(list(paint([NAMES[n] for n in row], 224, random)), axis=1) for row in squares.tolist()
    ]
    return np.concatenate(rows), np.kron(squares, np.ones((224, 224), int))


def write(path, image, transform=UTM, crs="EPSG:32619", mask=None, **profile):
    height, width, count = image.shape
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=count, dtype=image.dtype, crs=crs,
        transform=transform, **profile,
    ) as file:  # fmt: skip
        file.write(np.moveaxis(image, -1, 0))
        if mask is not None:
            file.write_mask(mask)
    return path


def read(path):
    with rasterio.open(path) as file:
        return file.read(1), file.profile, file.tags(1), file.colormap(1)


def inner(classes, margin=56):
    """Pixels further from a square's border than half a patch: others mix two colours."""
    place = (np.arange(224) >= margin) & (np.arange(224) < 224 - margin)
    return np.tile(np.outer(place, place), (classes.shape[0] // 224, classes.shape[1] // 224))


def test_a_raster_becomes_a_map_on_its_own_grid(clip, checkered, tmp_path):
    image, truth = checkered
    source = write(tmp_path / "scene.tif", image)
    seen = []
    made = segment_raster(
        clip, source, tmp_path / "map.tif", PROMPTS, progress=lambda *done: seen.append(done)
    )
    classes, profile, tags, palette = read(made.path)
    assert classes.shape == truth.shape == (made.height_px, made.width_px)
    assert (profile["crs"], profile["transform"], profile["nodata"]) == (
        CRS.from_epsg(32619),
        UTM,
        NODATA,
    )
    assert [tags[f"class_{n}"] for n in range(4)] == list(NAMES)
    assert len({palette[n] for n in range(4)}) == 4
    assert (classes == truth)[inner(truth)].mean() > 0.95
    assert sum(made.share.values()) == pytest.approx(1)
    assert seen[-1][0] == seen[-1][1]


def test_windows_side_by_side_are_the_segmentation_of_crops(clip, checkered, tmp_path):
    image, _ = checkered
    source = write(tmp_path / "scene.tif", image[:224, :224])
    made = segment_raster(clip, source, tmp_path / "map.tif", PROMPTS, RasterOptions(overlap=0))
    patches = encode_patches(clip, image[None, :224, :224])
    expected = segment(patches, class_embeddings(PROMPTS, lambda texts: encode_texts(clip, texts)), 224)[0]
    assert made.windows == 1
    assert (read(made.path)[0] == expected).mean() > 0.999


@pytest.mark.parametrize("size", [(672, 896), (500, 301), (100, 50), (225, 700)])
def test_every_pixel_of_any_size_gets_a_class(clip, checkered, tmp_path, size):
    image, truth = checkered
    height, width = size
    source = write(tmp_path / "scene.tif", image[:height, :width])
    made = segment_raster(clip, source, tmp_path / "map.tif", PROMPTS, RasterOptions(batch_size=3))
    classes = read(made.path)[0]
    assert classes.shape == size
    assert classes.max() < 4
    settled = inner(truth)[:height, :width]
    if settled.any():
        # Patch tokens of this CLIP were never trained: what else a window shows leaks into them.
        assert (classes == truth[:height, :width])[settled].mean() > 0.6


def test_other_resolutions_and_ranges_are_read_for_the_encoder(clip, checkered, tmp_path):
    image, truth = checkered
    coarse = image[::2, ::2].astype(np.uint16) * 10
    source = write(tmp_path / "coarse.tif", coarse, transform=UTM @ Affine.scale(2))
    options = RasterOptions(display_range=(0, 2550))
    made = segment_raster(clip, source, tmp_path / "map.tif", PROMPTS, options)
    classes = read(made.path)[0]
    assert classes.shape == coarse.shape[:2]
    assert (classes == truth[::2, ::2])[inner(truth)[::2, ::2]].mean() > 0.9


def test_metres_of_web_mercator_are_not_metres_of_the_ground(clip, checkered, tmp_path):
    image, truth = checkered
    # At 60 degrees north a metre of the projection is half a metre.
    place = Affine(2, 0, 0, 0, -2, 8_399_737.9 + 672)
    source = write(tmp_path / "mercator.tif", image, transform=place, crs="EPSG:3857")
    with rasterio.open(source) as file:
        assert pixel_size_m(file) == pytest.approx((1, 1), rel=1e-4)
    classes = read(segment_raster(clip, source, tmp_path / "map.tif", PROMPTS).path)[0]
    assert (classes == truth)[inner(truth)].mean() > 0.95


@pytest.mark.parametrize(
    ("crs", "transform", "expected"),
    [
        ("EPSG:32619", UTM, (1, 1)),
        # Massachusetts in US survey feet.
        ("EPSG:2249", Affine(1, 0, 750_000, 0, -1, 2_950_000), (0.3048, 0.3048)),
        # Plate carree: true along meridians alone.
        ("EPSG:4087", Affine(2, 0, 0, 0, -2, 6_679_169), (1, 2)),
        # Coordinates that lie nowhere: as they are.
        ('LOCAL_CS["drawing",UNIT["metre",1]]', UTM, (1, 1)),
    ],
)
def test_pixels_are_measured_on_the_ground(tmp_path, crs, transform, expected):
    path = write(tmp_path / "scene.tif", np.zeros((9, 9, 3), np.uint8), transform=transform, crs=crs)
    with rasterio.open(path) as file:
        assert pixel_size_m(file) == pytest.approx(expected, rel=1e-3)


def test_pixels_without_data_have_no_class(clip, checkered, tmp_path):
    image, _ = checkered
    mask = np.full(image.shape[:2], 255, np.uint8)
    mask[:100, :300] = 0
    source = write(tmp_path / "scene.tif", image, mask=mask)
    classes = read(segment_raster(clip, source, tmp_path / "map.tif", PROMPTS).path)[0]
    assert ((classes == NODATA) == (mask == 0)).all()


@pytest.mark.parametrize("nodata", [None, np.nan])
def test_no_number_is_no_data(clip, checkered, tmp_path, nodata):
    image = checkered[0].astype(np.float32)
    image[:300, :300, 1] = np.nan
    source = write(tmp_path / "scene.tif", image, nodata=nodata)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        made = segment_raster(
            clip, source, tmp_path / "map.tif", PROMPTS, RasterOptions(display_range=(0, 255))
        )
    assert ((read(made.path)[0] == NODATA) == np.isnan(image[..., 1])).all()


def test_blocks_that_are_refined_have_no_seams(clip, paint, tmp_path):
    # Classes change at a block's border, as blocks are about 1024 pixels.
    squares = np.random.default_rng(0).integers(4, size=(12, 12))
    rows = [
        np.concatenate(list(paint([NAMES[n] for n in row], 112, np.random.default_rng(1))), 1)
        for row in squares
    ]
    image = np.concatenate(rows)
    source = write(tmp_path / "scene.tif", image)
    plain = segment_raster(clip, source, tmp_path / "a.tif", PROMPTS)
    same = segment_raster(
        clip,
        source,
        tmp_path / "b.tif",
        PROMPTS,
        refine=lambda pixels, scores, patch_px: spread(scores, patch_px, pixels.shape[:2]),
    )
    assert (read(plain.path)[0] == read(same.path)[0]).mean() > 0.9999


def test_bands_follow_their_colours(clip, checkered, tmp_path):
    image, truth = checkered
    swapped = np.concatenate([image[..., ::-1], image[..., :1]], axis=-1)
    source = write(tmp_path / "bgr.tif", swapped)
    with rasterio.open(source, "r+") as file:
        file.colorinterp = [
            rasterio.enums.ColorInterp[name] for name in ("blue", "green", "red", "undefined")
        ]
    by_colour = segment_raster(clip, source, tmp_path / "a.tif", PROMPTS)
    by_number = segment_raster(clip, source, tmp_path / "b.tif", PROMPTS, RasterOptions(bands=(3, 2, 1)))
    assert (read(by_colour.path)[0] == read(by_number.path)[0]).all()
    assert (read(by_colour.path)[0] == truth)[inner(truth)].mean() > 0.95


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda path: path / "missing.tif", {}, "no raster"),
        (lambda path: write(path / "grey.tif", np.zeros((9, 9, 1), np.uint8)), {}, "1 bands"),
        (lambda path: write(path / "deep.tif", np.zeros((9, 9, 3), np.uint16)), {}, "range of values"),
        (lambda path: write(path / "rgb.tif", np.zeros((9, 9, 3), np.uint8)), {"bands": (1, 2, 7)}, r"\[7\]"),
        (
            lambda path: write(path / "far.tif", np.zeros((9, 9, 3), np.uint8), transform=UTM @ Affine.scale(500)),
            {},
            "too coarse",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_segmented_is_refused_and_leaves_nothing(clip, tmp_path, make, options, message):
    source = make(tmp_path)
    with pytest.raises(InputError, match=message):
        segment_raster(clip, source, tmp_path / "map.tif", PROMPTS, RasterOptions(**options))
    assert not list(tmp_path.glob("*map*"))


@pytest.mark.parametrize("wrong", [{"gsd_m": 0}, {"overlap": 1}, {"batch_size": 0}])
def test_senseless_options_are_refused(wrong):
    with pytest.raises(InputError, match="overlap"):
        RasterOptions(**wrong)


@pytest.mark.parametrize("values", [(0, 0), (3000, 0)])
def test_ranges_of_nothing_are_refused(values):
    with pytest.raises(InputError, match="lower one first"):
        RasterOptions(display_range=values)


def test_the_command_line_segments_by_words(toy_world, checkered, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from graft_pipeline.cli import app

    monkeypatch.setenv("GRAFT_ROOT", str(tmp_path / "data"))
    monkeypatch.setenv("GRAFT_ENV_FILE", os.devnull)
    image, truth = checkered
    source = write(tmp_path / "scene.tif", image)
    arguments = ["segment", str(source), *NAMES, "-o", str(tmp_path / "map.tif")]
    missing = CliRunner().invoke(app, arguments)
    assert "pixel_encoder" in str(missing.exception)
    done = CliRunner().invoke(app, [*arguments, "--encoder", str(toy_world.foundation)])
    assert done.exit_code == 0, done.output
    assert all(name in done.output for name in NAMES)
    assert (read(tmp_path / "map.tif")[0] == truth)[inner(truth)].mean() > 0.95

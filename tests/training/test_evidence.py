"""Pictures of evidence have what was found where it was found; images come from files and from tiles."""

import io
import json
import os

import numpy as np
import pytest
import rasterio
from PIL import Image as Picture
from rasterio.transform import Affine
from typer.testing import CliRunner

from graft_pipeline import schemas
from graft_pipeline.errors import InputError
from graft_pipeline.manifests import partition_file, partition_folder, write_table
from graft_pipeline.shards import ShardWriter
from training.zero_shot.answering.evidence import COLOURS, draw, to_png
from training.zero_shot.answering.images import read_image, read_tile
from training.zero_shot.answering.interpreter import Detected, Image, Interpreter
from training.zero_shot.answering.language import parse


class Knows:
    def __init__(self, **known):
        self.known = known

    def find(self, image, concept, tick):
        masks = []
        for top, left, bottom, right in self.known[concept]:
            mask = np.zeros((image.height_px, image.width_px), bool)
            mask[top:bottom, left:right] = True
            masks.append(Detected.of_mask(concept, mask, 0.87))
        return masks


@pytest.fixture(scope="module")
def answered():
    image = Image(np.zeros((160, 160, 3), np.uint8), 1.0)
    detector = Knows(house=[(30, 20, 60, 50), (130, 120, 150, 140)], lake=[(90, 100, 120, 150)])
    program = parse('count(north_of(find("house"), find("lake")))')
    return Interpreter(detector).run(program, image), image


def test_a_drawing_has_boxes_outlines_and_arrows_where_things_are(answered):
    answer, image = answered
    assert answer.value == 1
    drawn = draw(answer, image)
    # 160 px are drawn four times as large.
    assert drawn.shape == (640, 640, 3)
    house, lake = COLOURS[0], COLOURS[1]

    def is_colour(row, column, colour):
        return tuple(int(value) for value in drawn[row, column]) == colour

    # The counted house: its box on all four sides, filled inside.
    assert all(is_colour(row, column, house) for row, column in ((239, 110), (180, 80), (180, 199)))
    inner = drawn[130, 90].astype(int)
    assert 0 < inner[0] < house[0]
    # The lake and the other house are only tinted and outlined.
    assert is_colour(360, 500, lake)
    assert is_colour(520, 500, house)
    assert drawn[380, 420].sum() < inner.sum()
    assert not drawn[5, 620].any()
    # An arrow from the house to the lake passes between them.
    between = drawn[245:355, 205:395].reshape(-1, 3)
    assert (between == 255).all(axis=-1).sum() > 100


def test_a_png_says_question_answer_and_steps(answered):
    answer, image = answered
    png = to_png(answer, image, "How many houses are north of the lake?")
    with Picture.open(io.BytesIO(png)) as opened:
        assert opened.format == "PNG"
        pixels = np.asarray(opened)
    assert pixels.shape[1] == 640
    caption = pixels[640:]
    # A line each for question and answer and for four steps, dark on white.
    assert len(caption) >= 6 * 16
    rows = (caption < 128).any(axis=(1, 2))
    assert np.flatnonzero(np.diff(rows.astype(int)) == 1).size >= 6
    assert png == to_png(answer, image, "How many houses are north of the lake?")


def test_a_crowd_and_an_empty_answer_are_drawn():
    image = Image(np.full((700, 900, 3), 90, np.uint8), 1.0)
    boxes = [(row, column, row + 6, column + 6) for row in range(0, 690, 20) for column in range(0, 890, 60)]
    answer = Interpreter(Knows(house=boxes)).run(parse('count(find("house"))'), image)
    assert answer.value == len(boxes)
    assert draw(answer, image).shape == (700, 900, 3)
    nothing = Interpreter(Knows(house=[])).run(parse('exists(find("house"))'), image)
    np.testing.assert_array_equal(draw(nothing, image), image.pixels)


def write(path, pixels, transform=None, crs=None, **profile):
    height, width, count = pixels.shape
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=count, dtype=pixels.dtype, crs=crs,
        transform=transform, **profile,
    ) as file:  # fmt: skip
        file.write(np.moveaxis(pixels, -1, 0))
    return path


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(2).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def test_files_are_read_with_the_size_of_their_pixels(tmp_path, pixels):
    utm = write(tmp_path / "utm.tif", pixels, Affine(0.6, 0, 5e5, 0, -0.6, 47e5), "EPSG:32619")
    made = read_image(utm, None)
    np.testing.assert_array_equal(made.pixels, pixels)
    assert made.gsd_m == pytest.approx(0.6)
    Picture.fromarray(pixels).save(tmp_path / "plain.png")
    plain = read_image(tmp_path / "plain.png", 2.5)
    np.testing.assert_array_equal(plain.pixels, pixels)
    assert plain.gsd_m == 2.5
    # At 60 degrees north a degree of longitude is half as long: pixels become square.
    lonlat = write(tmp_path / "lonlat.tif", pixels, Affine(1e-5, 0, 20, 0, -1e-5, 60), "EPSG:4326")
    square = read_image(lonlat, None)
    assert square.gsd_m == pytest.approx(1.111, rel=0.01)
    assert square.pixels.shape == (40, 30, 3)
    reflectance = (pixels.astype(np.uint16) * 20).clip(0, 3000)
    wide = write(tmp_path / "s2.tif", reflectance, Affine(10, 0, 5e5, 0, -10, 47e5), "EPSG:32619")
    shown = read_image(wide, None, (0.0, 3000.0)).pixels
    np.testing.assert_allclose(shown, reflectance / 3000 * 255, atol=1)


def test_what_is_no_image_is_refused_with_a_way_out(tmp_path, pixels):
    def refused(message, file, gsd_m=1.0, **options):
        with pytest.raises(InputError, match=message):
            read_image(file, gsd_m, **options)

    plain = write(tmp_path / "plain.tif", pixels)
    refused("check the path", tmp_path / "none.tif")
    refused("give the metres per pixel", plain, None)
    refused("2,400 pixels, more than 2,000: cut out", plain, most_px=2000)
    refused("not north-up", write(tmp_path / "up.tif", pixels, Affine(1, 0, 5e5, 0, 1, 47e5), "EPSG:32619"))
    for empty in ((100.0, 100.0), (3000.0, 0.0), (0.0, float("nan"))):
        refused("whose first value is the lower", plain, display_range=empty)
    refused("give the range of values", write(tmp_path / "deep.tif", pixels.astype(np.uint16)))
    refused("1 bands", write(tmp_path / "grey.tif", pixels[:, :, :1]))


@pytest.fixture
def root(tmp_path, pixels):
    """A deployment of one tile with a chip."""
    from graft_pipeline.chips import encode
    from graft_pipeline.geometry import Grid

    place = {"sensor": "naip", "region": "N42W071"}
    square = np.ascontiguousarray(pixels[:, :40])
    grid = Grid(32619, 5e5, 47e5, 1.0, 40, 40)
    folder = partition_folder(tmp_path, schemas.CHIPS, **place)
    folder.mkdir(parents=True)
    with ShardWriter(folder, "chips-00000.tar") as shard:
        item = shard.add("naip-7.tif", encode(square, grid))
    row = {field.name: None for field in schemas.CHIPS.schema}
    row |= {"tile_id": "naip-7", "status": "ok", "attempts": 1, "scenes_tried": 1, "epsg": 32619, "x0_m": 5e5,
            "y0_m": 47e5, "gsd_m": 1.0, "chip_px": 40, "shard": "chips-00000.tar", "offset": item.offset,
            "size_bytes": item.size_bytes, "sha256": item.sha256}  # fmt: skip
    import pyarrow as pa

    table = pa.Table.from_pylist([row], schema=schemas.CHIPS.schema)
    write_table(partition_file(tmp_path, schemas.CHIPS, **place), table, schemas.CHIPS)
    return tmp_path


def test_a_tile_is_read_by_its_id(root, pixels, tmp_path_factory):
    made = read_tile(root, "naip-7")
    np.testing.assert_array_equal(made.pixels, pixels[:, :40])
    assert made.gsd_m == 1.0
    for place, tile_id in ((root, "naip-8"), (tmp_path_factory.mktemp("empty"), "naip-7")):
        with pytest.raises(InputError, match="neither a file nor a tile"):
            read_tile(place, tile_id)


def test_graft_ask_answers_with_program_and_evidence(toy_world, root, paint, monkeypatch):
    from graft_pipeline.cli import app

    image = np.concatenate(list(paint(["red", "blue"], 224, np.random.default_rng(0))), axis=1)
    Picture.fromarray(image).save(root / "scene.png")
    words = {name: [name] for name in ("red", "green", "blue", "yellow")}
    (root / "words.json").write_text(json.dumps({"templates": ["a photo of {}"], "classes": words}))
    monkeypatch.setenv("GRAFT_ROOT", str(root))
    monkeypatch.setenv("GRAFT_ENV_FILE", os.devnull)
    monkeypatch.setenv("COLUMNS", "200")
    eyes = ["--encoder", str(toy_world.foundation), "--prompts", str(root / "words.json")]

    def ask(*arguments):
        return CliRunner().invoke(app, ["ask", *arguments, *eyes])

    done = ask(
        str(root / "scene.png"), "Is there a red on the left of the blue?", "--evidence", str(root / "o.png")
    )
    assert done.exit_code == 0, done.output
    assert done.output.startswith('yes\n\nexists(west_of(find("red"), find("blue")))')
    with Picture.open(root / "o.png") as drawn:
        assert drawn.width == 896
    # Twelve metres of a chip are no whole patch, but it can be asked about.
    done = ask("naip-7", "--program", 'count(find("red"))')
    assert done.exit_code == 0, done.output
    # What programs say is shown as it is, not as the terminal's markup.
    done = ask("naip-7", "--program", 'exists(find("red [/b] [blue] :smile:"))')
    assert done.exit_code == 0, done.output
    assert 'exists(find("red [/b] [blue] :smile:")) ' in done.output.split("Steps")[1]
    for arguments, message in (
        (("naip-7", "import os"), "no form that the grammar knows"),
        (("naip-7", "--program", "import os"), "Line 1, column 1"),
        (("naip-9", "Is there a red?"), "neither a file nor a tile"),
        # A grid's tile, which the encoder of its sensor looks at.
        (("naip_grid-9", "Is there a red?"), "neither a file nor a tile"),
        (("mars-9", "Is there a red?"), "No sensor 'mars'"),
        (("naip-7",), "Ask a question"),
        (("naip-7", "Is there a red?", "--writer", "endpoint"), "GRAFT_ANSWER_URL"),
    ):
        done = ask(*arguments)
        assert done.exit_code == 1
        assert message in str(done.exception)

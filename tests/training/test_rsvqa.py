"""RSVQA's files as published, and what becomes of them that are not."""

import json

import numpy as np
import pytest
import rasterio
from typer.testing import CliRunner

from graft_pipeline.cli import app
from graft_pipeline.errors import DataError, InputError, SettingsError
from training.zero_shot.answering.rsvqa import open_question_set

#: (image, type, question, answer) as in the published sets.
HR = [
    (0, "presence", "Is a residential building present?", "yes"),
    (0, "count", "What is the amount of commercial buildings?", "0"),
    (0, "count", "How many residential buildings are there?", "3"),
    (0, "area", "What is the area covered by residential areas?", "10632m2"),
    (0, "area", "What is the area covered by buildings at the bottom of the  residential area?", "106m2"),
    (2, "comp", "Are there less large residential areas than buildings?", "yes"),
    (2, "area", "What is the area covered by square buildings?", "0m2"),
]
LR = [
    (0, "rural_urban", "Is it a rural or an urban area", "rural"),
    (0, "count", "What is the number of roads?", "162"),
    (1, "count", "How many water areas are there?", "0"),
    (1, "presence", "Is there a road in the image?", "no"),
]


def tiff(
    file, value, side=32, bands=3, dtype="uint8", gsd_m=0.1524, crs="EPSG:32618", corner=(500_000, 4_700_000)
):
    file.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "width": side, "height": side, "count": bands, "dtype": dtype}
    transform = rasterio.Affine(gsd_m, 0, corner[0], 0, -gsd_m, corner[1])
    with rasterio.open(file, "w", **profile, crs=crs, transform=transform) as source:
        source.write(np.full((bands, side, side), value, dtype))


@pytest.fixture
def publish(tmp_path):
    """Writes a split as published: entries of other splits are a bare id."""

    def write(prefix, split, rows, images, *, others=2, resolution=".1524m"):
        tables = {"questions": [], "answers": [], "images": []}
        for number in range(others):
            tables["questions"].append({"id": number, "active": False})
            tables["answers"].append({"id": number, "active": False})
        for number, (image, kind, text, answer) in enumerate(rows, start=others):
            common = {"date_added": 1579864753.07, "people_id": 0, "active": True}
            question = {"img_id": image, "type": kind, "question": text, "answers_ids": [number]}
            tables["questions"].append({"id": number, **common, **question})
            tables["answers"].append({"id": number, **common, "question_id": number, "answer": answer})
        for image in range(max(images) + 2):
            row = {"id": image, "active": image in images}
            if row["active"]:
                row |= {"original_name": f"{image}.png", "res_x": resolution, "questions_ids": []}
            tables["images"].append(row)
        for kind, entries in tables.items():
            content = {kind: entries}
            (tmp_path / f"{prefix}_split_{split}_{kind}.json").write_text(json.dumps(content))
        return tmp_path

    return write


def test_high_resolution_is_read_as_published(publish):
    folder = publish("USGS", "test", HR, {0, 2})
    publish("USGS", "train", HR[:2] * 2, {5})
    tiff(folder / "Data" / "2.tif", 77)
    made = open_question_set("rsvqa_hr", folder)
    assert [(of.image_id, of.type, of.text) for of in made.questions] == [row[:3] for row in HR]
    assert [of.answer for of in made.questions] == [True, 0, 3, 10632, 106, True, 0]
    assert [made.label(of.type, of.answer) for of in made.questions] == [
        "yes", "0", "3", "more than 1000m2", "between 100m2 and 1000m2", "yes", "0m2",
    ]  # fmt: skip
    assert made.gsd_m(0) == 0.1524
    assert len(made.prior) == 4
    assert made.read(2).shape == (32, 32, 3)
    assert (made.read(2) == 77).all()
    with pytest.raises(DataError, match="download the set again"):
        made.read(0)


def test_images_put_in_the_place_of_the_published_ones_have_their_own_size(publish):
    """The paper asks RSVQA-HR's questions about NAIP's images."""
    folder = publish("USGS", "test", HR, {0, 2})
    tiff(folder / "Data" / "0.tif", 7, gsd_m=0.6)
    # New York in US survey feet.
    tiff(folder / "Data" / "2.tif", 7, gsd_m=0.5, crs="EPSG:2263", corner=(984_250, 194_305))
    made = open_question_set("rsvqa_hr", folder)
    assert made.gsd_m(0) == pytest.approx(0.6)
    assert made.gsd_m(2) == pytest.approx(0.1524, rel=1e-4)
    # Without coordinates, and where none is there: as published.
    tiff(folder / "Data" / "0.tif", 7, gsd_m=0.6, crs=None)
    (folder / "Data" / "2.tif").write_bytes(b"no image")
    assert made.gsd_m(0) == made.gsd_m(2) == 0.1524


def test_low_resolution_counts_by_ranges(publish):
    made = open_question_set("rsvqa_lr", publish("LR", "test", LR, {0, 1}, resolution="10m"))
    assert [made.label(of.type, of.answer) for of in made.questions] == [
        "rural", "between 100 and 1000", "0", "no",
    ]  # fmt: skip
    assert made.prior == ()
    assert made.gsd_m(1) == 10


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, "0"), (1, "between 0 and 10"), (10, "between 0 and 10"), (11, "between 10 and 100"),
        (100, "between 10 and 100"), (1000, "between 100 and 1000"), (1001, "more than 1000"), (2.5, None),
        (True, None), ("3", None), (-1, None), (float("nan"), None), (float("inf"), None),
    ],
)  # fmt: skip
def test_ranges_end_where_the_authors_end_them(publish, value, label):
    made = open_question_set("rsvqa_lr", publish("LR", "test", LR, {0, 1}))
    assert made.label("count", value) == label


def test_areas_lose_their_fraction_as_the_authors_did(publish):
    made = open_question_set("rsvqa_hr", publish("USGS", "test", HR, {0, 2}))
    assert made.label("area", 0.9) == "0m2"
    assert made.label("area", 10.9) == "between 0m2 and 10m2"
    assert made.label("presence", 1) is None
    assert made.label("rural_urban", "forest") is None


def test_what_cannot_be_asked_is_counted(publish):
    odd = [
        (0, "population", "How many people live in this area?", "7"),
        (0, "count", "How many roads are there?", "some"),
        (0, "area", "What is the area covered by roads?", "12"),
        (9, "presence", "Is there a road?", "yes"),
        (0, "presence", "Is there a road?", "maybe"),
    ]
    folder = publish("USGS", "test_phili", [*HR, *odd], {0, 2})
    file = folder / "USGS_split_test_phili_answers.json"
    content = json.loads(file.read_text())
    content["answers"][3]["active"] = False
    file.write_text(json.dumps(content))
    file = folder / "USGS_split_test_phili_questions.json"
    content = json.loads(file.read_text())
    del content["questions"][4]["img_id"]
    content["questions"][5]["answers_ids"] = None
    file.write_text(json.dumps(content))
    made = open_question_set("rsvqa_hr_phili", folder)
    assert len(made) == len(HR) - 3
    assert made.skipped == {
        "unknown type 'population'": 1,
        "answer of another kind": 3,
        "image not in the list": 1,
        "no answer": 2,
        "no image named": 1,
    }


@pytest.mark.parametrize(
    "content", ["", "[]", '{"questions": 3}', '{"questions": [{"id": "a"}]}', '{"questions": [1]}', "{"]
)
def test_broken_files_are_named(publish, content):
    folder = publish("USGS", "test", HR, {0, 2})
    (folder / "USGS_split_test_questions.json").write_text(content)
    with pytest.raises(InputError, match=r"USGS_split_test_questions\.json is not as published"):
        open_question_set("rsvqa_hr", folder)


@pytest.mark.parametrize(("name", "source"), [("rsvqa_lr", "6344334"), ("rsvqa_hr", "6344367")])
def test_an_absent_set_says_where_to_get_it_and_where_to_put_it(tmp_path, name, source):
    with pytest.raises(
        InputError, match=rf"holds no .*download .*{source}.*unpack it to .*/, and give the folder"
    ):
        open_question_set(name, tmp_path)


def test_images_of_other_kinds_are_no_pictures(publish):
    folder = publish("USGS", "test", HR, {0, 2})
    tiff(folder / "Data" / "0.tif", 3, dtype="uint16")
    tiff(folder / "Data" / "2.tif", 3, bands=1)
    made = open_question_set("rsvqa_hr", folder)
    for image in (0, 2):
        with pytest.raises(DataError, match="download the set again"):
            made.read(image)


def test_a_sample_is_drawn_by_its_seed_and_asks_nothing_twice(publish):
    made = open_question_set("rsvqa_hr", publish("USGS", "test", [*HR, *HR], {0, 2}))
    assert len(made.sampled(0, 0)) == len(HR)
    drawn = [made.sampled(4, seed).questions for seed in (0, 0, 1)]
    assert [len(some) for some in drawn] == [4, 4, 4]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [of.image_id for of in drawn[0]] == sorted(of.image_id for of in drawn[0])


def test_one_command_answers_and_puts_the_papers_table_beside(
    publish, toy_world, paint, tmp_path, monkeypatch
):
    monkeypatch.setenv("GRAFT_ROOT", str(tmp_path / "data"))
    random, colours = np.random.default_rng(0), ("red", "green", "blue", "yellow")
    rows = [(n, "presence", f"Is there a {name}?", "yes") for n, name in enumerate(colours)]
    rows += [(n, "presence", f"Is there a {colours[n - 1]}?", "no") for n in range(4)]
    rows += [(n, "area", f"What is the area covered by {name}s?", "6088m2") for n, name in enumerate(colours)]
    rows += [
        (0, "count", "How many circles with 3 corners are there?", "1"),
        (4, "presence", "Is there a red?", "yes"),
    ]
    # At a metre per pixel: of the published 15 cm an image shows less than a patch of the toy encoder.
    folder = publish("USGS", "test", rows, set(range(5)))
    for n, name in enumerate(colours):
        (picture,) = paint([name], 512, random)
        tiff(folder / "Data" / f"{n}.tif", np.moveaxis(picture, -1, 0), side=512, gsd_m=1.0)
    words = {"templates": ["{}"], "classes": {name: [name] for name in colours}}
    (tmp_path / "words.json").write_text(json.dumps(words))
    command = ["evaluate", "rsvqa_hr", "--data", str(folder), "--prompts", str(tmp_path / "words.json")]
    command += ["--contender", f"toy=folder:{toy_world.foundation}", "-o", str(tmp_path / "report")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "13 questions of 4 images scored; left out: image cannot be decoded 1" in done.output
    saved = json.loads((tmp_path / "report" / "rsvqa_hr.json").read_text())
    found = {name: measure["value"] for name, measure in saved["metrics"]["questions"]["toy"].items()}
    assert (found["presence"], found["area"], found["count"]) == (1, 1, 0)
    assert saved["unanswered"] == {"toy": {"no program": 1}}
    assert not saved["has_prior"]
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert (
        "| ViperGPT with GRAFT (paper) | questions | 61.46 | 32.04 | 50.34 | 44.38 | 44.05 |  |" in markdown
    )
    assert "| toy | questions | 100.00 ± 0.00 | 100.00 ± 0.00 |  | 0.00 ± 0.00 |" in markdown
    assert "- toy gave no answer, which counts as wrong: no program 1" in markdown
    assert "No other split is there" in markdown
    few = CliRunner().invoke(app, [*command, "--questions", "3"])
    assert "3 questions of" in few.output
    unset = CliRunner().invoke(app, [*command, "--writer", "endpoint"])
    assert isinstance(unset.exception, SettingsError)
    assert "set GRAFT_ANSWER_URL" in str(unset.exception)

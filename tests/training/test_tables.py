import json
import os

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner
from upath import UPath

from graft_pipeline.cli import app
from graft_pipeline.errors import DataError, InputError
from training.zero_shot.benchmarks import evaluate_dataset
from training.zero_shot.catalogue import DATASETS
from training.zero_shot.datasets import EUROSAT_CLASSES
from training.zero_shot.tables import (
    drops,
    paper_tables,
    read_evaluations,
    table_rows,
    write_evaluation_report,
)


@pytest.fixture
def eurosat(tmp_path, paint):
    """EuroSAT's folders, three images each, in the four colours that the toy CLIP knows."""
    random = np.random.default_rng(0)
    for number, name in enumerate(EUROSAT_CLASSES):
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        colour = ("red", "green", "blue", "yellow")[number % 4]
        for each, picture in enumerate(paint([colour] * 3, 64, random), start=1):
            Image.fromarray(picture).save(folder / f"{name}_{each}.jpg")
    return tmp_path / "eurosat"


def test_one_command_gives_the_papers_table_with_ours_in_it(eurosat, toy_world, tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_ROOT", str(tmp_path / "data"))
    monkeypatch.setenv("GRAFT_ENV_FILE", os.devnull)
    command = ["evaluate", "eurosat", "--data", str(eurosat), "-o", str(tmp_path / "report"), "--draws", "2"]
    missing = CliRunner().invoke(app, command)
    assert isinstance(missing.exception, InputError)
    assert "materialise sentinel2/image_encoder" in str(missing.exception)
    done = CliRunner().invoke(app, [*command, "--contender", f"toy=folder:{toy_world.foundation}"])
    assert done.exit_code == 0, done.output
    assert "30 images scored" in done.output
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert (
        "| GRAFT, ViT-B/16 (paper) | zero-shot | 63.76 | 32.46 | 81.56 | 85.21 | 49.61 | 53.86 |" in markdown
    )
    own = [line for line in markdown.splitlines() if line.startswith("| toy |")]
    assert [line.split("|")[2].strip() for line in own] == ["zero-shot", "one-shot"]
    assert own[0].count("±") == 3
    saved = read_evaluations(UPath(tmp_path / "report"))["eurosat"]
    value = 100 * saved["metrics"]["zero-shot"]["toy"]["accuracy"]["value"]
    assert f"| {value:.2f} ±" in own[0]
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/") == 3
    assert {file.name for file in (tmp_path / "report" / "eurosat").iterdir()} == {
        "confusion_toy.png",
        "retrieved_first_toy.jpg",
        "retrieved_last_of_the_class_toy.jpg",
    }
    # Evaluated anew with another model, nothing of the first one is left.
    command += ["--contender", f"other=folder:{toy_world.foundation}"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "report" / "eurosat").iterdir())) == 3
    assert "toy" not in (tmp_path / "report" / "report.md").read_text()
    assert (tmp_path / "report" / "report.html").read_text().count("data:image/") == 3


def test_every_dataset_of_the_papers_tables_can_be_evaluated(tmp_path):
    named = {dataset for table in paper_tables().values() for dataset, *_ in table["columns"]}
    assert named <= {*DATASETS, "naip_osm"}
    for table in paper_tables().values():
        assert all(len(values) == len(table["columns"]) for _, _, values in table["rows"])
    for name in DATASETS:
        with pytest.raises(InputError, match="download"):
            evaluate_dataset(name, tmp_path, [], None, UPath(tmp_path))
    with pytest.raises(InputError, match="use one of eurosat"):
        evaluate_dataset("imagenet", tmp_path, [], None, UPath(tmp_path))


def measures(value, half):
    return {"value": value, "low": value - half, "high": value + half}


def evaluation(value, half=0.01):
    return {"metrics": {"zero-shot": {"ours": {"accuracy": measures(value, half)}}}}


@pytest.mark.parametrize(
    ("now", "half", "falls"),
    [(0.70, 0.01, False), (0.695, 0.01, False), (0.68, 0.03, False), (0.60, 0.02, True), (0.80, 0.01, False)],
)
def test_a_drop_is_one_beyond_the_noise(now, half, falls):
    found = drops(evaluation(now, half), evaluation(0.70), contenders=["ours", "unknown"])
    assert found == ([("ours", "zero-shot", "accuracy", 0.70, now)] if falls else [])


def test_columns_without_an_evaluation_stay_empty():
    rows = table_rows(paper_tables()["Table 1"], {"eurosat": evaluation(0.5)})
    assert rows[-1] == ("ours", "zero-shot", ["50.00 ± 1.00", "", "", "", "", ""])


def test_files_that_are_no_evaluations_are_named(tmp_path):
    with pytest.raises(InputError, match="evaluate a dataset first"):
        write_evaluation_report(UPath(tmp_path))
    (tmp_path / "x.json").write_text(json.dumps([1]))
    with pytest.raises(DataError, match=r"x\.json is no evaluation"):
        read_evaluations(UPath(tmp_path))

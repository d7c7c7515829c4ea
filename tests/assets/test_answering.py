"""The planet's questions and RSVQA's in one deployment: asked, answered, reported, gated."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from training.zero_shot.answering.rsvqa import KINDS
from training.zero_shot.benchmarks import OURS

BOUNDS = (-70.5, 43.0, -70.38, 43.1)


@pytest.fixture(scope="module")
def deployment(planet, deploy_for_module, tmp_path_factory):
    """With questions, their scores and an evaluation; its encoder is any CLIP: what it knows is not the point here."""
    published = tmp_path_factory.mktemp("published")
    deployment = deploy_for_module(
        planet_url=planet.url, benchmark_bounds=BOUNDS, evaluation_data={"rsvqa_hr": str(published)}
    )
    deployment.materialise("openclip/foundation")
    models = deployment.folder / "data" / "models"
    shutil.copytree(models / "foundation", models / "sensor=naip" / "pixel_encoder" / "encoder")
    config = {"ops": {"naip__questions": {"config": {"images": 8, "per_type": 6}}}}
    deployment.materialise("naip/questions", "naip/question_scores", run_config=config)
    # The same format under RSVQA's names.
    own = deployment.folder / "data" / "questions" / "sensor=naip"
    shutil.copytree(own / "Images", published / "Data")
    for file in own.glob("PLANET_split_*.json"):
        name = file.name.replace("PLANET", "USGS").replace("_val_", "_train_")
        (published / name).write_text(file.read_text().replace('"relation"', '"presence"'))
    config = {"ops": {"evaluation__rsvqa_hr": {"config": {"release": True}}}}
    done = deployment.materialise("evaluation/rsvqa_hr", run_config=config)
    assert [check.passed for check in done.get_asset_check_evaluations()] == [True]
    return deployment


def test_scores_are_stale_when_their_code_words_or_ranges_change(tmp_path):
    """In a copy of the code, each file in turn is changed."""
    home = Path(__file__).parents[2]
    for folder in ("assets", "graft_pipeline", "resources", "training"):
        shutil.copytree(
            home / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "static")
        )
    answering = tmp_path / "training" / "zero_shot" / "answering"
    files = [answering / f"{name}.py" for name in ("phrases", "grammar", "interpreter", "rsvqa", "scoring")]
    files += [
        answering / "concepts.json",
        tmp_path / "training" / "zero_shot" / "prompt_sets" / "planet.json",
    ]
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from assets.answering import answers_version
from graft_pipeline import provenance
assert Path(provenance.__file__).is_relative_to({str(tmp_path)!r})
print(answers_version())
for file in {[str(file) for file in files]!r}:
    with open(file, "a") as opened:
        opened.write("\\n")
    provenance._source_of.cache_clear()
    print(answers_version())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert len(set(done.stdout.split())) == 1 + len(files)


def test_questions_are_asked_of_ground_that_no_tile_touches(deployment):
    metadata = deployment.metadata("naip/questions")
    assert metadata["images"].value == 8
    assert metadata["questions"].value > 25
    assert metadata["test/presence"].value == 6
    assert "data:image/" in metadata["preview"].value


def test_scores_stand_beside_the_foundations_and_the_priors(deployment):
    metadata = deployment.metadata("naip/question_scores")
    table = metadata["accuracy"].value.splitlines()
    assert table[0] == "| type | questions | pixel_encoder | foundation | prior only | question only |"
    assert {row.split(" | ")[0].strip("| ") for row in table[2:]} <= {*KINDS, "average", "overall"}
    # The same weights answer the same.
    assert metadata["average/pixel_encoder"].value == metadata["average/foundation"].value
    asked = deployment.metadata("naip/questions")
    assert metadata["questions"].value == sum(
        asked[f"test/{kind}"].value for kind in KINDS if f"test/{kind}" in asked
    )
    for picture in ("accuracy_of_answers", "examples_pixel_encoder", "answers_area_foundation"):
        assert "data:image/" in metadata[picture].value
    scores = Path(deployment.folder) / "data" / "scores" / "sensor=naip" / "questions.json"
    own = json.loads(scores.read_text())["questions"]
    assert own["prior only"]["presence"] == pytest.approx(metadata["presence/prior only"].value, abs=1e-4)


def test_rsvqa_is_evaluated_with_the_papers_rows_beside(deployment):
    report = (deployment.folder / "data" / "evaluation" / "report.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in report.splitlines() if line.startswith("| ")}
    assert "| 72.04 | 22.91 | 48.98 | 23.57 | 37.69 |" in rows["ViperGPT with GLIP (paper)"]
    assert rows[OURS].count("±") == rows["prior only"].count("±") == 6
    assert (deployment.folder / "data" / "evaluation" / "released" / "rsvqa_hr.json").exists()

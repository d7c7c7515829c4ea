"""The demo: what it refuses before anything is replaced."""

from pathlib import Path

from typer.testing import CliRunner

from graft_pipeline.cli import app
from graft_pipeline.demo import prepare


def test_a_seed_that_no_generator_takes_is_refused_before_the_last_demo_goes(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    prepare(folder, 0, is_small=True)
    (folder / "scores.json").write_text("{}")
    done = CliRunner().invoke(app, ["demo", "--small", "--seed", "-1", "--folder", str(folder)])
    assert done.exit_code == 2, done.output
    assert "--seed" in done.output
    assert (folder / "scores.json").exists()

"""The command line as its users meet it: help, exit codes, messages."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import psutil
import pytest
from typer.testing import CliRunner

from graft_pipeline import backfills
from graft_pipeline.cli import app
from graft_pipeline.cli_shared import check_output, print_table
from graft_pipeline.demo import Runner, prepare
from graft_pipeline.errors import GraftError, InputError

COMMANDS = [
    [],
    ["demo"],
    ["collect"],
    ["planet"],
    ["planet", "serve"],
    ["areas"],
    ["areas", "add"],
    ["areas", "list"],
    ["photos"],
    ["photos", "purge"],
    ["query"],
    ["ask"],
    ["search"],
    ["map"],
    ["serve"],
    ["status"],
    ["trace"],
]


def graft(*arguments: str, root: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **environment}
    if root:
        variables["GRAFT_ROOT"] = str(root)
    command = [sys.executable, "-m", "graft_pipeline.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=120)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "-".join(command) or "graft")
def test_help_says_what_a_command_does(command: list[str]) -> None:
    done = graft(*command, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
    assert len(done.stdout.splitlines()) > 5


def test_an_unknown_command_is_wrong_usage() -> None:
    assert graft("no-such-command").returncode == 2


def test_a_purge_says_what_it_did_or_what_is_wrong(tmp_path: Path) -> None:
    assert graft("photos", "purge", root=tmp_path).returncode == 2
    done = graft("photos", "purge", "no id", root=tmp_path)
    assert (done.returncode, "no id" in done.stderr) == (1, True)
    done = graft("photos", "purge", "123", "--owner", "7@N00", root=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "newly listed photos" in done.stdout
    # Whoever names the wrong deployment sees it.
    assert f"Purged from {tmp_path}" in " ".join(done.stdout.split())
    traced = graft("trace", "123", "-o", str(tmp_path / "123.md"), root=tmp_path)
    assert traced.returncode == 0, traced.stderr
    assert "photo 123 was purged" in traced.stdout
    assert "photo 123 was purged" in (tmp_path / "123.md").read_text()
    unknown = graft("trace", "124", root=tmp_path)
    assert (unknown.returncode, "No tile or photo '124'" in unknown.stderr) == (1, True)
    listed = graft("query", "SELECT photo_id, reason FROM purged_photos", "--csv", root=tmp_path)
    assert listed.stdout.split() == ["photo_id,reason", "123,requested"]


def test_a_missing_area_file_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    done = graft("areas", "add", "nowhere.geojson", root=tmp_path)
    assert done.returncode == 1
    assert "nowhere.geojson" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_real_state_is_registered_and_listed(real_data: Path, tmp_path: Path) -> None:
    states = str(real_data / "us_states.geojson")
    done = graft(
        "areas", "add", states, "--where", "name='Rhode Island'", "--name", "rhode-island", root=tmp_path
    )
    assert done.returncode == 0, done.stderr
    # Rhode Island lies between 71.1 and 71.9 W, 41.1 and 42.0 N, with Block Island: two degree cells.
    listed = graft("areas", "list", root=tmp_path)
    assert "rhode-island" in listed.stdout
    assert "-71.86" in listed.stdout
    nothing = graft("areas", "add", states, "--where", "name='Atlantis'", root=tmp_path)
    assert nothing.returncode == 1
    assert "Atlantis" in nothing.stderr


def test_query_answers_on_an_empty_deployment_and_explains_wrong_sql(tmp_path: Path) -> None:
    done = graft("query", "SELECT count(*) AS pairs FROM pairs", "--csv", root=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(csv.reader(io.StringIO(done.stdout))) == [["pairs"], ["0"]]
    wrong = graft("query", "SELECT * FROM no_such_view", root=tmp_path)
    assert wrong.returncode == 1
    assert "flickr_photos" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["-- nothing"], "no SQL"), (["SELECT '\udcff'"], "UTF-8"), (["SELECT 1", "--limit", "-1"], "--limit")],
)
def test_a_query_that_cannot_be_asked_is_a_message(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = graft("query", *arguments[1:], "--", arguments[0], root=tmp_path)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_query_says_when_it_shows_not_all_and_prints_in_any_encoding(tmp_path: Path) -> None:
    numbers = "SELECT 'é漢' || range AS word FROM range(3)"
    some = graft("query", numbers, "--csv", "--limit", "2", root=tmp_path, PYTHONIOENCODING="ascii")
    assert some.stdout.split() == ["word", "\\xe9\\u6f220", "\\xe9\\u6f221"]
    assert "--limit 0" in some.stderr
    every = graft("query", numbers, "--csv", "--limit", "3", root=tmp_path, PYTHONIOENCODING="utf-8")
    assert (len(every.stdout.split()), every.stderr) == (4, "")


def test_an_interrupted_query_ends_without_a_traceback(tmp_path: Path) -> None:
    endless = "SELECT sum(random()) FROM range(1000000000000)"
    command = [sys.executable, "-u", "-m", "graft_pipeline.cli", "query", endless]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        # DuckDB's threads are there once several run.
        deadline = time.monotonic() + 60
        while len(psutil.Process(process.pid).threads()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["segment", "scene.tif", "forest", "-o", "scene.tif"],
        ["ask", "scene.tif", "How many lakes are there?", "--evidence", "link.tif"],
        ["search", "--photo", "scene.tif", "--sheet", "scene.tif"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_is_read_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    (tmp_path / "scene.tif").write_bytes(b"mine")
    (tmp_path / "link.tif").symlink_to("scene.tif")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="would be lost"):
        app(arguments, standalone_mode=False)
    assert (tmp_path / "scene.tif").read_bytes() == b"mine"


@pytest.mark.parametrize("output", ["file/map.tif", "folder"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        check_output(tmp_path / output)


def test_a_table_that_is_too_wide_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    columns = [f"column_{number}" for number in range(40)]
    print_table("wide", columns, [[f"value_{number}" for number in range(40)]])
    printed = capsys.readouterr().out.splitlines()
    assert {f"column_{number}: value_{number}" for number in range(40)} <= set(printed)


def test_a_run_that_is_interrupted_is_an_interruption() -> None:
    @dg.asset
    def endless() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    with dg.DagsterInstance.ephemeral() as instance:
        runner = Runner(dg.Definitions(assets=[endless]), instance)
        with pytest.raises(KeyboardInterrupt):
            runner.materialise(dg.AssetKey("endless"))
        (run,) = instance.get_runs()
    assert run.status == dg.DagsterRunStatus.FAILURE


def test_status_without_anything_says_what_to_do(tmp_path: Path) -> None:
    done = graft("status", root=tmp_path)
    assert done.returncode == 0
    assert "graft areas add" in done.stdout


def test_settings_errors_are_messages(tmp_path: Path) -> None:
    done = graft("status", root=tmp_path, GRAFT_GRID_DEG="0.7")
    assert done.returncode == 1
    assert "GRAFT_GRID_DEG" in done.stderr


def test_a_demo_never_deletes_a_folder_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    done = graft("demo", "--folder", str(tmp_path))
    assert done.returncode == 1
    assert (tmp_path / "precious.txt").read_text() == "x"


def test_a_demo_replaces_only_what_a_demo_made(tmp_path: Path) -> None:
    """A deployment's own settings may have the name of a demo's, and notes may lie beside them."""
    folder, data = tmp_path / "deployment", tmp_path / "deployment" / "data"
    data.mkdir(parents=True)
    (folder / "settings.env").write_text("GRAFT_FLICKR_KEY=key\n")
    (data / "collected.parquet").write_text("x")
    with pytest.raises(GraftError, match="--folder"):
        prepare(folder, 0, is_small=True)
    assert (data / "collected.parquet").exists()
    own = tmp_path / "demo"
    prepare(own, 0, is_small=True)
    for path in (own / "notes.txt", own / "scores.json", own / "data" / "world.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    prepare(own, 1, is_small=True)
    names = {path.name for path in own.iterdir()}
    assert names == {"notes.txt", "settings.env", "area.geojson", "dagster_home"}


def test_a_root_that_is_no_folder_and_a_demo_in_a_file_are_messages(tmp_path: Path) -> None:
    file = tmp_path / "area.geojson"
    ring = [[0.1, 0.1], [0.2, 0.1], [0.2, 0.2], [0.1, 0.1]]
    file.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    added = graft("areas", "add", str(file), root=file)
    demo = graft("demo", "--folder", str(file))
    assert (added.returncode, demo.returncode) == (1, 1)
    assert "GRAFT_ROOT" in added.stderr
    assert "--folder" in demo.stderr
    assert "Traceback" not in added.stderr + demo.stderr


def test_an_area_that_cannot_be_collected_here_is_a_message_and_leaves_nothing(tmp_path: Path) -> None:
    file, folder = tmp_path / "area.geojson", tmp_path / "deployment"
    ring = [[0.0, 0.0], [5.0, 0.0], [5.0, 5.0], [0.0, 5.0], [0.0, 0.0]]
    file.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    large = graft("collect", str(file), "--folder", str(folder))
    assert large.returncode == 1
    assert "400 regions" in large.stderr
    assert "backfill" in large.stderr
    assert not list(folder.glob("data/areas/*"))
    missing = graft("collect", str(tmp_path / "nowhere.geojson"), "--folder", str(tmp_path / "other"))
    assert missing.returncode == 1
    assert not (tmp_path / "other").exists()


def test_a_folder_holds_over_what_is_exported_and_after_a_start_that_failed(tmp_path: Path) -> None:
    """The area is too large at the folder's grid, and nothing of what is exported is looked at or written."""
    file, folder = tmp_path / "area.geojson", tmp_path / "Anna's #1 demo"
    ring = [[0.0, 0.0], [5.0, 0.0], [5.0, 5.0], [0.0, 5.0], [0.0, 0.0]]
    file.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    home, kept = folder / "dagster_home", folder / "data" / "kept.txt"
    exported = {
        "GRAFT_ROOT": str(tmp_path / "production"),
        "GRAFT_GRID_DEG": "0.7",
        "GRAFT_WORLD": "production",
    }
    for _ in range(2):
        done = graft("collect", str(file), "--folder", str(folder), **exported)
        assert "400 regions" in done.stderr, done.stderr
        assert (home / "dagster.yaml").exists()
        assert not kept.exists() or kept.read_text() == "x"
        # As a start leaves it that ends between the two files, in a folder that is used already.
        (home / "dagster.yaml").unlink()
        kept.parent.mkdir(exist_ok=True)
        kept.write_text("x")
    assert kept.exists()
    status = graft("status", GRAFT_ENV_FILE=str(folder / "settings.env"))
    assert status.returncode == 0, status.stderr
    assert {path.name for path in tmp_path.iterdir()} == {file.name, folder.name}
    assert {path.name for path in folder.iterdir()} == {"settings.env", "dagster_home", "data"}


def test_without_an_area_the_list_says_how_to_add_one(tmp_path: Path) -> None:
    listed = graft("areas", "list", root=tmp_path)
    assert listed.returncode == 0
    assert "graft areas add" in listed.stdout


def test_a_mount_without_a_file_is_wrong_usage() -> None:
    assert graft("planet", "serve", "--mount", "naip", "--port", "0").returncode == 2


def test_an_area_from_geojson_without_python(tmp_path: Path) -> None:
    ring = [[-71.4, 42.1], [-71.2, 42.1], [-71.2, 42.2], [-71.4, 42.2], [-71.4, 42.1]]
    file = tmp_path / "mine.geojson"
    file.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    done = graft("areas", "add", str(file), root=tmp_path / "data", GRAFT_GRID_DEG="0.25")
    assert done.returncode == 0, done.stderr
    assert "mine: 2 regions" in done.stdout


def test_another_area_of_the_same_name_is_said_to_be_replaced(tmp_path: Path) -> None:
    for name, west in (("a.geojson", 1.0), ("A.geojson", 1.0), ("a .geojson", 2.0)):
        ring = [[west, 5.0], [west + 0.1, 5.0], [west + 0.1, 5.1], [west, 5.0]]
        (tmp_path / name).write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    runs = [
        CliRunner().invoke(
            app, ["areas", "add", str(tmp_path / name)], env={"GRAFT_ROOT": str(tmp_path / "data")}
        )
        for name in ("a.geojson", "A.geojson", "a .geojson")
    ]
    assert [run.exit_code for run in runs] == [0, 0, 0]
    assert ["replaces another area" in run.stderr for run in runs] == [False, False, True]


def test_a_demos_settings_name_its_instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path / "demo", 0, is_small=True)
    monkeypatch.setenv("GRAFT_ENV_FILE", str(tmp_path / "demo" / "settings.env"))
    assert backfills.dagster_home() == str(tmp_path / "demo" / "dagster_home")
    monkeypatch.setenv("DAGSTER_HOME", "/elsewhere")
    assert backfills.dagster_home() == "/elsewhere"

"""The walls: who may import whom, and what loading the definitions may cost."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("graft_pipeline", "resources", "training", "assets")
ALLOWED = {
    "graft_pipeline": {"graft_pipeline"},
    "resources": {"resources", "graft_pipeline"},
    "training": {"training", "graft_pipeline"},
    "assets": {"assets", "resources", "training", "graft_pipeline"},
}
#: Modules of graft_pipeline that compose the graph, and so may import Dagster and the other packages.
COMPOSITION = {
    "definitions.py",
    "partitions.py",
    "automation.py",
    "conditions.py",
    "instance.py",
    "backfills.py",
    "demo.py",
    "cli.py",
    "cli_encoders.py",
    "cli_shared.py",
}
HEAVY = {"torch", "ee", "flickrapi", "open_clip", "torchvision"}


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    is_composition = package == "graft_pipeline" and path.name in COMPOSITION
    used = imports(path)
    if not is_composition:
        assert used & set(PACKAGES) <= ALLOWED[package]
    if package != "assets" and not is_composition:
        assert "dagster" not in used
    if package == "graft_pipeline" and not is_composition:
        assert not used & HEAVY
    if package in {"resources", "assets"}:
        assert not imports(path, top_level_only=True) & HEAVY, (
            "import torch, ee and flickrapi inside functions"
        )
    if package == "assets":
        assert "__future__" not in used, "Dagster reads annotations"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_lives_in_it(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, "a module opens with two sentences: what lives here, what does not"


def test_there_is_no_init_under_tests() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_index_or_machine_path_is_committed() -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile", "README.md", ".ci/run"):
        text = (ROOT / name).read_text()
        assert not re.search(r"--(extra-)?index-url|https?://[^ ]*(pypi|simple)/|/work/|/opt/", text), name


def test_definitions_load_without_torch_ee_or_any_setting() -> None:
    program = (
        "import sys; from graft_pipeline.definitions import defs; "
        "heavy = {'torch', 'ee', 'flickrapi', 'open_clip', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy; "
        "print(len(defs.resolve_asset_graph().get_all_asset_keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": ""},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.strip().splitlines()[-1]) > 20


def test_constraints_pin_the_pair_of_torch_and_torchvision() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert "torch==2.12.1" in lines
    assert "torchvision==0.27.1" in lines

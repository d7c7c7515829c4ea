"""Writes the pages of docs/reference from the code: settings, command line, assets, datasets, Python API.

They are not committed, so they cannot be out of date; `make docs` runs this first. Nothing is written by hand there.
"""

import ast
import html
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "reference"
SETTINGS = ROOT / "graft_pipeline" / "settings.py"
_HEADINGS = {"planet": "The planet", "kubernetes": "Pods of trainings"}
PACKAGES = {
    "graft_pipeline": "What GRAFT means: regions, photos, tiles, scenes, pairs, splits, and the checks of their rules.",
    "resources": "Who is called: Flickr, Earth Engine, STAC, image hosts, storage, frozen models; and the planet.",
    "training": "How encoders learn and what they can do then; plain PyTorch, without Dagster.",
}


@dataclass(frozen=True)
class Setting:
    """One environment variable.

    Attributes:
        variable: its name.
        kind: its Python type, as written.
        default: as written; None: it has none.
        description: the `#:` comment above it.
        section: heading that it stands below in settings.py, or that of its nested model.
    """

    variable: str
    kind: str
    default: str | None
    description: str
    section: str


def settings() -> list[Setting]:
    """Every setting, those of nested models included, in the order of settings.py."""
    text = SETTINGS.read_text()
    lines = text.splitlines()
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    nested = {"planet": "PlanetSettings", "kubernetes": "KubernetesSettings"}

    def of(name: str, prefix: str, section: str) -> Iterator[Setting]:
        body = classes[name].body
        first = body[0].lineno
        for node in body:
            for line in lines[first - 1 : node.lineno]:
                if found := re.fullmatch(r" +# --- (.+) ---", line):
                    section = found[1][0].upper() + found[1][1:]
            first = node.lineno
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            field = node.target.id
            if field == "model_config":
                continue
            if field in nested:
                yield from of(nested[field], f"{prefix}{field.upper()}__", _HEADINGS[field])
                continue
            above = []
            number = node.lineno - 2
            while lines[number].strip().startswith("#:"):
                above.append(lines[number].strip().removeprefix("#:").strip())
                number -= 1
            kind = ast.unparse(node.annotation)
            yield Setting(
                f"GRAFT_{prefix}{field.upper()}", kind, _default(node.value), " ".join(above[::-1]), section
            )

    return list(of("Settings", "", "Storage and grid"))


def _default(value: ast.expr | None) -> str | None:
    """A default as it is written, that of a pydantic Field taken out of it."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        keywords = {word.arg: word.value for word in value.keywords}
        if "default_factory" in keywords:
            return f"{ast.unparse(keywords['default_factory'])}()"
        value = value.args[0] if value.args else None
    return None if value is None else ast.unparse(value)


def _cell(text: object) -> str:
    """Text that may stand in a table's cell; `_code` has made what it made of code."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def _code(text: object) -> str:
    """Code in a table's cell: within backticks a | cannot be escaped."""
    return f"<code>{html.escape(str(text), quote=False).replace('|', '&#124;')}</code>"


def _table(columns: list[str], rows: list[list[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines) + "\n"


def settings_page() -> str:
    """The page of settings."""
    parts = [
        "# Settings\n",
        "Environment variables, or lines of the file that `GRAFT_ENV_FILE` names (default `.env`). Lists and tables "
        'are written as JSON: `["a", "b"]`. Secrets (`SecretStr`) come from nowhere else and are never shown.\n',
    ]
    sections: dict[str, list[list[object]]] = {}
    for setting in settings():
        default = "" if setting.default in (None, "None") else _code(setting.default)
        row = [_code(setting.variable), _code(setting.kind), default, setting.description]
        sections.setdefault(setting.section, []).append(row)
    for section, rows in sections.items():
        parts += [f"## {section}\n", _table(["variable", "type", "default", "meaning"], rows)]
    return "\n".join(parts)


def cli_page() -> str:
    """The page of the command line, by typer itself."""
    command = [sys.executable, "-m", "typer", "graft_pipeline.cli", "utils", "docs", "--name", "graft"]
    done = subprocess.run(
        [*command, "--title", "Command line"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return done.stdout


def datasets_page() -> str:
    """The page of every Parquet schema."""
    from graft_pipeline import lineage, schemas

    parts = [
        "# Datasets\n",
        "Parquet files below the storage root, `dataset/partition=.../dataset.parquet`; each is a view of "
        "`graft query`. Columns that end in a partition's name are folders, not in the files.\n",
    ]
    found = [value for value in vars(schemas).values() if isinstance(value, schemas.Dataset)]
    for dataset in sorted(found, key=lambda dataset: dataset.name):
        parts.append(f"## {dataset.name}\n")
        partitions = ", ".join(f"`{name}`" for name in dataset.partitions) or "none"
        parts.append(f"Key: {', '.join(f'`{name}`' for name in dataset.key)}. Partitions: {partitions}.\n")
        rows: list[list[object]] = [
            [
                _code(field.name),
                _code(field.type),
                "yes" if field.nullable else "",
                (field.metadata or {}).get(b"description", b"").decode(),
                lineage.in_words(dataset.name, field.name) if dataset.name in lineage.UPSTREAM else "",
            ]
            for field in dataset.schema
        ]
        parts.append(_table(["column", "type", "null", "meaning", "origin"], rows))
    return "\n".join(parts)


def assets_page() -> str:
    """The page of the asset graph, jobs, schedules and sensors, as a deployment on the planet has them."""
    import dagster as dg

    from graft_pipeline.definitions import build_defs
    from graft_pipeline.settings import Settings

    definitions = build_defs(Settings(world="planet", _env_file=None))  # type: ignore[call-arg]
    graph = definitions.resolve_asset_graph()
    repository = definitions.get_repository_def()
    parts = [
        "# Assets and jobs\n",
        "The graph of a deployment with the standard sensors. In production the groups that know the planet's truth "
        "are missing.\n",
    ]
    groups: dict[str, list[Any]] = {}
    for key in sorted(graph.get_all_asset_keys(), key=lambda key: key.path):
        node = graph.get(key)
        groups.setdefault(node.group_name or "default", []).append(node)
    for group, nodes in sorted(groups.items()):
        rows: list[list[object]] = []
        for node in nodes:
            checks = [check.name for check in graph.get_check_keys_for_assets({node.key})]
            partitions = "region" if node.is_partitioned else ""
            upstream = ", ".join(
                f"`{key.to_user_string()}`" for key in sorted(node.parent_keys, key=lambda k: k.path)
            )
            name = _code(node.key.to_user_string())
            rows.append([name, partitions, _first(node.description), upstream, ", ".join(sorted(checks))])
        parts += [f"## {group}\n", _table(["asset", "partitions", "what it is", "made from", "checks"], rows)]
    jobs = [
        [f"`{job.name}`", _first(job.description)]
        for job in repository.get_all_jobs()
        if "__" not in job.name
    ]
    parts += ["## Jobs\n", _table(["job", "what it does"], sorted(jobs))]
    ticking = [*repository.schedule_defs, *repository.sensor_defs]
    if ticking:
        kinds = {True: "schedule", False: "sensor"}
        described = [
            [f"`{tick.name}`", kinds[isinstance(tick, dg.ScheduleDefinition)], _first(tick.description)]
            for tick in ticking
        ]
        parts += ["## Schedules and sensors\n", _table(["name", "kind", "what it does"], sorted(described))]
    return "\n".join(parts)


def _first(description: str | None) -> str:
    """The first paragraph of a description."""
    return (description or "").strip().split("\n\n")[0]


def api_page(package: str) -> str:
    """The page of a package's public modules, whose docstrings mkdocstrings reads."""
    parts = [f"# {package}\n", f"{PACKAGES[package]}\n"]
    for path in sorted((ROOT / package).rglob("*.py")):
        inner = path.relative_to(ROOT)
        if path.name.startswith("_") or "planet" in inner.parts[1:-1]:
            continue
        parts.append(f"::: {'.'.join(inner.with_suffix('').parts)}\n")
    return "\n".join(parts)


def main() -> None:
    """Write all pages anew."""
    sys.path.insert(0, str(ROOT))
    pages = {
        "settings": settings_page(),
        "cli": cli_page(),
        "datasets": datasets_page(),
        "assets": assets_page(),
        **{package: api_page(package) for package in PACKAGES},
    }
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages.items():
        file = FOLDER / f"{name}.md"
        # Untouched where nothing changed: a site that is served while it is written does not build anew.
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


if __name__ == "__main__":
    main()

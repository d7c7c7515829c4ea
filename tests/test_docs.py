"""The documentation hangs together: every page is in the navigation, every link and picture leads somewhere.

`make docs` builds the site, and is stricter still: it knows headings.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = {"settings", "cli", "assets", "datasets", "graft_pipeline", "resources", "training"}
PAGES = sorted(path for path in DOCS.rglob("*.md") if "reference" not in path.parts)


def in_navigation(entries: Any) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else in_navigation(value)


def test_every_page_is_in_the_navigation_once() -> None:
    project = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
    listed = list(in_navigation(project["nav"]))
    written = [path.relative_to(DOCS).as_posix() for path in PAGES]
    assert sorted(listed) == sorted([*written, *(f"reference/{name}.md" for name in GENERATED)])
    # The site asks no other host for anything.
    assert project["theme"]["font"] is False


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    text = re.sub(r"(?s)```.*?```", "", page.read_text())
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    targets = {target.partition("#")[0] for target in found if not re.match(r"https?://", target)} - {""}
    generated = {(DOCS / "reference" / f"{name}.md").resolve() for name in GENERATED}
    paths = {(page.parent / target).resolve() for target in targets}
    assert [str(path) for path in paths - generated if not path.is_file()] == []


def test_the_reference_is_written_from_the_code() -> None:
    sys.path.insert(0, str(DOCS))
    try:
        import write_reference
    finally:
        sys.path.remove(str(DOCS))
    assets, datasets = write_reference.assets_page(), write_reference.datasets_page()
    assert re.search(r"<code>naip/pairs</code> \| region \| .*naip/chips", assets)
    assert "`collect_region`" in assets
    assert re.search(r"## pairs\n\n.*\n\n\| column \| type \| null \| meaning \|", datasets)
    assert "<code>center_lon_deg</code>" in datasets
    api = write_reference.api_page("training")
    assert "::: training.losses" in api

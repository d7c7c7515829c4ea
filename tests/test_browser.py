"""A newcomer's walk through the Dagster UI after the demo, in a headless Chromium: `make test-browser`."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[1]
#: Where screenshots go for people to look at; a temporary folder unless set.
SHOTS = os.environ.get("GRAFT_SCREENSHOTS")
#: Loading the code location and rendering a graph on two busy cores.
PATIENCE_MS = 120_000


@pytest.fixture(scope="module")
def ui(demo_folder: Path) -> Iterator[str]:
    """The Dagster UI on the demo's instance, as `make ui` starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "GRAFT_ENV_FILE": str(demo_folder / "settings.env"),
        "DAGSTER_HOME": str(demo_folder / "dagster_home"),
    }
    command = [sys.executable, "-m", "dagster", "dev", "-w", str(ROOT / "workspace.yaml"), "-p", str(port)]
    log = demo_folder / "ui.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=demo_folder
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while True:
            try:
                with urllib.request.urlopen(f"{url}/server_info", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
        yield url
    finally:
        # SIGINT, as Ctrl-C would: dagster dev then stops its webserver and daemon too.
        server.send_signal(2)
        server.wait(timeout=60)


@pytest.fixture(scope="module")
def page(chromium: Any) -> Iterator[Any]:
    """A page of Debian's Chromium."""
    page = chromium.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(PATIENCE_MS)
    yield page
    page.close()


def shot(page: Any, name: str) -> None:
    """Keep a screenshot if somebody wants to look."""
    if SHOTS:
        page.wait_for_timeout(1500)
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


def test_the_asset_graph_shows_every_group(ui: str, page: Any) -> None:
    page.goto(f"{ui}/asset-groups")
    for name in ("ground", "naip", "sentinel2", "areas", "sources"):
        page.get_by_text(name, exact=True).first.wait_for()
    shown = {
        "ground": ("flickr_photos", "outdoor_photos"),
        "naip": ("training_set", "search_index", "zero_shot_scores"),
    }
    # A group's own page: the graph of all is larger than a screen, and what is beyond it is not drawn.
    for group, names in shown.items():
        page.goto(f"{ui}/locations/graft_pipeline.definitions/asset-groups/{group}/lineage")
        for name in names:
            page.get_by_text(name, exact=True).first.wait_for()
    shot(page, "asset_graph")


def test_a_region_partition_shows_its_preview(ui: str, page: Any, demo_folder: Path) -> None:
    pairs = demo_folder / "data" / "pairs" / "sensor=naip"
    region = min(folder.name.removeprefix("region=") for folder in pairs.iterdir())
    page.goto(f"{ui}/assets/naip/pairs?view=partitions&partition={region}")
    page.get_by_text(region).first.wait_for()
    page.get_by_text("dagster/row_count").first.wait_for()
    page.get_by_text(re.compile("Show Markdown", re.IGNORECASE)).first.click()
    page.locator("img[src^='data:image/']").first.wait_for()
    shot(page, "pairs_partition")


def test_columns_say_where_they_come_from(ui: str, page: Any) -> None:
    page.goto(f"{ui}/assets/naip/pairs?view=overview")
    page.get_by_text("from chips.scene_id").first.wait_for()
    shot(page, "pairs_columns")


def test_scores_are_materialised_with_pictures(ui: str, page: Any) -> None:
    page.goto(f"{ui}/assets/naip/zero_shot_scores?view=events")
    page.get_by_text("accuracy/image_encoder").first.wait_for()
    page.get_by_text(re.compile("Show Markdown", re.IGNORECASE)).first.click()
    page.locator("img[src^='data:image/']").first.wait_for()
    shot(page, "zero_shot_scores")


def test_checks_passed(ui: str, page: Any) -> None:
    page.goto(f"{ui}/assets/naip/tiles?view=checks")
    page.get_by_text("center_spacing").first.wait_for()
    shot(page, "tiles_checks")


def test_an_area_of_ones_own_joins_the_demo(ui: str, page: Any, demo_folder: Path, tmp_path: Path) -> None:
    ring = [[-70.45, 42.3], [-70.4, 42.3], [-70.4, 42.35], [-70.45, 42.35], [-70.45, 42.3]]
    file = tmp_path / "my_area.geojson"
    file.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    command = [sys.executable, "-m", "graft_pipeline.cli", "collect", str(file), "--folder", str(demo_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"naip: [1-9][\d,]* pairs .* in 1 regions", done.stdout)
    page.goto(f"{ui}/assets/naip/pairs?view=partitions&partition=N42.25W070.50")
    page.get_by_text("dagster/row_count").first.wait_for()
    shot(page, "my_area")

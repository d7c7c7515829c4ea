"""Fixtures that several packages' tests share: running planets, a storage folder, settings, a demo, a browser."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

# Before numpy or torch load: idle threads sleep, so tests that share cores do not slow each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No GRAFT_ variable, .env or state of the developer's machine reaches a test."""
    for name in list(os.environ):
        if name.startswith("GRAFT_") or name == "DAGSTER_HOME":
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))
    monkeypatch.setenv("GRAFT_ENV_FILE", os.devnull)


@pytest.fixture(scope="session")
def planet() -> Iterator[Any]:
    """A running planet of seed 0 without faults; `.url` is where it answers."""
    from resources.planet.process import PlanetServer

    with PlanetServer(seed=0) as server:
        yield server


@pytest.fixture
def make_planet() -> Iterator[Callable[..., Any]]:
    """Starts planets with options of a test's own; stops them after the test."""
    from resources.planet.process import PlanetServer

    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(PlanetServer(**options))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB; skips where this user may mount none."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real NAIP pixels and US states; skips where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data at {REAL_DATA}")
    return REAL_DATA


@pytest.fixture
def s3_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A storage root in a bucket of an S3 server on loopback, with credentials in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    # One line a request on stderr otherwise.
    monkeypatch.setattr(logging.getLogger("werkzeug"), "disabled", True)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "s3cret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        # moto's buckets outlive its servers.
        requests.post(f"http://{host}:{port}/moto-api/reset", timeout=10).raise_for_status()
        boto3.client("s3").create_bucket(Bucket="graft")
        yield "s3://graft/team/data"
    finally:
        server.stop()
        # fsspec keeps one client for equal arguments, but the environment names another server next time.
        S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo of two regions, run by the command line; or the one that GRAFT_DEMO_FOLDER names."""
    if made := os.environ.get("GRAFT_DEMO_FOLDER"):
        return Path(made).resolve()
    folder = tmp_path_factory.mktemp("browser") / "demo"
    command = [sys.executable, "-m", "graft_pipeline.cli", "demo", "--small", "--folder", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder.parent, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, headless, that asks nobody for anything by itself."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    if program is None:
        pytest.fail("chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        arguments = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ]
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()

"""The planet's process: it starts, says why it cannot, and never outlives its parent."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests

from graft_pipeline.errors import InputError, ServiceError, SettingsError
from graft_pipeline.settings import Settings
from resources.planet import process
from resources.planet.process import PlanetServer, is_healthy, serve
from resources.planet.world import World
from resources.world import open_world


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_it_runs_inside_the_context_and_not_after() -> None:
    with PlanetServer(seed=5) as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert requests.get(f"{server.url}/healthz", timeout=10).json() == {
            "status": "ok", "service": "graft-planet", "seed": 5,
        }  # fmt: skip
        assert is_healthy(server.url)
        pid, url = server.pid, server.url
        server.check()
    assert not is_running(pid)
    assert not is_healthy(url, timeout_s=1)
    server.stop()
    with pytest.raises(ServiceError, match="not running"):
        server.check()


def test_two_planets_live_side_by_side_and_a_taken_port_is_named() -> None:
    with PlanetServer() as one, PlanetServer() as two:
        assert one.url != two.url
        port = int(one.url.rsplit(":", 1)[1])
        with pytest.raises(ServiceError, match=f"127.0.0.1:{port} .*choose another port"):
            PlanetServer(port=port).start()
        assert is_healthy(one.url)


def test_a_port_of_ones_own(unused_port: int) -> None:
    with PlanetServer(port=unused_port) as server:
        assert server.url == f"http://127.0.0.1:{unused_port}"
    # At once again: no waiting for old connections to be forgotten.
    with PlanetServer(port=unused_port) as server:
        assert is_healthy(server.url)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("options", [{"fault_rate": 2}, {"latency_ms": -1}, {"quota": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="correct them"):
        PlanetServer(**options).start()


def test_a_death_at_the_start_is_told_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServiceError, match=r"(?s)did not start.*invalid int value"):
        PlanetServer(seed="nonsense").start()  # type: ignore[arg-type]
    monkeypatch.setattr(process, "START_DEADLINE_S", 0.01)
    with pytest.raises(ServiceError, match="planet"):
        PlanetServer().start()


def test_a_death_in_between_is_noticed() -> None:
    with PlanetServer() as server:
        os.kill(server.pid, signal.SIGKILL)
        assert wait_until(lambda: not is_running(server.pid))
        assert not is_healthy(server.url, timeout_s=1)
        # The operating system may tell of the death a moment later.
        assert wait_until(lambda: told_dead(server))


def told_dead(server: PlanetServer) -> bool:
    try:
        server.check()
    except ServiceError as error:
        return "not running" in str(error)
    return False


def test_it_dies_with_its_parent() -> None:
    program = (
        "import os, signal, sys; from resources.planet.process import PlanetServer; "
        "server = PlanetServer().start(); print(server.pid, flush=True); sys.stdin.readline(); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[3]
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.communicate("\n", timeout=20)
    assert parent.returncode == -signal.SIGKILL
    assert wait_until(lambda: not is_running(child))


def test_it_answers_to_loopback_only() -> None:
    with PlanetServer() as server:
        port = int(server.url.rsplit(":", 1)[1])
        lines = Path("/proc/net/tcp").read_text().splitlines()
        listening = [line.split()[1] for line in lines if line.split()[3] == "0A"]
        assert f"0100007F:{port:04X}" in listening
        assert f"00000000:{port:04X}" not in listening


def test_serve_blocks_until_the_planet_ends() -> None:
    urls: list[str] = []
    failures: list[ServiceError] = []

    def run() -> None:
        try:
            serve(on_ready=urls.append, seed=2)
        except ServiceError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert wait_until(lambda: bool(urls))
    assert thread.is_alive()
    assert requests.get(f"{urls[0]}/healthz", timeout=10).json()["seed"] == 2
    port = int(urls[0].rsplit(":", 1)[1])
    owner = [pid for pid in Path("/proc").iterdir() if pid.name.isdigit() and _listens(pid, port)]
    os.kill(int(owner[0].name), signal.SIGKILL)
    thread.join(20)
    assert failures


def _listens(folder: Path, port: int) -> bool:
    inodes = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[1] == f"0100007F:{port:04X}" and line.split()[3] == "0A"
    }
    try:
        return any(
            link.readlink().name == f"socket:[{i}]" for link in (folder / "fd").iterdir() for i in inodes
        )
    except OSError:
        return False


# --- the deployment's world ---


def test_production_is_left_alone() -> None:
    settings = Settings(flickr_key="k", flickr_secret="s", ee_project="p", _env_file=None)
    with open_world(settings) as world:
        assert world is settings


def test_without_keys_a_planet_is_started_and_everything_points_at_it() -> None:
    settings = Settings(planet={"seed": 4, "quota": 500}, _env_file=None)
    with open_world(settings) as world:
        url = world.planet.url
        assert requests.get(f"{url}/healthz", timeout=10).json()["seed"] == 4
        assert world.is_planet
        assert world.flickr_url == f"{url}/services/rest/"
        assert world.flickr_static_url == f"{url}/static"
        assert world.ee_url == url
        assert world.ee_project
        assert world.flickr_key is not None
        assert settings.planet.url is None
        assert settings.flickr_key is None
        with open_world(world) as inner:
            assert inner.planet.url == url
        assert is_healthy(url), "an inner world does not end the outer one"
    assert not is_healthy(url, timeout_s=1)


def test_a_named_planet_has_to_answer(planet: Any, unused_port: int) -> None:
    with open_world(Settings(planet={"url": f"{planet.url}/"}, _env_file=None)) as world:
        assert world.ee_url == planet.url
    with (
        pytest.raises(ServiceError, match="graft planet serve"),
        open_world(Settings(planet={"url": f"http://127.0.0.1:{unused_port}"}, _env_file=None)),
    ):
        pass


def test_a_named_planet_is_the_one_of_the_settings(make_planet: Callable[..., Any]) -> None:
    """Its photos would mix with those of another seed, under whose name the storage keeps them."""
    other = make_planet(seed=7)
    with (
        pytest.raises(SettingsError, match=r"GRAFT_PLANET__SEED=7"),
        open_world(Settings(planet={"url": other.url}, _env_file=None)),
    ):
        pass
    with open_world(Settings(planet={"url": other.url, "seed": 7}, _env_file=None)) as world:
        assert world.ee_url == other.url


def test_the_planet_ends_when_the_run_fails() -> None:
    urls: list[str] = []

    def run() -> None:
        with open_world(Settings(_env_file=None)) as world:
            urls.append(world.planet.url or "")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert not is_healthy(urls[0], timeout_s=1)


def test_the_planets_present_is_a_setting() -> None:
    (photo,) = World(0).photos_near(-71.8, 42.1, 2.0)[:1]
    uploaded = datetime.fromtimestamp(int(photo["uploaded_at"]), UTC)
    file = f"{photo['server']}/{photo['photo_id']}_{photo['secret']}_t.jpg"
    for now, status in ((uploaded, 200), (uploaded - timedelta(seconds=1), 404)):
        settings = Settings(_env_file=None, planet={"now": now.replace(tzinfo=None).isoformat()})
        with open_world(settings) as world:
            assert requests.get(f"{world.flickr_static_url}/{file}", timeout=30).status_code == status

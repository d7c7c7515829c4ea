"""Starts the planet in a process of its own, waits until it answers, and ends it.

The server itself is server.py; whether a deployment needs a planet is decided in resources/world.py.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

from graft_pipeline import errors
from graft_pipeline.errors import GraftError, ServiceError

logger = logging.getLogger(__name__)

START_DEADLINE_S = 60.0
_STOP_DEADLINE_S = 5.0
_ROOT = Path(__file__).parents[2]
#: Threads of numerical libraries: requests run side by side already. And one arena of glibc's for all of them: each
#: request finds in the processor's cache the memory that the last one left, which saves a sixth of drawing a chip.
_ENVIRONMENT = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"), "1"
)


class PlanetServer:
    """A planet in its own process, on loopback. A context manager; it also ends when this process does.

    Args:
        seed: decides everything on the planet.
        latency_ms: added to every answer of the APIs.
        quota: requests per second and service before the answer is 429; None: unlimited.
        fault_rate: share of requests answered with a fault.
        mounts: GeoTIFF paths by sensor name or collection id, served as scenes.
        port: port to listen on; 0: any free one.
        now: the planet's present; what is uploaded or acquired later does not exist yet. None: its last day.
        stall_s: how late the answer to a request is that meets this fault; None: 5 s.

    Attributes:
        url: where it answers, without trailing slash; set while it runs.
    """

    def __init__(
        self,
        seed: int = 0,
        latency_ms: float = 0.0,
        quota: float | None = None,
        fault_rate: float = 0.0,
        mounts: Mapping[str, Sequence[str]] | None = None,
        port: int = 0,
        now: datetime | None = None,
        stall_s: float | None = None,
    ) -> None:
        self._arguments = [
            f"--seed={seed}",
            f"--port={port}",
            f"--latency-ms={latency_ms}",
            f"--fault-rate={fault_rate}",
        ]
        if quota is not None:
            self._arguments.append(f"--quota={quota}")
        if now is not None:
            self._arguments.append(f"--now={now.isoformat()}")
        if stall_s is not None:
            self._arguments.append(f"--stall-s={stall_s}")
        if mounts:
            paths = {name: [str(path) for path in files] for name, files in mounts.items()}
            self._arguments.append(f"--mounts={json.dumps(paths)}")
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Any = None
        self.url = ""

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process else None

    def start(self) -> Self:
        """Start the process and wait until it answers.

        Raises:
            InputError: if an option or a mounted file is not usable.
            ServiceError: if it ends or does not answer in time; the message holds its last log lines.
        """
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "resources.planet.server", "--child", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
            # Ctrl-C goes to us, who then end the planet in order.
            start_new_session=True,
        )
        try:
            self.url = self._first_line()["url"]
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        logger.info("A planet answers at %s.", self.url)
        return self

    def _first_line(self) -> dict[str, str]:
        assert self._process is not None
        assert self._process.stdout is not None
        # A process that hangs writes no line: then the deadline ends it, and with it the read.
        timer = threading.Timer(START_DEADLINE_S, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        try:
            message = json.loads(line)
        except ValueError:
            raise self._died("did not start") from None
        if "error" in message:
            kind = getattr(errors, message["error"], GraftError)
            raise kind(message["message"])
        return message

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_DEADLINE_S
        while not is_healthy(self.url):
            if self._process.poll() is not None:
                raise self._died("ended while starting")
            if time.monotonic() > deadline:
                raise self._died(f"did not answer within {START_DEADLINE_S:.0f} s")
            time.sleep(0.02)

    def _died(self, what: str) -> ServiceError:
        return ServiceError(f"The planet {what}. Its last words:\n{self.last_log_lines()}")

    def last_log_lines(self, count: int = 20) -> str:
        """The end of what the process wrote to standard error."""
        if self._log is None:
            return ""
        # Not seek and read: the child writes at the same file position.
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), 16_384, max(0, size - 16_384))
        return "\n".join(text.decode(errors="replace").splitlines()[-count:])

    def check(self) -> None:
        """Raise when the planet is not running any more.

        Raises:
            ServiceError: with its last log lines.
        """
        if self._process is None or self._process.poll() is not None:
            raise self._died("is not running")

    def wait(self) -> None:
        """Block until the process ends."""
        if self._process is not None:
            self._process.wait()

    def stats(self) -> dict[str, int]:
        """Counters of requests by kind since the start or the last reset."""
        return dict(requests.get(f"{self.url}/stats", timeout=10).json())

    def reset_stats(self) -> None:
        """Set every counter to zero."""
        requests.post(f"{self.url}/stats/reset", timeout=10).raise_for_status()

    def stop(self) -> None:
        """End the process; calling it again does nothing."""
        process, self._process = self._process, None
        if process is not None:
            # The child ends by itself when its standard input closes.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr]
            try:
                process.wait(_STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()  # type: ignore[union-attr]
        if self._log is not None:
            self._log.close()
            self._log = None
        self.url = ""

    def __enter__(self) -> Self:
        """Start."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()


def seed_at(url: str, timeout_s: float = 5.0) -> int | None:
    """Seed of the planet that answers at a URL; None if none does."""
    try:
        answer = requests.get(f"{url.rstrip('/')}/healthz", timeout=timeout_s)
        found = answer.json()
        return int(found["seed"]) if answer.ok and found["service"] == "graft-planet" else None
    except (requests.RequestException, ValueError, LookupError, TypeError):
        return None


def is_healthy(url: str, timeout_s: float = 5.0) -> bool:
    """Whether a planet answers at a URL."""
    return seed_at(url, timeout_s) is not None


def _announce(url: str) -> None:
    variables = f"GRAFT_PLANET__URL={url} GRAFT_PLANET__SEED={seed_at(url)}"
    sys.stdout.write(f"A planet answers at {url} ({variables}). Ctrl-C ends it.\n")
    sys.stdout.flush()


def serve(*, on_ready: Callable[[str], None] = _announce, **options: Any) -> None:
    """Run a planet until it ends or the user interrupts; for the command line.

    Args:
        on_ready: called with the URL once it answers; prints it by default.
        **options: as for `PlanetServer`.

    Raises:
        InputError: if an option or a mounted file is not usable.
        ServiceError: if it cannot start, or ends by itself.
    """
    with PlanetServer(**options) as server:
        on_ready(server.url)
        try:
            server.wait()
        except KeyboardInterrupt:
            return
        server.check()

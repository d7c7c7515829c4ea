"""How a training tells whoever started it: messages to Dagster through Pipes, if Dagster started this process.

What there is to tell comes from loop.py; what Dagster makes of it is in assets/launching.py.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft_pipeline.errors import GraftError, TrainingError

if TYPE_CHECKING:
    from training.loop import Progress, TrainResult

logger = logging.getLogger(__name__)

#: Seconds between two messages, but for those of a validation and of the last step.
INTERVAL_S = 0.5

#: Loggers whose information is the user's; of others only warnings are.
OWN_LOGGERS = ("training", "graft_pipeline")

Send = Callable[[dict[str, Any]], None]


class Reporter:
    """Sends what happens in a training as messages that JSON can hold: `{"kind": "progress", ...}`."""

    def __init__(self, send: Send | None = None, launcher_pid: int | None = None) -> None:
        """Take note of who listens.

        Args:
            send: takes a message; None: nobody listens.
            launcher_pid: process on this machine without which the training is to end: when a run is started
                again because its process died, two trainings must not write to one folder.
        """
        self._send, self._launcher_pid = send, launcher_pid
        self._last_s, self._tiles = time.monotonic(), 0

    @property
    def is_heard(self) -> bool:
        """Whether somebody listens; if not, a terminal wants to be told."""
        return self._send is not None

    def progress(self, at: "Progress") -> None:
        """Tell of a step; what `loop.train` calls after each.

        Raises:
            TrainingError: if the process that started this one is gone.
        """
        if self._launcher_pid is not None and not _is_alive(self._launcher_pid):
            raise TrainingError(
                "The process that started this training is gone: start its run again, it goes on at the last "
                "checkpoint."
            )
        self._tiles += at.tiles
        now = time.monotonic()
        if self._send and (now - self._last_s >= INTERVAL_S or at.validation or at.step == at.steps):
            rate = self._tiles / max(now - self._last_s, 1e-9)
            self._send({"kind": "progress", **asdict(at), "tiles_per_second": round(rate, 2)})
            self._last_s, self._tiles = now, 0

    def result(self, result: "TrainResult") -> None:
        """Tell how it ended; curves are in history.json."""
        if self._send:
            told = {
                name: value
                for name, value in vars(result).items()
                if name not in ("folder", "history", "validations")
            }
            self._send({"kind": "result", **told})


@contextmanager
def open_reporter() -> Iterator[Reporter]:
    """The reporter of this process, and its log lines with it.

    Yields:
        A reporter that speaks to Dagster, if Dagster started this process; else one that nobody hears, as for
        all processes of `torchrun` but the first.
    """
    if "DAGSTER_PIPES_CONTEXT" not in os.environ or os.environ.get("RANK", "0") != "0":
        yield Reporter()
        return
    try:
        from dagster_pipes import open_dagster_pipes
    except ImportError:
        logger.warning("Dagster started this training, but dagster-pipes is not installed to report to it.")
        yield Reporter()
        return
    with open_dagster_pipes() as pipes, _logging_to(pipes.log):
        try:
            yield Reporter(pipes.report_custom_message, pipes.extras.get("launcher_pid"))
        except GraftError as error:
            message = {"kind": "error", "error": type(error).__name__, "message": str(error)}
            pipes.report_custom_message(message)
            raise


@contextmanager
def _logging_to(target: logging.Logger) -> Iterator[None]:
    """Log lines go there instead of to this process's terminal, which is somebody else's."""

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            target.log(record.levelno, record.getMessage())

    forward = Forward()
    forward.addFilter(
        lambda record: record.levelno >= logging.WARNING or record.name.split(".")[0] in OWN_LOGGERS
    )
    root = logging.getLogger()
    before, root.handlers = root.handlers, [forward]
    try:
        yield
    finally:
        root.handlers = before


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # It lives, as somebody else's.
        return True
    try:
        # What was killed in a container without an init process keeps its number; its state stands behind its name.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state not in ("Z", "X")

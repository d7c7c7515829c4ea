"""Progress of long work, told to whoever watches: log lines under Dagster, rich bars in a terminal.

Work reports through a plain callable; it knows neither Dagster nor rich.
"""

import logging
import time
from collections.abc import Callable
from typing import Protocol

#: (done, total) of one piece of work.
Report = Callable[[int, int], None]


class Progress(Protocol):
    """Something that shows progress of named pieces of work."""

    def task(self, name: str) -> Report:
        """Start to show a piece of work.

        Args:
            name: what is being done, in a few words.

        Returns:
            The callable to report (done, total) to; calls may come from any thread.
        """
        ...


class LogProgress:
    """Writes a log line at most every few seconds: what a run under Dagster shows."""

    def __init__(self, logger: logging.Logger, interval_s: float = 5.0) -> None:
        self._logger = logger
        self._interval_s = interval_s

    def task(self, name: str) -> Report:
        """See `Progress.task`."""
        last = time.monotonic()

        def report(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= self._interval_s or done == total:
                last = now
                self._logger.info("%s: %d of %d", name, done, total)

        return report

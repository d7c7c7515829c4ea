"""What a whole process costs: CPU seconds, wall seconds and peak memory, start and imports included.

What is measured and compared is in the benchmarks; keep the parent small, as a child inherits its peak memory.
"""

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Cost:
    """Cost of one process.

    Attributes:
        cpu_s: seconds of CPU, user and system, all threads.
        wall_s: seconds that passed.
        peak_mb: largest resident set (1 MB = 10^6 bytes), pages of files included, as the kernel counts it.
        anonymous_mb: largest resident set without pages of files, polled: what cannot be dropped.
        output: what the process printed.
    """

    cpu_s: float
    wall_s: float
    peak_mb: float
    anonymous_mb: float
    output: str


def run(script: str, *arguments: str) -> Cost:
    """Run a Python script as a process of its own and measure it.

    Args:
        script: the script.
        *arguments: its arguments.

    Returns:
        What it cost.

    Raises:
        SystemExit: if it fails; its messages are on stderr.
    """
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True)
    done, peak = threading.Event(), [0]

    def poll() -> None:
        while not done.wait(_POLL_SECONDS):
            peak[0] = max(peak[0], _anonymous_bytes(process.pid))

    watcher = threading.Thread(target=poll, daemon=True)
    watcher.start()
    output = process.stdout.read() if process.stdout else ""
    # wait4, not communicate: only it tells what this one child used.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{script} {' '.join(arguments)} ended with {process.returncode}.")
    return Cost(
        usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * 1024 / 1e6, peak[0] / 1e6, output.strip()
    )


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0

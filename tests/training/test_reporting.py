import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graft_pipeline.errors import TrainingError
from training.loop import Progress, Validation
from training.reporting import Reporter, open_reporter


def step(number, validation=None):
    return Progress(number, 9, 1.5, 1e-3, 16, validation)


def test_steps_are_told_sparingly_and_validations_always():
    told = []
    reporter = Reporter(told.append)
    for number in range(1, 9):
        reporter.progress(step(number, Validation(1.0, 0.1, 0.5, 3, 7) if number == 4 else None))
    reporter.progress(step(9))
    assert [message["step"] for message in told if message["validation"]] == [4]
    assert told[-1]["step"] == 9
    assert len(told) < 9
    assert json.loads(json.dumps(told)) == told
    assert all(message["tiles_per_second"] > 0 for message in told)


def test_a_training_ends_with_the_process_that_started_it():
    launcher = subprocess.Popen([sys.executable, "-c", "pass"])
    Reporter(launcher_pid=os.getpid()).progress(step(1))
    # Ended, whether its parent waited for it or, in a container without an init process, never does.
    os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)
    if Path("/proc/self/stat").exists():
        with pytest.raises(TrainingError, match="start its run again"):
            Reporter(launcher_pid=launcher.pid).progress(step(1))
    launcher.wait()
    with pytest.raises(TrainingError, match="start its run again"):
        Reporter(launcher_pid=launcher.pid).progress(step(1))


@pytest.mark.parametrize("variables", [{}, {"DAGSTER_PIPES_CONTEXT": "x", "RANK": "1"}])
def test_without_dagster_or_in_another_rank_nobody_is_told(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    handlers = logging.getLogger().handlers[:]
    with open_reporter() as reporter:
        reporter.progress(step(9))
        assert not reporter.is_heard
        assert logging.getLogger().handlers == handlers

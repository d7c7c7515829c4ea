"""Runs that are killed: the benchmark of it, with few kills and a small region."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kill.py"


def test_killed_runs_end_with_the_undisturbed_dataset_and_repeat_nothing(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARK), "--kills", "4", "--radius-km", "1", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(report.read_text())
    assert result["requests_undisturbed"]["image"] > 50
    assert len(result["kills"]) == 4
    for kill in result["kills"]:
        assert kill["differing_files"] == []
        assert kill["is_within_limit"], (kill, result["repeated_at_most"])

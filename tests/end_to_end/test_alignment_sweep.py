"""The sweep over alignment iterations from the shell, killed in the middle and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
SPACE = ROOT / "tune_spaces" / "alignment_iterations.yaml"
TRIALS, ITERATIONS = 6, 4
SMALL: dict[str, Any] = {
    "method": "moat",
    "name": "small",
    "arms": ["moat"],
    "tasks": {"train": 30, "align": 12, "probe": 9, "dev": 12, "test_in": 3, "test_out": 3},
    "model": {"width": 32, "layers": 1},
    "moat": {"fewest_pairs": 1, "max_plan": 24, "max_program": 24, "max_leak": 1.0},
    "alternation": {"actors": 0},
    "sft": {"workers": 0, "steps": 60, "lr": 5e-3},
    "dpo": {"workers": 0, "steps": 20, "batch": 4},
    "grounder_sft": {"workers": 0, "steps": 20, "batch": 8},
}


def start(space: Path, out: Path, log: Path, ray: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "RAY_TMPDIR": ray}
    command = [sys.executable, "-m", "mobula.cli", "sweep", str(space), "--out", str(out)]
    with log.open("w") as stream:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )


def finished(out: Path) -> dict[Path, int]:
    """Alternations that came to their last iteration, and when."""
    found = (out / "trials").glob("*/loop/iterations.jsonl")
    return {path: path.stat().st_mtime_ns for path in found if len(path.read_text().splitlines()) == 1 + ITERATIONS}


def test_six_trials_survive_a_kill(tmp_path: Path) -> None:
    experiment, space, out, log = (tmp_path / name for name in ("small.yaml", "space.yaml", "out", "log"))
    experiment.write_text(yaml.safe_dump(SMALL))
    shipped = yaml.safe_load(SPACE.read_text())
    space.write_text(yaml.safe_dump({**shipped, "experiment": str(experiment), "trials": TRIALS, "concurrent": 2}))
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as ray:
        process = start(space, out, log, ray)
        deadline = time.monotonic() + 900
        while len(finished(out)) < 2:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    kept = finished(out)
    assert 2 <= len(kept) < TRIALS
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as ray:
        process = start(space, out, log, ray)
        assert process.wait(900) == 0, log.read_text()[-3000:]
    found = finished(out)
    assert {path: found[path] for path in kept} == kept  # what was finished is not done again
    cost = json.loads((out / "report.json").read_text())["cost"]
    assert (cost["trials"], cost["failed"]) == (TRIALS, 0)
    assert (out / "report.md").is_file()

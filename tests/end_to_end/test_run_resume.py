"""``mobula run`` killed in the middle of training: the same command ends where an uninterrupted run does."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mobula.data import DataConfig, load_retrieval
from mobula.errors import DataError, ModelError
from mobula.models.text import load_static

pytestmark = [pytest.mark.end_to_end, pytest.mark.alone, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
STEPS = 60
EXPERIMENT: dict[str, Any] = {
    "method": "diffugr",
    "name": "tiny",
    "arms": ["diffusion/rq", "autoregressive/rq"],
    "data": {"name": "functions", "max_documents": 120},
    "docid": {"levels": 4, "codes": 8, "min_entropy": 0.0},
    "model": {"width": 32, "layers": 1, "query_len": 16},
    "pseudo_queries": {"per_document": 4},
    "learning_rates": {"diffusion": [1e-2], "autoregressive": [1e-2]},
    "training": {"steps": STEPS, "batch": 32, "workers": 0, "eval_every": 10, "checkpoint_every": 3, "report_every": 1},
    "evaluation": {
        "steps": [1, 4], "thresholds": [], "orders": [], "beams": [10], "remask": [], "latency_queries": 1,
        "resamples": 100, "dev_queries": 20, "max_queries": 20, "decisive": False,
    },
}  # fmt: skip


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """The command, all but its directory."""
    try:
        load_retrieval(DataConfig(max_documents=10), quiet=True)
        load_static()
    except (DataError, ModelError) as error:
        pytest.skip(str(error))
    experiment = tmp_path / "tiny.yaml"
    experiment.write_text(yaml.safe_dump(EXPERIMENT))
    return [sys.executable, "-m", "mobula.cli", "run", str(experiment), "--out"]


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1"}
    where = Path(command[-1]).parent
    return subprocess.Popen(
        command, cwd=where, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(command: list[str], expected: int = 0) -> str:
    process = start(command)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == expected, output[-3000:]
    return output


def kill_at(process: subprocess.Popen[str], metrics: Path, step: int) -> None:
    """SIGKILL once the training that writes ``metrics`` has done ``step`` steps."""
    deadline = time.monotonic() + 400
    while not (metrics.is_file() and f'{{"step": {step},' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def weights(run: Path) -> dict[str, bytes]:
    """Every weights file of a run, those of its artifact included."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}


def results(run: Path) -> dict[str, Any]:
    """The report without what depends on the clock or the directory."""
    report = json.loads((run / "report.json").read_text())
    timed = re.compile(r"latency|pareto| ms$|_s$")
    report["claims"] = [claim for claim in report["claims"] if not timed.search(claim["name"])]
    report["plots"] = {name: plot for name, plot in report["plots"].items() if not timed.search(name)}
    report["cost"] = {name: value for name, value in report["cost"].items() if not timed.search(name)}
    for rows in report["tables"].values():
        kept = [i for i, title in enumerate(rows[0]) if not timed.search(str(title))]
        rows[:] = [[row[i] for i in kept] for row in rows]
    return report


def test_f4_a_killed_command_ends_as_an_uninterrupted_one_does(command: list[str], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish([*command, str(whole)])
    arm = random.choice(["diffusion-rq", "autoregressive-rq"])
    step = random.randrange(1, STEPS - 10)
    process = start([*command, str(killed)])
    kill_at(process, killed / "models" / arm / "seed-0" / "metrics.jsonl", step)
    assert not (killed / "models" / arm / "seed-0" / "result.json").exists(), f"{arm} was over before the kill"
    finish([*command, str(killed)])
    assert weights(killed) == weights(whole), f"killed in {arm} after step {step}"
    assert results(killed) == results(whole), f"killed in {arm} after step {step}"
    assert "this run is finished" in finish([*command, str(killed)], expected=2)

"""A training worker is killed in an M-step of a run: other workers take over, and the numbers are the same."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from mobula import methods, training
from mobula.artifacts import read_jsonl
from mobula.cluster.spec import ClusterSpec, Platform, Train
from mobula.experiment import Run
from mobula.training import loop

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(600)]
RECIPE = Path(__file__).parents[2] / "jobs" / "dro" / "smoke.yaml"
TINY = ["arms=[dro]", "data.train=200", "data.dev=100", "data.test=100", "alternation.iterations=2"]
CLUSTER = ClusterSpec(Path("cluster.yaml"), {}, Platform(train=Train(workers=2)), {})
M_STEPS = "seed-0/dro/iteration-001/*fit*"


def numbers(directory: Path) -> list[dict[str, float]]:
    """The metrics of every iteration, and the weights that the last one left."""
    with Run.open(directory, methods.load_config(RECIPE, TINY), cluster=CLUSTER) as run, training.group(CLUSTER):
        methods.get("dro").run(run)
    (rows,) = directory.rglob("iterations.jsonl")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_jsonl(rows)]


def workers() -> list[psutil.Process]:
    """The training workers of the Ray that this process has started."""
    return [p for p in psutil.Process().children(recursive=True) if "TrainWorker" in "".join(p.cmdline())]


def kill_one(directory: Path, killed: list[int]) -> None:
    """SIGKILL for a worker once an M-step has begun."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list(directory.glob(f"{M_STEPS}/*/{loop.METRICS}")):
        time.sleep(0.01)
    for process in workers()[:1]:
        os.kill(process.pid, signal.SIGKILL)
        killed.append(process.pid)


def test_a_worker_killed_in_an_m_step_changes_no_number(tmp_path: Path) -> None:
    whole = numbers(tmp_path / "whole")
    killed: list[int] = []
    killer = threading.Thread(target=kill_one, args=(tmp_path / "killed", killed))
    killer.start()
    assert numbers(tmp_path / "killed") == whole
    killer.join()
    assert killed, "no worker was there to be killed"
    weights = [sorted((tmp_path / name).glob(f"{M_STEPS}/*/{loop.WEIGHTS}")) for name in ("whole", "killed")]
    assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]] != []

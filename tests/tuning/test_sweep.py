"""Sweeps on a real Ray: a small method, real trials, real kills."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mobula.cluster.spec import Tune
from mobula.errors import ClusterError, ConfigError, RunConflict, SweepFailed
from mobula.tuning.sweep import sweep

pytestmark = pytest.mark.usefixtures("ray_cluster")

TRADE_OFF = {"r2": "max", "multiplications": "min"}
TERMS = {"parameters": {"decode.terms": {"choice": [1, 2, 4, 6, 9]}}, "objectives": TRADE_OFF}


def test_an_inference_sweep_trains_once_and_finds_the_front(write, tmp_path, journal):
    space = write({**TERMS, "within": [0.5, 4.0]})
    result = sweep(space, tmp_path / "out")

    assert [o.status for o in result.outcomes] == ["completed"] * 5
    assert journal().count("trained once") == 1
    # One process served all trials, one after the other.
    assert len({line.split(" in ")[1] for line in journal() if line.startswith("measured")}) == 1
    # The most terms are the best quality; a front holds no trial that costs more and is no better.
    ranked = [result.outcomes[i].metrics for i in result.front]
    assert ranked[0]["r2"] > 0.9
    assert all(a["r2"] > b["r2"] and a["multiplications"] > b["multiplications"] for a, b in itertools.pairwise(ranked))

    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [t["point"] for t in written["trials"]] == [o.point for o in result.outcomes]
    assert written["front"] == result.front
    tables = json.loads((tmp_path / "out" / "report.json").read_text())["tables"]
    within = tables["Best r2 within a limit on multiplications"]
    assert within[1][:2] == [0.5, "none"]
    assert within[2][2] <= 4
    assert {p.name for p in (tmp_path / "out" / "plots").iterdir()} == {"pareto.png", "pareto.svg"}
    assert "## Pareto front" in (tmp_path / "out" / "report.md").read_text()

    with pytest.raises(RunConflict, match="this run is finished"):
        sweep(space, tmp_path / "out")
    with pytest.raises(RunConflict, match="another config"):
        sweep(space, tmp_path / "out", ["seed=1"])


def test_the_artifact_of_an_earlier_run_is_measured_without_training(write, tmp_path, journal):
    one = {"parameters": {"decode.terms": {"choice": [9]}}, "objectives": {"r2": "max"}}
    first = sweep(write(one), tmp_path / "first")
    artifact = tmp_path / "first" / "training" / "artifact"
    second = sweep(write(one), tmp_path / "second", [f"artifact={artifact}"])
    assert second.outcomes[0].metrics == first.outcomes[0].metrics
    assert journal().count("trained once") == 1


@pytest.mark.end_to_end
def test_f8_failing_trials_do_not_end_a_sweep_and_a_resumed_one_repeats_only_them(write, tmp_path, journal):
    space = write({
        "parameters": {"decode.fault": {"choice": ["none", "raise", "die", "nan"]}, "decode.terms": {"choice": [8, 9]}},
        "exclude": [{"decode.fault": ["raise", "die", "nan"], "decode.terms": 8}],
        "objectives": {"r2": "max"},
    })  # fmt: skip
    result = sweep(space, tmp_path / "out")
    by_fault = {o.point["decode.fault"]: o for o in result.outcomes}
    assert {fault: o.status for fault, o in by_fault.items()} == {
        "none": "completed", "raise": "failed", "die": "failed", "nan": "failed",
    }  # fmt: skip
    assert by_fault["raise"].error == "MobulaError: asked to fail"
    assert by_fault["die"].error == "the trial's process died"
    assert by_fault["nan"].error == "TrainingError: r2 is nan"

    # As if the report had not been written: the sweep goes on and gives only failed points another chance.
    (tmp_path / "out" / "report.json").unlink()
    again = sweep(space, tmp_path / "out")
    assert sorted(o.status for o in again.outcomes) == ["completed", "completed", "failed", "failed", "failed"]
    measured = [line.split(" in ")[0] for line in journal() if line.startswith("measured")]
    assert sorted(measured) == ["measured 8", "measured 9", "measured 9", "measured 9"]


def test_a_sweep_in_which_every_trial_fails_is_an_error_with_the_reason(write, tmp_path):
    space = write({"parameters": {"decode.terms": {"choice": [1, 2]}}, "objectives": {"r3": "max"}})
    with pytest.raises(SweepFailed, match=r"no metric 'r3' \(did you mean r2\?\)"):
        sweep(space, tmp_path / "out")


def test_another_experiment_under_the_same_space_is_refused(write, tmp_path):
    space = {"parameters": {"decode.terms": {"choice": [1]}}, "objectives": {"r3": "max"}}
    with pytest.raises(SweepFailed):
        sweep(write(space), tmp_path / "out")
    with pytest.raises(RunConflict, match=r"experiment changed.*experiment.training.lr: 0.3 -> 0.2"):
        sweep(write(space, {"training": {"lr": 0.2}}), tmp_path / "out")


def test_an_artifact_of_another_method_is_refused(write, tmp_path):
    from mobula import artifacts

    foreign = artifacts.write(tmp_path / "a", kind="curve", method="other", meta={}, fill=lambda folder: None)
    with pytest.raises(ConfigError, match="is one of other, but the experiment's method is curve"):
        sweep(write(TERMS), tmp_path / "out", [f"artifact={foreign.directory}"])


def test_f10_a_trial_larger_than_the_cluster_is_refused_at_once(write, tmp_path):
    with pytest.raises(ClusterError, match=r"a trial wants 64 CPU, the cluster has .*; lower cpus"):
        sweep(write(TERMS), tmp_path / "out", ["cpus=64"])
    with pytest.raises(ClusterError, match=r"a trial wants 1 GPU, the cluster has 0"):
        sweep(write(TERMS), tmp_path / "out", ["gpus=1"])


RATES = {
    "mode": "inline",
    "parameters": {"training.lr": {"choice": [0.4, 0.1, 0.05, 0.01, 0.003, 0.002, 0.001, 0.0005, 0.0001]}},
    "objectives": {"r2": "max"},
}
HALVING = {"scheduler": "asha", "asha": {"unit": "step", "grace": 10, "limit": 120, "reduction": 3}}


@pytest.mark.end_to_end
def test_r8_asha_finds_the_best_of_the_full_grid_in_half_the_steps(write, tmp_path):
    full = sweep(write(RATES), tmp_path / "full", ["concurrent=3"])
    halved = sweep(write({**RATES, **HALVING}), tmp_path / "asha", ["concurrent=3"])

    def steps(result):
        return sum(o.metrics["step"] for o in result.outcomes)

    best = [result.outcomes[result.front[0]] for result in (full, halved)]
    assert best[0].point == best[1].point == {"training.lr": 0.4}
    assert best[0].metrics == best[1].metrics
    assert {o.status for o in halved.outcomes} == {"completed", "stopped"}
    assert steps(halved) <= 0.5 * steps(full)
    report = json.loads((tmp_path / "asha" / "report.json").read_text())
    assert report["cost"]["step"] == steps(halved)
    # What every trial reported on its way is kept: the last of it is its result.
    progress = report["tables"]["r2 by step"]
    assert progress[0][:2] == ["trial", 10]
    for row, outcome in zip(progress[1:], halved.outcomes, strict=True):
        assert [value for value in row[1:] if value != ""][-1] == outcome.metrics["r2"]


@pytest.mark.end_to_end
def test_optuna_searches_several_objectives_and_asha_follows_the_first(write, tmp_path):
    search = {"searcher": "optuna", "trials": 6, "seed": 1}
    many = sweep(write({**TERMS, **search}), tmp_path / "many")
    # The space holds five points; a sixth trial would repeat one.
    assert sorted(o.point["decode.terms"] for o in many.outcomes) == [1, 2, 4, 6, 9]

    inline = {
        **HALVING, **search, "mode": "inline", "objectives": {"r2": "max", "step": "min"}, "per": "training.eval_every",
        "parameters": {"training.lr": {"loguniform": [1e-3, 0.4]}, "training.eval_every": {"choice": [10, 20]}},
    }  # fmt: skip
    result = sweep(write(inline), tmp_path / "inline")
    assert len(result.outcomes) == 6
    assert all(result.outcomes[i].metrics["step"] == 120 for i in result.front)


DRIVER = """
import sys
from pathlib import Path
import ray
import curve
from mobula import methods
from mobula.tuning.sweep import sweep
methods.METHODS["curve"] = methods.Entry("test", "curve", "a polynomial")
ray.init(address=sys.argv[1], log_to_driver=False,
         runtime_env={"env_vars": {"PYTHONPATH": sys.argv[4], "OMP_NUM_THREADS": "1"}})
sweep(Path(sys.argv[2]), Path(sys.argv[3]))
"""


def start_driver(address: str, space: Path, out: Path) -> subprocess.Popen:
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), address, str(space), str(out), here]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": here})


def wait_for(condition, process, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the driver ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Ray ends the actors of a dead driver; nothing of it may write after this.
    time.sleep(3)


@pytest.mark.end_to_end
def test_f4_f8_a_killed_inference_sweep_runs_only_what_is_unfinished(ray_cluster, write, tmp_path, journal):
    space = write({
        "parameters": {"decode.terms": {"choice": [1, 2, 3, 4, 5, 6, 7, 8, 9]}}, "fixed": {"decode.pause_s": 0.5},
        "objectives": TRADE_OFF,
    })  # fmt: skip
    process = start_driver(ray_cluster, space, tmp_path / "out")
    wait_for(lambda: sum(line.startswith("measured") for line in journal()) >= 4, process)
    kill(process)
    finished = len(list((tmp_path / "out" / "trials").glob("*/result.json")))
    before = len(journal())

    result = sweep(space, tmp_path / "out")
    assert [o.status for o in result.outcomes] == ["completed"] * 9
    assert sorted(o.point["decode.terms"] for o in result.outcomes) == list(range(1, 10))
    assert 4 <= finished < 9
    assert len(journal()) - before == 9 - finished
    assert journal().count("trained once") == 1


@pytest.mark.end_to_end
def test_f4_f8_a_killed_training_sweep_runs_only_what_is_unfinished(ray_cluster, write, tmp_path, journal):
    space = write(
        {**RATES, "parameters": {"training.lr": {"choice": [0.4, 0.2, 0.1, 0.05]}}, "concurrent": 2},
        {"training": {"pause_s": 0.1}},
    )
    process = start_driver(ray_cluster, space, tmp_path / "out")
    kept = lambda: sorted((tmp_path / "out" / "trials").glob("*/result.json"))  # noqa: E731
    wait_for(lambda: len(kept()) >= 2, process)
    kill(process)
    finished = len(kept())
    before = len(journal())

    result = sweep(space, tmp_path / "out")
    assert [o.status for o in result.outcomes] == ["completed"] * 4
    assert 2 <= finished < 4
    assert len(journal()) - before == 4 - finished


def test_resources_come_from_the_space_then_from_the_cluster(write):
    from mobula.tuning import space as spaces
    from mobula.tuning.sweep import DRIVER_CPUS, _limits

    own = spaces.load(write({**TERMS, "concurrent": 3, "cpus": 2.0})).config
    assert _limits(own, None) == Tune(3, 2.0, 0.0)
    assert _limits(spaces.load(write(TERMS)).config, None) == Tune(1, 1.0, 0.0)
    distributed = {**TERMS, "mode": "distributed"}
    config = spaces.load(write(distributed, {"training": {"workers": 2}})).config
    assert _limits(config, None) == Tune(1, DRIVER_CPUS, 0.0)

"""``mobula run`` killed in every phase of an alternation: it ends with the numbers of a run that nothing stopped."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mobula.alternation import DONE, Row
from mobula.artifacts import read_jsonl, sha256
from tests.end_to_end.commands import Command, start
from tests.rag.dro import small

pytestmark = [pytest.mark.end_to_end, pytest.mark.alone, pytest.mark.timeout(1800)]
MOAT: dict[str, Any] = {
    "method": "moat",
    "name": "killed",
    "arms": ["moat"],
    "tasks": {"train": 30, "align": 24, "probe": 24, "dev": 24, "test_in": 9, "test_out": 9},
    "model": {"width": 32, "layers": 1},
    "moat": {"samples": 4, "margin": 0.0, "fewest_pairs": 1, "max_plan": 24, "max_program": 24, "max_leak": 1.0},
    "gate": {"retries": 0, "j_slack_se": 100.0, "min_parsed": 0.0, "max_leak": 1.0},
    "alternation": {"iterations": 1, "actors": 0},
    "sft": {"workers": 0, "steps": 60, "lr": 5e-3, "checkpoint_every": 20},
    "dpo": {"workers": 0, "steps": 60, "batch": 4, "lr": 1e-3, "checkpoint_every": 20},
    "grounder_sft": {"workers": 0, "steps": 60, "batch": 4, "lr": 1e-3, "checkpoint_every": 20},
    "evaluation": {"decisive": False, "resamples": 100},
}
DRO: dict[str, Any] = {
    "method": "dro",
    "name": "killed",
    "arms": ["dro"],
    "data": {"labelled": 200, "train": 1500, "dev": 100, "test": 100},
    "cold": {"selector_steps": 20, "generator_steps": 10},
    "alternation": {"iterations": 2, "actors": 0},
    "fit": {"steps": 40, "batch": 32, "checkpoint_every": 10, "workers": 0},
    "evaluation": {"decisive": False, "resamples": 100, "redraws": 4},
}
EXSEARCH: dict[str, Any] = {
    "method": "exsearch",
    "name": "killed",
    "arms": ["exsearch"],
    "data": {"people": 60, "towns": 30, "firms": 12, "books": 16, "warm_up": 20, "train": 40, "dev": 16, "test": 10},
    "model": {"width": 32},
    "skill": {"steps": 40, "checkpoint_every": 10, "workers": 0},
    "skill_questions": 160,
    "warm_up": {"steps": 20, "checkpoint_every": 10, "workers": 0},
    "fit": {"batch": 4, "checkpoint_every": 5, "workers": 0},
    "alternation": {"iterations": 1, "actors": 0},
    "evaluation": {"decisive": False, "resamples": 100},
}
# The same over passages: pages are read, and both networks are larger.
TEXT: dict[str, Any] = {
    "name": "killed",
    "arms": ["dro"],
    "alternation": {"iterations": 2, "actors": 0},
    "em": {"samples": 8, "shard": 2},
    "fit": {"steps": 30, "batch": 8, "checkpoint_every": 5},
    "evaluation": {"decisive": False, "resamples": 100, "redraws": 4},
}
# What a method's iterations are made of, at least.
PHASES = {
    "exsearch": {"sample", "score", "weigh", "fit", "q_gain", "solve", "dev_sample", "dev_score"},
    "moat": {"sample", "score", "pair", "dpo-0", "plans", "ground"},
    "dro": {"sample", "score", "weigh", "fit", "measure"},
}


def begin(experiment: Path, out: Path) -> Command:
    return start(["run", str(experiment), "--out", str(out)], experiment.parent)


def finish(experiment: Path, out: Path) -> None:
    command = begin(experiment, out)
    assert command.wait() == 0, command.output


def rows(loop: Path) -> list[Row]:
    return [{**row, "seconds": 0} for row in read_jsonl(loop / "iterations.jsonl")]


def phases(loop: Path) -> list[str]:
    """Every phase's directory, in the order in which they run."""
    return [str(p.parent.relative_to(loop)) for p in sorted(loop.glob(f"iteration-*/*/{DONE}"))]


def kill_in(command: Command, phase: Path, pause: float) -> bool:
    """SIGKILL a while after a phase has begun; False if it was over by then."""
    deadline = time.monotonic() + 600
    while not phase.is_dir():
        assert command.process.is_alive() and time.monotonic() < deadline, command.output
        time.sleep(0.002)
    time.sleep(pause)
    over = (phase / DONE).is_file()
    command.kill()
    return not over


@pytest.fixture(params=["moat", "dro", "exsearch", "dro on text"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """An experiment of a method."""
    if request.param != "dro on text":
        return {"moat": MOAT, "dro": DRO, "exsearch": EXSEARCH}[request.param]
    small.write_nq(tmp_path)
    small.write_squad(tmp_path)
    return small.values(tmp_path, **TEXT)


def test_killed_in_every_phase_it_ends_with_the_same_numbers(tmp_path: Path, config: dict[str, Any]) -> None:
    experiment = tmp_path / "killed.yaml"
    experiment.write_text(yaml.safe_dump(config))
    (arm,) = config["arms"]
    finish(experiment, tmp_path / "whole")
    whole, out = (tmp_path / name / "seed-0" / arm for name in ("whole", "out"))
    names = phases(whole)
    # Phases that work, and those that only decide in a moment: any of them may be hit.
    assert {name.split("-", 2)[-1] for name in names} >= PHASES[config["method"]]
    chance = random.Random(0)
    inside = 0
    for name in names:
        took = json.loads((whole / name / DONE).read_text())["seconds"]
        inside += kill_in(begin(experiment, tmp_path / "out"), out / name, chance.uniform(0, took))
    assert inside >= len(names) // 3
    finish(experiment, tmp_path / "out")
    assert rows(out) == rows(whole)
    for name in names:
        again, once = out / name, whole / name
        assert json.loads((again / DONE).read_text())["facts"] == json.loads((once / DONE).read_text())["facts"]
        for shard in once.glob("*.jsonl"):
            assert (again / shard.name).read_bytes() == shard.read_bytes(), f"{name}/{shard.name}"
    weights = sorted(p.relative_to(whole) for p in whole.rglob("*.safetensors"))
    assert weights
    assert [sha256(out / path) for path in weights] == [sha256(whole / path) for path in weights]
    reports = [json.loads((tmp_path / name / "report.json").read_text())["measures"] for name in ("out", "whole")]
    assert reports[0] == reports[1]

"""The arms that MOAT is compared with: what each learns from, for how long, and in which order tests are read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mobula.agents.moat import study
from mobula.agents.moat.config import ARMS as KINDS
from mobula.agents.moat.config import INDEPENDENT, UNGATED, Config
from mobula.agents.moat.data import TaskData
from mobula.agents.moat.moat import stage_facts
from mobula.agents.moat.stage import ArmContext, steps_for
from mobula.agents.moat.study import Arms, systems
from mobula.alternation import DONE, AlternationConfig, History, Outcome, Row
from mobula.artifacts import read_jsonl, sha256
from mobula.config import build
from mobula.errors import ConfigError
from mobula.models.causal import CausalModel
from mobula.models.sft import SftTask, read_pairs
from mobula.study import System
from tests.agents.moat.small import run_in

ARMS = ["moat", "moat_no_gate", "noisy_30", "random_pairs", "best_plan", "rft", "extra_steps", "integrated"]
CONFIG: dict[str, Any] = {
    "method": "moat",
    "name": "arms",
    "arms": ARMS,
    "tasks": {"train": 30, "align": 12, "probe": 9, "dev": 12, "test_in": 9, "test_out": 9},
    "model": {"width": 32, "layers": 1},
    "moat": {"samples": 4, "margin": 0.0, "fewest_pairs": 1, "max_plan": 24, "max_program": 24, "max_leak": 1.0},
    "gate": {"retries": 1, "j_slack_se": 100.0, "min_parsed": 0.0, "max_leak": 1.0},
    "alternation": {"iterations": 2, "actors": 0},
    "sft": {"workers": 0, "steps": 60, "lr": 5e-3},
    "dpo": {"workers": 0, "steps": 12, "batch": 4, "lr": 1e-3},
    "grounder_sft": {"workers": 0, "steps": 30, "batch": 2, "lr": 1e-3},
    "budget_matched": {"workers": 0, "batch": 2, "lr": 1e-3},
    "evaluation": {"decisive": False, "resamples": 200},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_in(tmp_path_factory.mktemp("arms") / "run", CONFIG)


def phase(directory: Path, arm: str, name: str, iteration: int = 1) -> Path:
    (path,) = (directory / "seed-0" / arm / f"iteration-{iteration:03}").glob(f"[0-9][0-9]-{name}")
    return path


def iterations(directory: Path, arm: str) -> list[Row]:
    return read_jsonl(directory / "seed-0" / arm / "iterations.jsonl")


@pytest.mark.parametrize("arm", ["rft", "extra_steps", "best_plan"])
def test_matched_arms_learn_from_as_many_tokens(directory: Path, arm: str) -> None:
    """Within two per cent, iteration by iteration, as far as both go."""
    other = iterations(directory, UNGATED)
    matched = iterations(directory, arm)
    assert len(matched) == (2 if arm == "best_plan" else 3)
    for wanted, row in zip(other[1:], matched[1:], strict=False):
        assert row["tokens"] == pytest.approx(wanted["tokens"], rel=0.02)
    report = json.loads((directory / "report.json").read_text())
    assert not any("no equal budget" in note for note in report["notes"])


@pytest.mark.parametrize(("arm", "stops"), [("moat_no_gate", True), ("extra_steps", False)])
def test_a_matched_arm_spends_its_budget_though_all_was_rejected(tmp_path: Path, arm: str, stops: bool) -> None:
    phases = [f"{stage}-0{part}" for stage in ("dpo", "planner_sft", "grounder_sft") for part in ("", "-gate")]
    facts = {"tokens": 5, "accepted": False, "J": -1.0, "dev_success": 0.5}
    for name in phases:
        (tmp_path / name).mkdir()
        (tmp_path / name / DONE).write_text(json.dumps({"facts": facts, "shards": 0, "seconds": 0}))
    history = History(tmp_path, [(1, name, tmp_path / name) for name in phases])
    config = build(Config, {**CONFIG, "gate": {"retries": 0}})
    row = stage_facts(ArmContext(config, KINDS[arm], TaskData(config), tmp_path, tmp_path, 0), history)
    assert (row["stop"], row["tokens"]) == (stops, 10)


def test_an_integrated_agent_learns_from_as_many_tokens_as_both_agents_and_their_alignment(directory: Path) -> None:
    seed = directory / "seed-0"
    spent = sum(json.loads((seed / "independent" / "tokens.json").read_text()).values())
    spent += sum(row.get("tokens", 0) for row in iterations(directory, "moat"))
    task = SftTask(seed / "integrated" / "fresh", seed / "integrated" / "pairs.jsonl")
    steps = read_jsonl(seed / "integrated" / "fit" / "metrics.jsonl")[-1]["step"]
    assert steps * CONFIG["sft"].get("batch", 32) * task.target_tokens / task.examples == pytest.approx(spent, rel=0.1)
    model = CausalModel.open(str(seed / "integrated" / "model"))
    assert all("<act>" in model.decode(target) for _, target in read_pairs(seed / "integrated" / "pairs.jsonl"))


def test_a_budget_is_kept_to_half_a_step(tmp_path: Path, directory: Path) -> None:
    task = SftTask(tmp_path, directory / "seed-0" / "independent" / "planner" / "pairs.jsonl")
    each = task.target_tokens / task.examples
    for tokens in (1, 500, 2345):
        steps = steps_for(tokens, task, 2)
        assert steps == 1 or abs(steps * 2 * each - tokens) <= each


def test_self_training_learns_what_was_solved_and_gold(directory: Path) -> None:
    ground = phase(directory, "rft", "ground")
    rows = [row for file in sorted(ground.glob("shard-*")) for row in read_jsonl(file)]
    accepted = [row for row in rows if row["verdict"] == "accept"]
    assert {row["verdict"] for row in rows} <= {"accept", "drop"}
    for stage in ("planner_sft-0", "grounder_sft-0"):
        pairs = read_pairs(phase(directory, "rft", stage) / "pairs.jsonl")
        assert len(pairs) == len(accepted) + CONFIG["tasks"]["train"]
    sampled = phase(directory, "rft", "sample") / "shard-00000.jsonl"
    assert sampled.read_bytes() == (phase(directory, "moat", "sample") / "shard-00000.jsonl").read_bytes()


def test_every_program_is_counted_and_what_the_critic_left_is_learned(directory: Path) -> None:
    rows = [row for file in sorted(phase(directory, "moat", "ground").glob("shard-*")) for row in read_jsonl(file)]
    plans = read_jsonl(phase(directory, "moat", "ground") / "inputs.jsonl")
    verdicts = [row["verdict"] for row in rows]
    assert len(plans) == len(rows) == sum(verdicts.count(each) for each in ("accept", "correct", "drop"))
    kept = [row for row in rows if row["verdict"] != "drop"]
    assert all((row["used_actions"] is None) == (row["verdict"] == "drop") for row in rows)
    pairs = read_pairs(phase(directory, "moat", "grounder_sft-0") / "pairs.jsonl")
    assert len(pairs) == len(kept) + CONFIG["tasks"]["train"]
    model = CausalModel.open(str(directory / "seed-0" / "independent" / "grounder" / "model"))
    for row, (prompt, target) in zip(kept, pairs, strict=False):
        assert model.decode(prompt).endswith("<act>") and target[-1] == model.eos
        assert model.encode(row["used_actions"]) == list(target[:-1])


def test_random_pairs_are_of_the_same_plans_in_any_order(directory: Path) -> None:
    scored = json.loads((phase(directory, UNGATED, "pair") / "pairs.json").read_text())
    drawn = json.loads((phase(directory, "random_pairs", "pair") / "pairs.json").read_text())
    nll = {(r["task_id"], r["j"]): r["nll_mean"]
           for f in phase(directory, "moat", "score").glob("shard-*") for r in read_jsonl(f)}  # fmt: skip
    known = {(p["task_id"], p[side]["text"]) for p in scored for side in ("chosen", "rejected")}
    assert {p["task_id"] for p in drawn} == {task for task, _ in known}
    better = [nll[p["task_id"], p["chosen"]["j"]] < nll[p["task_id"], p["rejected"]["j"]] for p in drawn]
    assert 0 < sum(better) < len(better)
    assert all(p["chosen"]["text"] != p["rejected"]["text"] for p in drawn)


def test_the_best_plan_is_the_target_of_its_arm(directory: Path) -> None:
    pairs = read_pairs(phase(directory, "best_plan", "planner_sft-0") / "pairs.jsonl")
    chosen = read_jsonl(phase(directory, UNGATED, "pair") / "preferences.jsonl")
    assert [list(target) for _, target in pairs] == [pair["chosen"] for pair in chosen]


def test_more_steps_are_on_gold_alone(directory: Path) -> None:
    for name, stage in (("planner", "planner_sft-0"), ("grounder", "grounder_sft-0")):
        again = phase(directory, "extra_steps", stage) / "pairs.jsonl"
        assert again.read_bytes() == (directory / "seed-0" / "independent" / name / "pairs.jsonl").read_bytes()
    assert not list((directory / "seed-0" / "extra_steps").rglob("*-sample"))


def test_arms_end_after_their_iterations_and_are_compared_at_equal_ones(directory: Path) -> None:
    for arm in ("noisy_30", "random_pairs", "best_plan"):
        assert len(iterations(directory, arm)) == 2
    statements = {c["name"]: c["statement"] for c in json.loads((directory / "report.json").read_text())["claims"]}
    assert statements["C5 random_pairs"].startswith("moat_no_gate, iterations 1 beats")
    assert statements["C6 noisy_30"].startswith("moat_no_gate, iterations 1 beats")
    assert statements["C7 rft"].startswith("moat_no_gate beats")
    assert statements["C1 extra_steps"].startswith("moat_no_gate beats")
    assert statements["C1 independent"].startswith("moat beats")
    compared = {name.split()[1] for name in statements if not name.startswith(("C3", "C8"))}
    assert compared == {INDEPENDENT, *CONFIG["arms"][1:]}  # no arm is trained and then left out


def test_only_what_replaces_a_stage_has_its_budget(directory: Path) -> None:
    """best_plan replaces the planner's: its grounder is trained as MOAT's is."""
    planner, grounder = (
        phase(directory, "best_plan", stage) / "fit" / "metrics.jsonl" for stage in ("planner_sft-0", "grounder_sft-0")
    )
    steps = [max(row["step"] for row in read_jsonl(path)) for path in (planner, grounder)]
    assert steps[1] == CONFIG["grounder_sft"]["steps"] != steps[0]


def test_plots_show_what_was_trained_and_what_stands(directory: Path) -> None:
    """Never only the best so far: every candidate of the gate is there, with the number of seeds."""
    plot = json.loads((directory / "report.json").read_text())["plots"]["surrogate_by_stage"]
    assert "1 seeds" in plot["title"]
    rows = iterations(directory, "moat")[1:]
    wanted = [
        [2 * row["iteration"] - 1 + i, row["J_stages"][stage]]
        for row in rows
        for i, stage in enumerate(("dpo", "grounder_sft"))
        if stage in row["J_stages"]
    ]
    assert [point[:2] for point in plot["series"]["trained, accepted or not"]] == wanted
    assert len(plot["series"]["after the gate"]) == 1 + len(rows)


def test_test_tasks_are_read_after_all_training(directory: Path) -> None:
    trained = max(p.stat().st_mtime_ns for p in (directory / "seed-0").rglob("*") if p.name != ".lock")
    solved = min(p.stat().st_mtime_ns for p in (directory / "results").rglob("*.jsonl"))
    assert trained < solved


def test_on_actors_it_comes_to_the_same_numbers(directory: Path, tmp_path: Path) -> None:
    arms = ["moat_no_gate", "extra_steps", "integrated"]
    config = {**CONFIG, "arms": arms, "parallel": 2}
    one = run_in(tmp_path / "one", {**config, "parallel": 1})
    two = run_in(tmp_path / "two", config)
    for arm in arms[:2]:
        assert [{**row, "seconds": 0} for row in iterations(two, arm)] == [
            {**row, "seconds": 0} for row in iterations(one, arm)
        ]
    files = sorted(p.relative_to(one) for p in (one / "results").rglob("*.jsonl"))
    assert len(files) == 4 + 1 + 2
    assert [sha256(two / file) for file in files] == [sha256(one / file) for file in files]


def test_a_comparison_is_found_again(directory: Path) -> None:
    """Nothing is trained again where it is finished."""
    before = {p: p.stat().st_mtime_ns for p in (directory / "seed-0").rglob("*.safetensors")}
    config = build(Config, CONFIG)
    arms = Arms(config, directory, None)
    for arm in ("independent", *ARMS):
        arms.train(arm, 0, directory / "seed-0" / arm)
    assert all(arms.agents(system, 0).planner.is_dir() for system in systems(config))
    assert {p: p.stat().st_mtime_ns for p in (directory / "seed-0").rglob("*.safetensors")} == before


def test_whatever_replaces_moat_is_ungated_and_compared_with_the_ungated_arm(directory: Path) -> None:
    """Gated, `extra_steps` had 4 of 30 stages accepted: it was no longer what its name says."""
    others = KINDS.keys() - {"moat", UNGATED}
    assert all(KINDS[name].against == UNGATED and not KINDS[name].gate for name in others)
    with pytest.raises(ConfigError, match="random_pairs is compared with moat_no_gate; add it"):
        build(Config, {**CONFIG, "arms": ["moat", "random_pairs"]})
    head, *table = json.loads((directory / "report.json").read_text())["tables"]["Training, mean of seeds"]
    rows = {row[0]: dict(zip(head, row, strict=True)) for row in table}
    assert rows["random_pairs"]["compared with"] == "moat_no_gate, iterations 1"
    assert rows["rft"]["compared with"] == UNGATED
    trained = (UNGATED, "random_pairs", "rft", "extra_steps")
    assert all(rows[arm]["stages accepted"] == rows[arm]["of those offered"] for arm in trained)
    assert all(rows[arm]["iteration chosen"] >= 1 for arm in trained)


def test_an_ungated_arm_does_not_fall_back_to_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep-best with iteration 0 among the candidates would be a gate by another name."""
    chosen: list[int] = []
    rows = [{"dev_success": value} for value in (0.9, 0.4, 0.5)]

    class Until:
        def until(self, iteration: int) -> None:
            chosen.append(iteration)

    monkeypatch.setattr(study, "current_checkpoint", lambda history: history)
    arms = Arms(SimpleNamespace(alternation=AlternationConfig(monitor="dev_success")), tmp_path, None)
    monkeypatch.setattr(Arms, "outcome", lambda self, arm, seed: Outcome(rows, 0, "", Until()))
    for arm in ("moat", "moat_no_gate"):
        arms.checkpoint(System(arm), 0)
    arms.checkpoint(System.of("moat_no_gate", iterations=1), 0)
    assert chosen == [0, 2, 1]

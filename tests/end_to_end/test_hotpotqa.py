"""EXSEARCH on real questions with a real pretrained model: a few of HotpotQA, SmolLM2-135M under an adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mobula import artifacts, methods
from mobula.artifacts import read_jsonl
from mobula.environment import data_folder
from mobula.rag.exsearch.artifact import KIND

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.language,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(data_folder() is None, reason="MOBULA_DATA is not set"),
]
ROOT = Path(__file__).parents[2]
# The recipe for a GPU, cut down to a handful of questions and steps.
FEW = [
    "arms=[exsearch]",
    *(f"data.{split}={count}" for split, count in {"warm_up": 4, "train": 2, "dev": 2, "test": 2}.items()),
    *("retrieve.kind=bm25", "rollout.k_show=2", "rollout.max_passage_tokens=60"),
    *("rollout.max_turns=2", "rollout.max_action_tokens=24", "rollout.max_answer_tokens=8"),
    *("em.samples=2", "em.weights.gate=none", "em.min_q_gain=-100"),
    *("alternation.iterations=1", "alternation.actors=0"),
    *("warm_up.steps=12", "warm_up.batch=2", "warm_up.lr=1e-3", "fit.batch=1", "em.epochs=1"),
    *(f"{stage}.precision=fp32" for stage in ("skill", "warm_up", "fit")),
    *(f"{stage}.workers=0" for stage in ("skill", "warm_up", "fit")),
    *("evaluation.seeds=1", "evaluation.decisive=false", "evaluation.resamples=200"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hotpotqa") / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    recipe = str(ROOT / "jobs/exsearch/medium.yaml")
    command = [sys.executable, "-m", "mobula.cli", "run", recipe, *FEW, "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2000, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return out


def test_a_pretrained_agent_searches_real_passages(run: Path) -> None:
    rows = read_jsonl(run / "results/seed-0/exsearch.jsonl")
    assert len(rows) == 2
    # A dozen steps teach the form of turns: it searches, and what it is shown are real paragraphs.
    assert any(row["searches"] >= 1 for row in rows)
    assert any(shown for row in rows for shown in row["trajectory"]["shown"])
    report = json.loads((run / "report.json").read_text())
    assert {"exsearch/em", "exsearch/f1", "exsearch/acc", "exsearch/gold_hit", "warm_up/em"} <= set(report["measures"])
    assert report["data"][0]["records"] == 4 + 2 + 2 + 2 + 4923 + 994


def test_every_phase_ran_and_only_adapters_were_written(run: Path) -> None:
    row = read_jsonl(run / "seed-0/exsearch/iterations.jsonl")[1]
    assert row["steps"] == 2 and row["queries"] >= 1
    assert list(run.rglob("adapter_model.safetensors"))
    # The model under the adapter takes 500 MB.
    assert max(path.stat().st_size for path in run.rglob("*.safetensors")) < 50_000_000


def test_the_artifact_answers_a_question(run: Path) -> None:
    artifact = artifacts.open_artifact(run / "artifact", kind=KIND)
    predictor = methods.get("exsearch").load(artifact)
    assert len(predictor.answer(["Which band did Ian McCulloch lead?"])) == 1

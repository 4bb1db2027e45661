"""DRO on real questions with a real pretrained model: a few of Natural Questions, SmolLM2-135M adapted twice."""

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

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.language,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(data_folder() is None, reason="MOBULA_DATA is not set"),
]
ROOT = Path(__file__).parents[2]
# The recipe for a GPU, cut down to a handful of questions and steps.
FEW = [
    "arms=[dro]",
    *(f"data.{split}={count}" for split, count in {"labelled": 8, "train": 4, "dev": 2, "test": 3}.items()),
    *("retrieve.kind=bm25", "retrieve.encoder=wordllama", "retrieve.candidates=3", "retrieve.choose=2"),
    *("model.passage_tokens=40", "model.answer_tokens=8", "em.samples=2"),
    *("cold.selector_steps=2", "cold.generator_steps=2"),
    *("fit.steps=1", "fit.batch=2", "fit.precision=fp32", "fit.workers=0", "fit.checkpoint_every=1"),
    *("alternation.iterations=1", "alternation.actors=0"),
    *("evaluation.decisive=false", "evaluation.resamples=200"),
]


def test_smollm2_selects_and_answers_from_the_shell(tmp_path: Path) -> None:
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "-m", "mobula.cli", "run", str(ROOT / "jobs/dro/medium.yaml"), *FEW, "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2200, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    report = json.loads((out / "report.json").read_text())
    assert {"cold_start/f1", "dro/hit@1", "cold_start, passages retriever/hit@2"} <= set(report["measures"])
    (weighed,) = (out / "seed-0" / "dro").glob("*/*-weigh/permutations.jsonl")
    assert all(sum(row["weights"]) == pytest.approx(1) for row in read_jsonl(weighed))
    predictor = methods.get("dro").load(artifacts.open_artifact(out / "artifact"))
    request, _ = predictor.find("who sang waiting for a girl like you")
    picks = predictor.select(request)
    assert len({pick.document.id for pick in picks}) == 2 and all(0 < pick.probability <= 1 for pick in picks)
    assert isinstance(predictor.answer(request, picks), str)

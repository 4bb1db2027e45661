"""The LLaDA recipe on a tiny random LLaDA that lies in a hub cache as the published one would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mobula import artifacts, methods
from mobula.config import load
from mobula.data import export
from mobula.data.records import Document, Query, RetrievalData
from mobula.retrieval.config import Config
from mobula.retrieval.decoding import Decoder
from mobula.retrieval.prepare import prepare
from mobula.retrieval.search import SearchOptions
from mobula.retrieval.train_arms import docid_task, load_arm, settings_for
from mobula.training import fit
from tests.retrieval import published
from tests.retrieval.published import WORDS

pytestmark = [pytest.mark.end_to_end, pytest.mark.language, pytest.mark.timeout(600)]
RECIPE = Path(__file__).parents[2] / "jobs" / "diffugr" / "full_llada.yaml"
# The recipe as it is, but for the corpus, its small codes, and a single process.
FEW = [
    *("docid.levels=4", "docid.codes=8", "docid.encoder=wordllama", "docid.min_entropy=0.1"),
    *("model.query_len=8", "model.lora.rank=8", "model.lora.alpha=16"),
    *("training.precision=fp32", "training.zero=0", "training.workers=0", "training.micro_batch=32"),
    *("training.batch=32", "training.checkpoint_every=null"),
    *("evaluation.steps=[1,4]", "evaluation.depth=10", "evaluation.resamples=200", "evaluation.decisive=false"),
]


@pytest.fixture(scope="module")
def corpus() -> RetrievalData:
    """20 documents of three words that no other has; queries name one or two of them."""
    rows = [WORDS[3 * i : 3 * i + 3] for i in range(20)]
    documents = [Document(f"d{i}", f"title {i}", " ".join(row)) for i, row in enumerate(rows)]

    def queries(split: str, texts) -> list[Query]:
        return [Query(f"{split}{i}", texts(row), (f"d{i}",)) for i, row in enumerate(rows)]

    pairs = queries("train", lambda row: " ".join(row[:2])) + queries("more", lambda row: row[2])
    dev, test = queries("dev", lambda row: f"{row[2]} {row[1]}"), queries("test", lambda row: f"{row[1]} {row[0]}")
    return RetrievalData("words", "made", "0", documents, {"train": pairs, "dev": dev, "test": test})


def test_a_tiny_llada_learns_twenty_documents_within_a_minute(corpus, tmp_path) -> None:
    with published.hub(tmp_path) as hub:
        published.write_checkpoint(hub, "llada", d_model=64, mlp_hidden_size=128, n_heads=4, n_kv_heads=4)
        config = load(Config, RECIPE, [*FEW, "data.path=x", "training.steps=450", "model.base_lr=1.0"])
        started = time.perf_counter()
        material = prepare(config, corpus, tmp_path / "prepared")
        task = docid_task(config, material.prepared, config.main)
        settings = settings_for(config.training, config.learning_rates.diffusion[0])
        result = fit(task, settings, tmp_path / "fit", seed=0, name="llada")
        model = load_arm(task, result)
        queries = corpus.queries["test"]
        features = material.inputs["main"].features([query.text for query in queries])
        found = Decoder(model, task.table).search(features, [SearchOptions(k=5)] * len(queries))
        seconds = time.perf_counter() - started
    hits = [result.hits[0].doc_id in query.gold for result, query in zip(found, queries, strict=True)]
    assert sum(hits) / len(hits) >= 0.9, (sum(hits), seconds)
    assert seconds < 60


def test_the_recipe_runs_on_a_tiny_llada_from_the_shell(corpus, tmp_path) -> None:
    """All four arms, a few steps each; the artifact opens the base model again and answers."""
    with published.hub(tmp_path / "home") as hub:
        published.write_checkpoint(hub, "llada")
    export(corpus, tmp_path / "corpus")
    platform = str(RECIPE.parents[2] / "platform")
    environment = {**os.environ, "PYTHONPATH": platform, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "home" / "hub")}
    overrides = [*FEW, f"data.path={tmp_path / 'corpus'}", "training.steps=4", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "mobula.cli", "run", str(RECIPE), *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["cost"]["train_steps"] == 5 * 4  # the arms and the dual encoder
    with published.hub(tmp_path / "home"):
        opened = methods.get("diffugr").load(artifacts.open_artifact(tmp_path / "run" / "artifact"))
        hits = opened.retrievers[opened.default].search(["w3 w4"], [SearchOptions(k=5)])[0].hits
    assert len({hit.doc_id for hit in hits}) == 5

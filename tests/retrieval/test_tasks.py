"""Training tasks on a small prepared folder of real function documents."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mobula import config as configs
from mobula.data import load_retrieval
from mobula.data.records import Query
from mobula.errors import ConfigError, DataError, TrainingError
from mobula.retrieval.arms import Arm
from mobula.retrieval.config import Config
from mobula.retrieval.docids.leak import DocidLeak
from mobula.retrieval.prepare import Material, prepare, title_leaks, training_examples
from mobula.retrieval.tasks import DualTask, ModelCollapsed, check_collapse
from mobula.retrieval.train_arms import Plan, Schedule, docid_task, fit_plans, settings_for
from mobula.training import TrainingConfig, fit

ARMS = ["diffusion/rq", "autoregressive/rq", "classifier/rq", "diffusion/random", "diffusion/text.lead"]


def tiny(*overrides: str) -> Config:
    values = {
        "arms": ARMS,
        "data": {"name": "functions", "max_documents": 100},
        "docid": {"levels": 4, "codes": 8, "min_entropy": 0.0},
        "model": {"width": 32, "layers": 1, "query_len": 12},
        "pseudo_queries": {"per_document": 4},
        "training": {"steps": 4, "batch": 16, "workers": 0},
        "evaluation": {"dev_queries": 20},
    }
    return configs.build(Config, values, overrides)


@pytest.fixture(scope="module")
def material(functions, tmp_path_factory: pytest.TempPathFactory) -> Material:
    config = tiny()
    return prepare(config, load_retrieval(config.data, quiet=True), tmp_path_factory.mktemp("prepared"))


def task_of(material: Material, arm: str, config: Config | None = None):
    return docid_task(config or tiny(), material.prepared, Arm(*arm.split("/")))


@pytest.mark.parametrize("arm", ARMS)
def test_shapes_of_a_batch_and_its_loss(material: Material, arm: str) -> None:
    task = task_of(material, arm)
    batch = task.batch(torch.arange(10), torch.Generator().manual_seed(0))
    assert batch["ids"].shape == (10, 12)
    assert batch["codes"].shape == batch["z"].shape == (10, 4)
    visible = batch["z"] >= 0
    assert torch.equal(batch["z"][visible], batch["codes"][visible])
    model = task.build()
    loss, _ = task.loss(model, batch)
    loss.backward()
    assert loss.shape == ()
    assert 0.1 < loss.item() < 100
    if arm.startswith("autoregressive"):
        assert visible.all()
    elif arm.startswith("classifier"):
        assert not visible.any()
    else:
        assert batch["rates"].shape == (10,)


def test_query_never_masked(material: Material) -> None:
    """Masking touches the docid alone: the query of a batch is the one that is stored (trap 4)."""
    task = task_of(material, "diffusion/rq")
    first = task.batch(torch.arange(10), torch.Generator().manual_seed(0))
    second = task.batch(torch.arange(10), torch.Generator().manual_seed(1))
    assert not torch.equal(first["z"], second["z"])
    stored = task.queries.rows(material.prepared.examples[:10, 0])
    for name, values in stored.items():
        assert torch.equal(first[name], values)
        assert torch.equal(second[name], values)


def test_examples_pair_a_query_with_its_own_document(material: Material) -> None:
    task = task_of(material, "diffusion/rq")
    assert task.examples == len(material.prepared.examples) > 100
    queries, documents = material.prepared.examples.T
    assert set(documents.tolist()) == set(range(len(material.data.documents)))
    assert queries.max() == len(task.queries) - 1
    near = material.encoder.embed([d.text for d in material.data.documents])
    vectors = np.load(material.prepared.directory / "training_vectors.npy").astype(np.float32)
    own = (vectors[queries] * near[documents]).sum(1).mean()
    other = (vectors[queries] * near[np.roll(documents, 37)]).sum(1).mean()
    assert own > other + 0.2


@pytest.mark.parametrize("share", [0.05, 0.1, 0.4, 0.8])
def test_real_queries_make_up_their_share_of_the_examples(material: Material, share: float) -> None:
    """Also where there are more of them than that: then the pseudo-queries are repeated."""
    texts, examples = training_examples(
        tiny(f"pseudo_queries.real_share={share}").pseudo_queries, material.data, seed=0
    )
    first_real = len(texts) - len(material.data.queries["train"])
    assert (examples[:, 0] >= first_real).mean() == pytest.approx(share, rel=0.35)
    assert set(examples[:, 0].tolist()) == set(range(len(texts)))


def test_either_kind_of_example_can_be_left_out(material: Material) -> None:
    texts, examples = training_examples(tiny("pseudo_queries.real_share=0").pseudo_queries, material.data, seed=0)
    assert examples[:, 0].max() < len(texts) - len(material.data.queries["train"])
    _, examples = training_examples(tiny("pseudo_queries.real_share=1").pseudo_queries, material.data, seed=0)
    assert examples[:, 0].min() >= len(texts) - len(material.data.queries["train"])
    nothing = replace(material.data, queries={**material.data.queries, "train": []})
    with pytest.raises(
        DataError, match=r"nothing to train on; it has 0 training queries, pseudo_queries\.real_share=1\.0"
    ):
        training_examples(tiny("pseudo_queries.real_share=1").pseudo_queries, nothing, seed=0)


@pytest.mark.parametrize(
    "change", ["model.width=64", "loss.weight=elbo", "model.pool_query=false", "model.query_sees_docid=true"]
)
def test_identity_changes_with_what_decides_the_result(material: Material, change: str) -> None:
    before = task_of(material, "diffusion/rq").identity()
    assert task_of(material, "diffusion/rq").identity() == before
    assert task_of(material, "diffusion/rq", tiny(change)).identity() != before
    assert task_of(material, "diffusion/random").identity() != before
    assert DualTask(material.prepared).identity() != before


def test_identity_changes_with_the_prepared_files(functions, material: Material, tmp_path: Path) -> None:
    config = tiny("pseudo_queries.per_document=2")
    other = prepare(config, material.data, tmp_path)
    assert task_of(other, "diffusion/rq").identity() != task_of(material, "diffusion/rq").identity()


def test_a_task_travels_without_its_arrays(material: Material) -> None:
    for task in (task_of(material, "diffusion/rq"), DualTask(material.prepared)):
        assert len(pickle.dumps(task)) < 4000
        again = pickle.loads(pickle.dumps(task))
        assert again.identity() == task.identity()
        batch = again.batch(torch.arange(3), torch.Generator().manual_seed(0))
        assert {len(values) for values in batch.values()} == {3}


@pytest.mark.parametrize("arm", ARMS[:3])
def test_dev_metrics_are_shares(material: Material, arm: str) -> None:
    task = task_of(material, arm)
    with torch.no_grad():
        metrics = task.evaluate(task.build().eval())
    assert metrics.keys() == {"hit@1", "hit@10", "mrr@10", "distinct_top1"}
    assert all(0 <= value <= 1 for value in metrics.values())
    assert metrics["hit@1"] <= metrics["mrr@10"] <= metrics["hit@10"]


def test_the_dual_encoder_starts_as_the_frozen_encoder(material: Material) -> None:
    task = DualTask(material.prepared)
    model = task.build()
    found = task.evaluate(model)
    queries, documents = task.dev_vectors.numpy(), task.documents.numpy()
    best = [task.doc_ids[row] for row in (queries @ documents.T).argmax(1)]
    expected = np.mean([doc in gold for doc, gold in zip(best, material.prepared.dev_gold, strict=True)])
    assert found["hit@1"] == pytest.approx(expected)
    loss, _ = task.loss(model, task.batch(torch.arange(16), torch.Generator()))
    loss.backward()
    assert model.query.weight.grad.abs().sum() > 0


def test_a_document_that_stands_twice_in_a_batch_is_not_its_own_negative(material: Material) -> None:
    task = DualTask(material.prepared)
    twice = task.batch(torch.zeros(4, dtype=torch.int64), torch.Generator())
    assert task.loss(task.build(), twice)[0].item() == pytest.approx(0.0, abs=1e-6)


def test_collapse_detected(material: Material) -> None:
    """A constant predictor gives every query the same documents: it raises, and only in the second half (trap 17)."""

    task = task_of(material, "diffusion/rq", tiny("model.pool_query=false"))
    model = task.build().eval()
    hear = model.memory
    model.memory = lambda query: model.unconditional(hear(query))
    with torch.no_grad():
        metrics = task.evaluate(model)
    assert metrics["distinct_top1"] == 1 / 20
    task.check(metrics, 50, 100)
    # One document of twenty queries is just what 5 % are; a real dev split is longer.
    with pytest.raises(ModelCollapsed, match=r"diffusion/rq: 0.5% distinct top-1 documents on dev at step 51"):
        task.check({**metrics, "distinct_top1": 1 / 200}, 51, 100)


def test_collapse_is_measured_against_what_perfect_answers_have(caplog: pytest.LogCaptureFixture) -> None:
    """200 queries for 10 documents: a perfect model has 5 % distinct answers and has not collapsed."""
    gold = [{f"d{i % 10}"} for i in range(200)]
    check_collapse("x", 10 / 200, gold, 9, 10, fatal=True)
    assert not caplog.records
    check_collapse("x", 4 / 200, gold, 9, 10, fatal=True)
    assert "may be collapsing" in caplog.text
    with pytest.raises(ModelCollapsed):
        check_collapse("x", 1 / 1000, gold, 9, 10, fatal=True)
    check_collapse("x", 1 / 1000, gold, 9, 10, fatal=False)


def test_a_trial_of_a_rate_and_a_control_may_collapse(material: Material) -> None:
    """Dev rejects a rate that collapses; random codes have no content to learn from. Neither ends the run."""
    collapsed = {"distinct_top1": 1 / 200}
    with pytest.raises(ModelCollapsed):
        task_of(material, "classifier/rq").check(collapsed, 10, 10)
    replace(task_of(material, "classifier/rq"), guarded=False).check(collapsed, 10, 10)
    task_of(material, "diffusion/random").check(collapsed, 10, 10)


def test_a_rate_that_diverges_is_rejected_and_all_of_them_are_an_error(material: Material, tmp_path: Path) -> None:
    schedule = Schedule(TrainingConfig(steps=20, batch=16, workers=0, report_every=5), 0.5, 0)
    plan = Plan("diffusion/rq", task_of(material, "diffusion/rq"), [1e30, 1e-2], tmp_path / "some", 1)
    (results,), rows = fit_plans([plan], schedule, None)
    assert rows[0][2:] == ["diverged", False]
    assert rows[1][3]
    assert len(results) == 1
    with pytest.raises(TrainingError, match=r"diffusion/rq: the loss became NaN or infinite with every rate"):
        fit_plans([replace(plan, rates=[1e30, 1e31], directory=tmp_path / "all")], schedule, None)


def test_a_collapsed_model_stops_the_training(material: Material, tmp_path: Path) -> None:
    class Collapsing(type(task_of(material, "classifier/rq"))):
        def evaluate(self, model: nn.Module) -> dict[str, float]:
            return {"hit@1": 0.0, "hit@10": 0.0, "distinct_top1": 0.001}

    task = task_of(material, "classifier/rq")
    task.__class__ = Collapsing
    settings = settings_for(tiny().training, 1e-3)
    with pytest.raises(ModelCollapsed):
        fit(task, settings, tmp_path, seed=0, name="collapsing")


def test_a_model_on_the_quantiser_never_ends_below_its_start(material: Material, functions, tmp_path: Path) -> None:
    """The starting weights are a candidate for the best, so a ruinous learning rate costs nothing on dev."""
    config = tiny(
        "model.backbone=encoder", "model.encoder=wordllama", "arms=[diffusion/opq]", "pseudo_queries.per_document=2"
    )
    prepared = prepare(config, material.data, tmp_path / "prepared").prepared
    task = docid_task(config, prepared, config.parsed_arms[0])
    with torch.no_grad():
        start = task.evaluate(task.build().eval())
    assert start["hit@10"] > 0.3
    settings = replace(settings_for(TrainingConfig(steps=6, batch=16, workers=0), lr=0.3), eval_every=6)
    task.check = lambda *_: None  # this ruin is not the collapse that the guard looks for
    result = fit(task, settings, tmp_path / "fit", seed=0, name="opq")
    assert result.best["hit@10"] >= start["hit@10"]
    assert result.best["step"] == 0


def test_preparing_again_finds_what_is_there(material: Material) -> None:
    directory = material.prepared.directory
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.name != ".lock"}
    again = prepare(tiny(), material.data, directory)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.name != ".lock"} == before
    assert again.prepared.identity() == material.prepared.identity()


def test_docid_leak_stops_a_run_on_titles(material: Material, tmp_path: Path) -> None:
    """Docids made of titles and queries that are titles: generating would be copying (trap 1)."""
    config = tiny("arms=[diffusion/text.title, diffusion/text.lead]")
    titles = [Query(f"t-{d.id}", d.title, (d.id,)) for d in material.data.documents]
    asked = replace(material.data, queries={**material.data.queries, "test": titles})
    with pytest.raises(DocidLeak, match=r"100.0% of the queries contain the docid.*text.title"):
        title_leaks(prepare(config, asked, tmp_path / "titles"), config.parsed_arms)


def test_the_share_of_queries_that_hold_their_docid_is_measured(material: Material, tmp_path: Path) -> None:
    config = tiny("arms=[diffusion/text.title, diffusion/text.lead, diffusion/rq]")
    shares = title_leaks(prepare(config, material.data, tmp_path), config.parsed_arms)
    assert shares.keys() == {"text.title", "text.lead"}
    assert all(0 <= share < 0.5 for share in shares.values())


def test_title_docids_on_title_queries_are_refused_before_anything_is_read() -> None:
    with pytest.raises(configs.ConfigError, match="takes the titles away"):
        tiny("arms=[diffusion/text.title]", "data.name=scifact", "data.queries=titles")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("views.per_document=2", "views.per_document was renamed: use pseudo_queries.per_document"),
        ("views.pseudo=[window]", "views.pseudo was renamed: use pseudo_queries.kinds"),
        ("pseudo_queries.queries=0.1", "pseudo_queries.queries was renamed: use pseudo_queries.real_share"),
        ("model.twin=t5", "model.twin was renamed: use model.ar_base"),
        ("model.lora_rank=4", "model.lora_rank was renamed: use model.lora.rank"),
        ("model.lora_alpha=4", "model.lora_alpha was renamed: use model.lora.alpha"),
    ],
)
def test_an_old_key_names_the_new_one(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(new)):
        tiny(old)

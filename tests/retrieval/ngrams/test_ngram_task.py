"""Training the language model on real documents, from the prepared folder to a search over later ones."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_ngrams import MODEL

from mobula.data import RetrievalData
from mobula.data.records import Document, Query
from mobula.errors import ConfigError, DataError
from mobula.retrieval.build import ModelConfig
from mobula.retrieval.config import PseudoQueriesConfig
from mobula.retrieval.ngrams.config import MULTIVIEW, NgramConfig
from mobula.retrieval.ngrams.generate import NONE
from mobula.retrieval.ngrams.index import NgramIndex
from mobula.retrieval.ngrams.language import Speaker
from mobula.retrieval.ngrams.retriever import load
from mobula.retrieval.ngrams.stream import BREAK, FIRST, TITLE, TITLE_END, Streams
from mobula.retrieval.ngrams.task import NgramTask, SpanTargets, write_ngrams
from mobula.retrieval.search import SearchOptions
from mobula.retrieval.tasks import ModelCollapsed
from mobula.retrieval.train_arms import settings_for
from mobula.training import TrainingConfig, fit

PSEUDO = PseudoQueriesConfig(per_document=6, real_share=0.3)
INITIAL = 110


def prepared(
    directory: Path, data: RetrievalData, *, model: ModelConfig = MODEL, seed: int = 0, **options
) -> NgramTask:
    """The first documents and their queries."""
    documents = data.documents[:INITIAL]
    known = {document.id for document in documents}
    train, dev = ([q for q in data.queries[split] if set(q.gold) <= known] for split in ("train", "dev"))
    config = NgramConfig(**{"max_len": 4, "unigrams": 200, "dev_queries": 20, "spans": 3, **options})
    return write_ngrams(directory, documents, train, dev, config=config, pseudo_queries=PSEUDO, model=model, seed=seed)


@pytest.fixture(scope="module", params=["plain", "multiview"])
def task(request: pytest.FixtureRequest, data: RetrievalData, tmp_path_factory: pytest.TempPathFactory) -> NgramTask:
    views = {"views": list(MULTIVIEW), "unseen": 300} if request.param == "multiview" else {}
    return prepared(tmp_path_factory.mktemp(request.param), data, **views)


def test_targets_are_ngrams_of_the_initial_documents(task: NgramTask) -> None:
    batch = task.batch(torch.arange(0, task.examples, 7), torch.Generator())
    corpus = task.opened.corpus
    indexes = {view: NgramIndex.build(streams, 6) for view, streams in corpus.streams.items()}
    spans = [tuple(code for code in row if code != NONE) for row in batch["spans"].tolist()]
    assert batch["spans"].shape[1] == 6
    counts = np.stack([index.count(spans) for index in indexes.values()])
    assert (counts.max(0) > 0).all()
    assert any(span[0] == TITLE for span in spans)
    assert {len(span) for span in spans if span[0] != TITLE} >= {4}
    assert max(len(span) for span in spans if span[0] != TITLE) == 4


def test_padding_is_not_trained(task: NgramTask) -> None:
    """The loss is the mean over the codes of the spans, all levels of the network's own logits.

    With ``unseen`` the softmax holds tokens of no document as well, drawn anew, and scored as decoding will score them.
    """
    batch = task.batch(torch.arange(0, task.examples, task.examples // 32), torch.Generator())
    model = task.build().eval()
    spans = batch["spans"]
    loss, _ = task.loss(model, batch)
    corpus = task.opened.corpus
    known, drawn = set(corpus.vocabulary.tokens.tolist()), batch["unseen"]
    other = task.batch(torch.arange(3), torch.Generator().manual_seed(1))["unseen"]
    assert not len(drawn) or not torch.equal(drawn, other)
    row = {tuple(vector): token for token, vector in enumerate(corpus.tokenizer.table.tolist())}
    tokens = [row[tuple(vector)] for vector in drawn.tolist()]
    assert not known & set(tokens)
    speaker = Speaker(model, corpus.vocabulary, corpus.tokenizer)
    grown = speaker.grown(replace(corpus.vocabulary, tokens=np.array([*corpus.vocabulary.tokens, *tokens])))
    with torch.no_grad():
        memory = model.memory({"ids": batch["ids"]})
        log_probs = grown.log_probs(model.hidden(memory, spans.clamp(min=0)[:, None])[:, 0])
    chosen = log_probs.gather(-1, spans.clamp(min=0)[..., None]).squeeze(-1)
    assert (spans == NONE).any()
    assert len(drawn) == corpus.config.unseen
    assert loss.item() == pytest.approx(-chosen[spans != NONE].mean().item(), abs=1e-4)


def test_a_code_weighs_the_same_however_a_batch_is_divided(task: NgramTask) -> None:
    """Spans have different lengths: a mean of the parts' means would count codes of short ones for more."""
    torch.manual_seed(0)
    network, every = task.build().eval(), torch.arange(0, task.examples, max(1, task.examples // 12))
    weights = task.weights(every).double()
    assert len(set(weights.tolist())) > 1

    def loss(indices: torch.Tensor) -> float:
        batch = {**task.batch(indices, torch.Generator()), "unseen": torch.zeros(0, 1)}
        with torch.no_grad():
            return float(task.loss(network, batch)[0])

    parts = [(float(task.weights(part).sum()), loss(part)) for part in every.split(3)]
    assert sum(weight * part for weight, part in parts) / float(weights.sum()) == pytest.approx(loss(every), rel=1e-5)


def targets_of(streams: Streams, config: NgramConfig, query: np.ndarray, document: int = 0, view="text") -> np.ndarray:
    targets = SpanTargets(streams, config, view, np.random.default_rng(0))
    return targets.codes(targets.draw(query, document))


def test_windows_that_share_rare_tokens_with_the_query_are_preferred() -> None:
    text = [*range(FIRST, FIRST + 40), BREAK]
    common = [np.array([FIRST, FIRST + 1, BREAK], np.int32)] * 9
    streams = Streams.of([np.array(text, np.int32), *common])
    query = np.array([FIRST, FIRST + 20])

    def drawn(sharpness: float) -> np.ndarray:
        config = NgramConfig(max_len=4, spans=1000, sharpness=sharpness)
        return targets_of(streams, config, query)[:, :4]

    share = [(drawn(sharpness) == FIRST + 20).any(1).mean() for sharpness in (0.0, 1.0, 3.0)]
    assert share[0] == pytest.approx(4 / 37, abs=0.04)
    assert share[0] + 0.2 < share[1] < share[2]
    assert ((drawn(0.0)[:, 1:] - drawn(0.0)[:, :-1]) == 1).all()
    # A token of every document earns nothing.
    assert (drawn(1.0) == FIRST).any(1).mean() < 0.1


def test_targets_stay_inside_a_part_of_the_document() -> None:
    title, text = [TITLE, 5, 6, TITLE_END], [7, 8, 9, BREAK, 10, BREAK]
    streams = Streams.of([np.array([*title, *text], np.int32), np.array([BREAK], np.int32)])
    config = NgramConfig(max_len=2, spans=200, titles=2)
    drawn = targets_of(streams, config, np.array([7]))
    spans = {tuple(code for code in row if code != NONE) for row in drawn.tolist()}
    assert spans == {tuple(title), (5, 6), (7, 8), (8, 9), (10,)}
    assert (drawn[:, 0] == TITLE).sum() == 2
    assert len(targets_of(streams, config, np.array([7]), document=1)) == 0
    only = targets_of(streams, config, np.array([7]), view="title")
    assert {tuple(row) for row in only.tolist()} == {tuple(title)}


def test_identity_changes_with_what_decides_the_result(data: RetrievalData, task: NgramTask, tmp_path: Path) -> None:
    options = {name: getattr(task.opened.corpus.config, name) for name in ("views", "unseen")}
    same = prepared(tmp_path / "same", data, **options)
    assert same.identity() == task.identity()
    assert prepared(tmp_path / "same", data, seed=5, **options).identity() == task.identity()  # it was done already
    for name, changes in {
        "seed": {"seed": 1},
        "beam": {"beam": 3},
        "model": {"model": replace(MODEL, width=64)},
    }.items():
        assert prepared(tmp_path / name, data, **{**options, **changes}).identity() != task.identity()


def test_a_task_travels_without_its_arrays(task: NgramTask) -> None:
    assert task.opened.targets is not None
    assert len(pickle.dumps(task)) < 1000
    again = pickle.loads(pickle.dumps(task))
    assert again.identity() == task.identity()
    rows = torch.arange(5)
    found, expected = again.batch(rows, torch.Generator()), task.batch(rows, torch.Generator())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_later_documents_and_test_queries_change_nothing(data: RetrievalData, tmp_path: Path) -> None:
    """Trap 7: what is prepared knows the initial documents alone."""
    before = prepared(tmp_path / "a", data).identity()
    changed = replace(
        data,
        documents=[*data.documents[:INITIAL], Document("x", "Zyzzyva", "zyzzyva")],
        queries={**data.queries, "test": []},
    )
    assert prepared(tmp_path / "b", changed).identity() == before


def test_nothing_to_train_on_and_other_networks_are_refused(data: RetrievalData, tmp_path: Path) -> None:
    empty = [Document("a", "", "")]
    query = [Query("q", "insulin", ("a",))]
    options = {"config": NgramConfig(), "pseudo_queries": PseudoQueriesConfig(per_document=0), "seed": 0}
    with pytest.raises(DataError, match="nothing to train on"):
        write_ngrams(tmp_path / "a", empty, query, query, model=MODEL, **options)
    with pytest.raises(ConfigError, match="backbone=encoder: n-grams are generated by backbone=small alone"):
        prepared(tmp_path / "b", data, model=replace(MODEL, backbone="encoder"))
    assert NgramConfig(views=["text", "title"]).problems()
    assert NgramConfig(views=[]).problems()
    assert not NgramConfig(views=["title", "body"]).problems()


def test_a_collapsed_model_ends_the_training(task: NgramTask) -> None:
    collapsed = {"distinct_top1": 1 / 1000}
    task.check(collapsed, 4, 10)
    with pytest.raises(ModelCollapsed):
        task.check(collapsed, 6, 10)
    replace(task, guarded=False).check(collapsed, 6, 10)


def hit(retriever, queries: list[Query]) -> float:
    results = retriever.search([q.text for q in queries], [SearchOptions(k=10)] * len(queries))
    return float(np.mean([any(h.doc_id in q.gold for h in r.hits) for q, r in zip(queries, results, strict=True)]))


def test_training_finds_documents_that_came_later(data: RetrievalData, tmp_path: Path) -> None:
    """End to end: Hit@10 far above chance on the documents of the training and on those added after it."""
    data = replace(data, documents=[data.documents[i] for i in np.random.default_rng(0).permutation(150)])
    task = prepared(tmp_path / "prepared", data)
    assert {g for gold in task.opened.dev_gold for g in gold} <= {d.id for d in data.documents[:INITIAL]}
    settings = replace(settings_for(TrainingConfig(steps=60, batch=96, workers=0), 8e-3), eval_every=30)
    found = fit(task, settings, tmp_path / "training", seed=0, name="ngram")
    chance = 10 / INITIAL
    assert found.best["hit@10"] > 5 * chance
    retriever = load(tmp_path / "prepared", found.weights)
    added = data.documents[INITIAL:]
    assert retriever.insert(added) == 1
    ids = {document.id for document in added}
    later = [q for found in data.queries.values() for q in found if set(q.gold) <= ids]
    assert len(later) > 50
    assert hit(retriever, later) > 3 * 10 / len(data.documents)


@pytest.mark.parametrize("options", [{"most_frequent": 100, "unseen": 300}, {"unseen": 300}, {}], ids=str)
@pytest.mark.parametrize("embed", ["wordllama", "random"])
def test_a_step_of_every_kind_of_vocabulary(data: RetrievalData, tmp_path: Path, options: dict, embed: str) -> None:
    """A limited vocabulary never grows, so no unseen token stands in its softmax; trained rows have a mean."""
    task = prepared(tmp_path, data, model=replace(MODEL, embed=embed), **options)
    batch = task.batch(torch.arange(16), torch.Generator())
    assert len(batch["unseen"]) == (300 if list(options) == ["unseen"] else 0)
    model = task.build()
    loss, _ = task.loss(model, batch)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        measured = task.evaluate(model.eval())
    assert 0 <= measured["hit@10"] <= 1


def test_no_pseudo_query_repeats_a_held_out_query(data: RetrievalData, tmp_path: Path) -> None:
    """Windows as long as the documents repeat these whole, so a query that does so too takes their places."""
    documents = [
        replace(document, title="", text=f"document {i} alone says this")
        for i, document in enumerate(data.documents[:20])
    ]
    dev = [Query("d", "another question", (documents[1].id,))]
    same = [Query("h", documents[0].text, (documents[0].id,))]
    counts = []
    for name, held_out in (("without", []), ("with", same)):
        task = write_ngrams(
            tmp_path / name, documents, [], dev, held_out=held_out,
            config=NgramConfig(max_len=3, spans=2), pseudo_queries=PSEUDO, model=ModelConfig(width=32, layers=1),
            seed=0,
        )  # fmt: skip
        counts.append(task.examples)
    assert counts[1] < counts[0]

"""The beam over the index against exhaustive search and against a beam with one Python set a hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mobula.models.text import load_static
from mobula.retrieval.decoding.batched_calls import encode
from mobula.retrieval.network import DocidTransformer, NetworkShape
from mobula.retrieval.ngrams.generate import NONE, Generated, generate
from mobula.retrieval.ngrams.index import NgramIndex, is_key
from mobula.retrieval.ngrams.language import MARKS_IN_TITLE, Speaker
from mobula.retrieval.ngrams.stream import BREAK, FIRST, TITLE, TITLE_END, Streams, Vocabulary

CODES, MAX_LEN, QUERY = 15, 3, 6


@pytest.fixture(scope="module")
def model() -> DocidTransformer:
    torch.manual_seed(0)
    levels = MAX_LEN + MARKS_IN_TITLE
    shape = NetworkShape("autoregressive", (CODES,) * levels, 32, 2, 2, 0.0, "tokens", QUERY, 24)
    network = DocidTransformer(shape, table=torch.randn(50, 24), code_table=2 * torch.randn(CODES, 24)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2.0)  # an untrained model has hardly a preference
    return network


@pytest.fixture(scope="module")
def speaker(model: DocidTransformer) -> Speaker:
    return Speaker(model, Vocabulary(np.arange(CODES - FIRST), CODES, False, 50), load_static())


def corpus(seed: int = 0, documents: int = 12) -> Streams:
    """Every second document has a title, every fourth one whose end is cut off."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(documents):
        title = [TITLE, *random.integers(FIRST, CODES, random.integers(1, MAX_LEN + 1)), TITLE_END] if i % 2 else []
        if i % 4 == 3:
            title += [int(random.integers(FIRST, CODES)), TITLE_END]
        rows.append(np.array([*title, *random.integers(FIRST, CODES, random.integers(0, 15)), BREAK], np.int32))
    return Streams.of(rows)


def index_of(streams: Streams, segments: int = 1) -> NgramIndex:
    cuts = np.array_split(np.arange(len(streams)), segments)
    index = NgramIndex.build(streams.select(cuts[0]), MAX_LEN + MARKS_IN_TITLE)
    for cut in cuts[1:]:
        index = index.add(streams.select(cut))
    return index


def queries(count: int) -> dict[str, torch.Tensor]:
    return {"ids": torch.from_numpy(np.random.default_rng(1).integers(1, 50, (count, QUERY)))}


def run(speaker, streams: Streams, count: int, width: int, *, segments: int = 1, titles_only=False) -> list[Generated]:
    memory = encode(speaker.network, queries(count))
    index = index_of(streams, segments)
    return generate(speaker, memory, index, width=width, max_len=MAX_LEN, together=4, titles_only=titles_only)


def as_dict(found: Generated) -> dict[tuple[int, ...], float]:
    rows = [tuple(code for code in row if code != NONE) for row in found.codes.tolist()]
    assert len(set(rows)) == len(rows)
    return dict(zip(rows, found.log_p.tolist(), strict=True))


@torch.no_grad()
def log_p(model, query: int, ngram: tuple[int, ...]) -> float:
    """Teacher-forced, over the whole vocabulary."""
    memory = encode(model, {"ids": queries(query + 1)["ids"][query:]})
    z = torch.tensor([[*ngram, *[0] * (model.levels - len(ngram))]])
    logits = torch.log_softmax(model.logits(memory, z), -1)[0]
    return float(sum(logits[i, code] for i, code in enumerate(ngram)))


def all_keys(streams: Streams) -> set[tuple[int, ...]]:
    """Every n-gram of two or more codes that may be a key."""
    keys = set()
    for document in range(len(streams)):
        row = streams.row(document).tolist()
        for begin in range(len(row)):
            for end in range(begin + 2, begin + MAX_LEN + MARKS_IN_TITLE + 1):
                ngram = tuple(row[begin:end])
                title = ngram[0] == TITLE
                if end <= len(row) and is_key(ngram) and (title or len(ngram) <= MAX_LEN):
                    keys.add(ngram)
    return keys


def test_a_beam_wide_enough_finds_every_key(speaker, model) -> None:
    """With the model's own probabilities: what the constraint left out of the vocabulary keeps its share."""
    streams = corpus()
    expected = all_keys(streams)
    for i, found in enumerate(run(speaker, streams, 3, width=200)):
        keys = as_dict(found)
        assert keys.keys() == expected
        for ngram in list(keys)[::9]:
            assert keys[ngram] == pytest.approx(log_p(model, i, ngram), abs=1e-4)
    assert any(ngram[0] == TITLE for ngram in expected)


def test_ranges_lead_to_the_occurrences(speaker) -> None:
    streams = corpus()
    index = index_of(streams, 3)
    (found,) = run(speaker, streams, 1, width=6, segments=3)
    ngrams = list(as_dict(found))
    assert found.ranges.counts.tolist() == index.count(ngrams).tolist()
    row, position = index.positions(found.ranges)
    document = np.searchsorted(streams.starts, position, "right") - 1
    offset = position - streams.starts[document]
    for i, ngram in enumerate(ngrams):
        mine = row == i
        assert list(zip(document[mine], offset[mine], strict=True)) == index.locate(ngram, 1000)


def callback_beam(model, streams: Streams, query: int, width: int) -> dict[tuple[int, ...], float]:
    """The beam by its definition: a Python set of allowed codes for every hypothesis."""
    text = [streams.row(d).tolist() for d in range(len(streams))]

    def allowed(prefix: tuple[int, ...]) -> set[int]:
        if TITLE_END in prefix or (prefix[:1] != (TITLE,) and len(prefix) == MAX_LEN):
            return set()
        after = {
            row[i + len(prefix)]
            for row in text
            for i in range(len(row) - len(prefix))
            if tuple(row[i : i + len(prefix)]) == prefix
        }
        marks = {TITLE} if not prefix else {TITLE_END} if prefix[0] == TITLE else set()
        return {code for code in after if code >= FIRST or code in marks}

    beam, keys = {(): 0.0}, {}
    for _ in range(model.levels):
        grown = {(*p, c): log_p(model, query, (*p, c)) for p in beam for c in sorted(allowed(p))}
        beam = dict(sorted(grown.items(), key=lambda item: -item[1])[:width])
        keys |= {n: value for n, value in beam.items() if len(n) > 1 and is_key(n)}
    return keys


@pytest.mark.parametrize("segments", [1, 4])
def test_beam_equals_one_with_python_sets(speaker, model, segments: int) -> None:
    streams = corpus(3)
    for i, found in enumerate(run(speaker, streams, 3, width=4, segments=segments)):
        keys, expected = as_dict(found), callback_beam(model, streams, i, 4)
        assert keys.keys() == expected.keys()
        assert all(keys[n] == pytest.approx(expected[n], abs=1e-4) for n in keys)


def test_titles_only(speaker) -> None:
    streams = corpus()
    titles = {ngram for ngram in all_keys(streams) if ngram[0] == TITLE}
    found = run(speaker, streams, 2, width=50, titles_only=True)
    assert all(as_dict(one).keys() == titles for one in found)
    bare = Streams.of([row for row in map(streams.row, range(len(streams))) if row[0] != TITLE])
    for one in run(speaker, bare, 2, width=5, titles_only=True):
        assert not len(one.codes)
        assert not len(one.log_p)


def test_the_first_codes_are_a_distribution(speaker) -> None:
    for found in run(speaker, corpus(), 3, width=2):
        assert np.exp(found.first).sum() == pytest.approx(1.0, abs=1e-5)


def test_generation_does_not_depend_on_the_batch(speaker) -> None:
    """To the last bit: hypotheses of a query share matrix products with a fixed number of others."""
    streams = corpus(2, documents=30)
    index = index_of(streams, 2)
    query = queries(11)
    options = {"width": 6, "max_len": MAX_LEN, "together": 4}
    together = generate(speaker, encode(speaker.network, query), index, **options)
    for i in range(11):
        (alone,) = generate(speaker, encode(speaker.network, {"ids": query["ids"][i : i + 1]}), index, **options)
        for name in ("codes", "log_p", "first"):
            assert np.array_equal(getattr(alone, name), getattr(together[i], name))
        assert np.array_equal(alone.ranges.low, together[i].ranges.low)
        assert (alone.steps, alone.rows) == (together[i].steps, together[i].rows)

"""Left-to-right decoding through the trie."""

import numpy as np
import pytest
from planted import Planted, corpus_table, hashed, keys, log_softmax, random_table

from mobula.retrieval.decoding import ArDecoder
from mobula.retrieval.decoding import autoregressive as module
from mobula.retrieval.docids.trie import Trie
from mobula.retrieval.search import BadSearch, SearchOptions, StepEvent


def search(table, rule, key=0, **options):
    model = Planted(table, rule, "autoregressive")
    (found,) = ArDecoder(model, table).search(keys(key), [SearchOptions(**options)])
    return found, model


def likelihood(rule, code, key=0):
    """log p(c | q) by the chain rule."""
    prefixes = [tuple(code[:level]) + (-1,) * (len(code) - level) for level in range(len(code))]
    return sum(log_softmax(rule(key, z))[level, code[level]] for level, z in enumerate(prefixes))


def test_beam_of_all_codes_equals_exhaustive_order():
    for seed in range(5):
        table = random_table(np.random.default_rng(seed))
        beam, _ = search(table, hashed(), seed, decoder="beam", beam=256, k=100)
        exhaustive, _ = search(table, hashed(), seed, decoder="exhaustive", k=100)
        assert [hit.doc_id for hit in beam.hits] == [hit.doc_id for hit in exhaustive.hits]
        assert beam.filled == 0
        for hit in beam.hits:
            code = table.codes[table.rows[hit.doc_id]].tolist()
            assert hit.score == pytest.approx(likelihood(hashed(), code, seed), abs=1e-4)


def test_greedy_follows_the_trie():
    for seed in range(10):
        table = random_table(np.random.default_rng(seed))
        codes, z = table.codes[table.live], [-1] * 4
        for level in range(4):
            allowed = {code[level] for code in codes.tolist() if code[:level] == z[:level]}
            table_of = log_softmax(hashed()(seed, tuple(z)))[level]
            z[level] = max(sorted(allowed), key=lambda code: table_of[code])
        found, _ = search(table, hashed(), seed, decoder="greedy")
        assert found.raw_code == tuple(z) and found.raw_valid
        assert (found.nfe, found.rows) == (4, 4)


def test_trie_masks_vectorised(monkeypatch):
    """CSR masks equal a dict trie, and a search asks for them once a level whatever the number of beams."""
    table = random_table(np.random.default_rng(0))
    nested = {}
    for code in table.codes[table.live].tolist():
        node = nested
        for one in code:
            node = node.setdefault(one, {})
    trie, frontier = Trie.build(table), [(0, nested)]
    while frontier:
        mask = trie.mask(np.array([node for node, _ in frontier]))
        assert [set(np.flatnonzero(row)) for row in mask] == [set(children) for _, children in frontier]
        frontier = [
            (int(trie.step(np.array([node]), np.array([code]))[0]), child)
            for node, children in frontier
            for code, child in children.items()
        ]
    calls = []
    mask = Trie.mask
    monkeypatch.setattr(Trie, "mask", lambda self, nodes: calls.append(nodes.shape) or mask(self, nodes))
    for beam in (1, 4, 64):
        calls.clear()
        search(table, hashed(), decoder="beam", beam=beam)
        assert len(calls) == table.levels


def test_hits_full_and_unique_autoregressive():
    rng = np.random.default_rng(6)
    for table in (random_table(rng), random_table(rng, documents=9), corpus_table([[1, 2, 3, 4]] * 7, [5] * 4)):
        live = {table.doc_ids[row] for row in np.flatnonzero(table.live)}
        for k in (1, 10, 100):
            for options in ({"decoder": "greedy"}, {"decoder": "beam", "beam": 3}, {"decoder": "exhaustive"}):
                found, _ = search(table, hashed(), k=k, **options)
                ids = [hit.doc_id for hit in found.hits]
                assert len(ids) == len(set(ids)) == min(k, len(live)) and set(ids) <= live
                scores = [hit.score for hit in found.hits]
                assert scores == sorted(scores, reverse=True) and np.isfinite(scores).all()


def test_fill_prefers_shared_prefixes():
    table = corpus_table([[0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]], [2] * 3)
    favoured = np.array([[0.0, 5.0]] * 3)
    found, _ = search(table, lambda key, z: favoured, decoder="greedy", k=5)
    assert [hit.doc_id for hit in found.hits] == ["d3", "d1", "d2", "d0", "d4"]
    assert found.filled == 4


def test_rows_count_live_hypotheses():
    table = corpus_table([[0, 0], [1, 0], [1, 1]], [2, 2])
    found, _ = search(table, hashed(width=2), decoder="beam", beam=50)
    assert (found.nfe, found.rows) == (2, 1 + 2)


def test_exhaustive_is_limited(monkeypatch):
    monkeypatch.setattr(module, "MOST_EXHAUSTIVE", 10)
    with pytest.raises(BadSearch, match="at most 10"):
        search(random_table(np.random.default_rng(0)), hashed(), decoder="exhaustive")


def test_diffusion_decoders_are_refused():
    with pytest.raises(BadSearch, match="greedy, beam, exhaustive"):
        search(random_table(np.random.default_rng(0)), hashed(), decoder="match_rerank")


def test_trace_tells_the_best_hypothesis():
    table = random_table(np.random.default_rng(0))
    decoder = ArDecoder(Planted(table, hashed(), "autoregressive"), table)
    *events, result = decoder.trace(keys(1), SearchOptions(decoder="beam", beam=5))
    assert len(events) == 4 and all(isinstance(event, StepEvent) for event in events)
    z = [-1] * 4
    for event in events:
        for level in event.remasked:
            z[level] = -1
        for level, code, _ in event.commits:
            z[level] = code
    assert tuple(z) == result.raw_code
    (found,) = decoder.search(keys(1), [SearchOptions(decoder="beam", beam=5)], trace=True)
    assert found == result

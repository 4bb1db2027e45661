"""From codes to ranked documents: likelihoods, decoders, the any-order beam."""

import itertools

import numpy as np
import pytest
from planted import Planted, corpus_table, hashed, keys, log_softmax, random_table

from mobula.retrieval.decoding import Decoder
from mobula.retrieval.decoding.scores import bound, chain, draw_masks, monte_carlo
from mobula.retrieval.search import SearchOptions

DECODER_VARIANTS = [
    {"decoder": "one_pass"},
    {"decoder": "match"},
    {"decoder": "match_rerank", "pool": 3},
    {"decoder": "best_of_n", "n": 3, "pool": 2},
    {"decoder": "beam", "beam": 3},
    {"decoder": "beam", "beam": 3, "beam_per_step": 2, "beam_score": "one_pass"},
    {"decoder": "beam", "beam": 2, "beam_score": "mc", "mc": 5},
    {"decoder": "chain_rescore", "rescore": 4},
]


def search(table, rule, key=0, gold=None, **options):
    model = Planted(table, rule)
    golds = None if gold is None else [gold]
    (found,) = Decoder(model, table).search(keys(key), [SearchOptions(**options)], golds)
    return found, model


def answer(decoding, rule, key=0):
    """Run a decoding against a rule, one row at a time."""
    try:
        z = next(decoding)
        while True:
            z = decoding.send(np.stack([log_softmax(rule(key, tuple(row))) for row in z.tolist()]))
    except StopIteration as stop:
        return stop.value


def any_order_average(rule, code, key=0):
    """Average over all L! orders of the chain rule's log-likelihood."""
    totals = []
    for order in itertools.permutations(range(len(code))):
        z, total = [-1] * len(code), 0.0
        for level in order:
            total += log_softmax(rule(key, tuple(z)))[level, code[level]]
            z[level] = code[level]
        totals.append(total)
    return float(np.mean(totals))


def test_mc_bound_equals_any_order_average():
    """The expectation over l ~ U{1..L} and masks of l positions, enumerated for L = 3."""
    rule, code = hashed(2.0, 4), np.array([1, 3, 0])
    expectation = 0.0
    for count in range(1, 4):
        masks = np.array([[i in chosen for i in range(3)] for chosen in itertools.combinations(range(3), count)])
        tables = np.stack([log_softmax(rule(0, tuple(np.where(mask, -1, code).tolist()))) for mask in masks])
        expectation += bound(tables, code, masks) / 3
    assert expectation == pytest.approx(any_order_average(rule, code.tolist()))


def test_mc_draws_approach_the_bound():
    rule, code = hashed(2.0, 4), np.array([[1, 3, 0], [2, 2, 2]])
    estimate = answer(monte_carlo(code, 4000, np.random.default_rng(0)), rule)
    exact = [any_order_average(rule, one) for one in code.tolist()]
    assert np.allclose(estimate, exact, atol=0.15)


def test_mc_masks_are_stratified():
    masks = draw_masks(8, 32, np.random.default_rng(0))
    assert np.bincount(masks.sum(1), minlength=9).tolist() == [0] + [4] * 8
    many = draw_masks(4, 8000, np.random.default_rng(0))
    assert np.allclose(many.mean(0), 2.5 / 4, atol=0.02)


def test_one_pass_equals_bound_when_levels_independent():
    table = random_table(np.random.default_rng(0))

    def independent(key, z):
        return hashed()(key, (-1,) * len(z))

    found, _ = search(table, independent, decoder="one_pass", k=5)
    log_probs = log_softmax(independent(0, (-1,) * 4))
    for hit in found.hits:
        code = table.codes[table.rows[hit.doc_id]]
        expectation = 0.0
        for count in range(1, 5):
            chosen = list(itertools.combinations(range(4), count))
            masks = np.array([[i in one for i in range(4)] for one in chosen])
            expectation += bound(np.repeat(log_probs[None], len(masks), 0), code, masks) / 4
        assert hit.score == pytest.approx(expectation, abs=1e-5)


def test_chain_is_the_left_to_right_likelihood():
    rule, codes = hashed(2.0, 4), np.array([[1, 3, 0, 2], [0, 0, 0, 0]])
    first = log_softmax(rule(0, (-1,) * 4))
    scores = answer(chain(codes, first), rule)
    for code, score in zip(codes.tolist(), scores, strict=True):
        steps = [
            log_softmax(rule(0, tuple(code[:level]) + (-1,) * (4 - level)))[level, code[level]] for level in range(4)
        ]
        assert score == pytest.approx(sum(steps))


def test_one_pass_is_brute_force():
    table = random_table(np.random.default_rng(5))
    found, _ = search(table, hashed(), decoder="one_pass", k=100)
    log_probs = log_softmax(hashed()(0, (-1,) * 4))
    scores = log_probs[np.arange(4), table.codes].sum(1)
    order = sorted(np.flatnonzero(table.live), key=lambda row: (-round(scores[row], 4), row))
    assert [hit.doc_id for hit in found.hits] == [f"d{row}" for row in order]
    assert (found.nfe, found.rows, found.raw_code, found.scored_by) == (1, 1, None, "one_pass")


@pytest.mark.parametrize("variant", DECODER_VARIANTS, ids=str)
@pytest.mark.parametrize("constraint", ["off", "project", "bitset"])
def test_hits_full_and_unique(variant, constraint):
    rng = np.random.default_rng(6)
    for table in (random_table(rng), random_table(rng, documents=9), corpus_table([[1, 2, 3, 4]] * 7, [5] * 4)):
        live = {table.doc_ids[row] for row in np.flatnonzero(table.live)}
        for k in (1, 10, 100):
            found, _ = search(table, hashed(), k=k, constraint=constraint, **variant)
            ids = [hit.doc_id for hit in found.hits]
            assert len(ids) == len(set(ids)) == min(k, len(live))
            assert set(ids) <= live
            scores = [hit.score for hit in found.hits]
            assert scores == sorted(scores, reverse=True) and np.isfinite(scores).all()


@pytest.mark.parametrize("variant", DECODER_VARIANTS, ids=str)
def test_documents_of_a_code_tie(variant):
    table = random_table(np.random.default_rng(7), documents=30)
    found, _ = search(table, hashed(), k=100, **variant)
    by_code = {}
    for hit in found.hits[: len(found.hits) - found.filled]:
        by_code.setdefault(tuple(table.codes[table.rows[hit.doc_id]]), set()).add(hit.score)
    assert all(len(scores) == 1 for scores in by_code.values())


def test_ties_pessimistic_on_documents():
    """A bucket of 75 documents shares one score, so a gold document among them ranks 75th at best."""
    table = corpus_table([[1, 1]] * 75 + [[0, 1]] * 5, [2, 2])
    favoured = np.array([[0.0, 5.0], [0.0, 5.0]])
    for decoder in ("one_pass", "match_rerank", "beam"):
        found, _ = search(table, lambda key, z: favoured, decoder=decoder, k=80)
        score = {hit.doc_id: hit.score for hit in found.hits}
        rank = 1 + sum(score[other] >= score["d40"] for other in score if other != "d40")
        assert rank == 75


def test_nfe_and_rows_of_every_decoder():
    table = corpus_table(list(itertools.product(range(3), repeat=4)), [3] * 4)
    common = {"constraint": "off", "steps": 3, "k": 10}
    expected = {
        ("one_pass", 10): (1, 1),
        ("match", 10): (3, 3),
        ("match_rerank", 10): (3, 3),
        ("best_of_n", 10): (3, 1 + 2 * 8),
        ("beam", 5): (4, 1 + 3 * 5),
        ("chain_rescore", 10): (2, 1 + 20 * 3),
    }
    for (decoder, beam), (nfe, rows) in expected.items():
        found, model = search(table, hashed(width=3), decoder=decoder, beam=beam, **common)
        assert (found.nfe, found.rows) == (nfe, rows)
        assert len(model.seen) >= nfe
    guided, _ = search(table, hashed(width=3), decoder="match", cfg=1.0, **common)
    assert (guided.nfe, guided.rows) == (3, 6)


def test_guidance_extrapolates_from_the_masked_query():
    table = corpus_table(list(itertools.product(range(3), repeat=3)), [3] * 3)
    rule = hashed(width=3)
    found, _ = search(table, rule, decoder="one_pass", cfg=1.5, k=1)
    conditional, free = rule(0, (-1,) * 3), rule(999, (-1,) * 3)
    guided = log_softmax(free + 2.5 * (conditional - free))
    assert found.hits[0].score == pytest.approx(guided.max(1).sum(), abs=1e-4)


def test_match_is_hamming_order():
    table = random_table(np.random.default_rng(8))
    found, _ = search(table, hashed(), decoder="match", k=100, constraint="off", steps=2)
    rows = np.flatnonzero(table.live)
    distance = (table.codes[rows] != found.raw_code).sum(1)
    expected = rows[np.argsort(distance, kind="stable")]
    assert [hit.doc_id for hit in found.hits] == [f"d{row}" for row in expected]


def test_match_rerank_pools_ties():
    """The pool of 1 grows by everything that is equally near; hits outside it are counted as filled."""
    table = corpus_table([[0, 0], [0, 1], [1, 0], [1, 1]], [2, 2])
    # The network wants (1, 2), which is not a code of 2 levels of 2: decode to (1, 1) with `off`.
    logits = np.array([[0.0, 3.0], [0.0, 3.0]])
    found, _ = search(table, lambda key, z: logits, decoder="match_rerank", pool=2, k=4, constraint="off")
    # Nearest is d3; both d1 and d2 tie for the second place, so both are in the pool and d0 is filled.
    assert [hit.doc_id for hit in found.hits] == ["d3", "d1", "d2", "d0"]
    assert found.filled == 1


def test_project_takes_nearest_then_likeliest():
    table = corpus_table([[0, 0, 2], [1, 1, 0], [2, 1, 1]], [3] * 3, doc_ids=["b", "a", "c"])
    rule = hashed(width=3)
    log_probs = log_softmax(rule(0, (-1,) * 3))
    found, _ = search(table, rule, decoder="match", steps=1, constraint="project", k=1)
    distance = (table.codes != found.raw_code).sum(1)
    score = log_probs[np.arange(3), table.codes].sum(1)
    best = min(range(3), key=lambda row: (distance[row], -score[row], table.doc_ids[row]))
    assert found.hits[0].doc_id == table.doc_ids[best]


def test_raw_rates_before_projection():
    """raw_valid and raw_exact speak of the generated code, also when projection makes the answer right."""
    table = corpus_table([[0, 0, 0], [1, 1, 0]], [2] * 3)
    logits = np.array([[0.0, 9.0]] * 3)
    found, _ = search(table, lambda key, z: logits, gold={"d1"}, decoder="match", constraint="project")
    assert found.hits[0].doc_id == "d1"
    assert (found.raw_code, found.raw_valid, found.raw_exact) == ((1, 1, 1), False, False)
    found, _ = search(table, lambda key, z: logits, gold={"d1"}, decoder="match", constraint="bitset")
    assert (found.raw_code, found.raw_valid, found.raw_exact) == ((1, 1, 0), True, True)
    found, _ = search(table, lambda key, z: logits, decoder="match", constraint="bitset")
    assert found.raw_exact is None


def test_deleted_documents_do_not_make_a_code_valid():
    table = corpus_table([[1, 1], [0, 0]], [2, 2], live=[False, True])
    logits = np.array([[0.0, 9.0]] * 2)
    found, _ = search(table, lambda key, z: logits, decoder="match_rerank", constraint="off")
    assert found.raw_code == (1, 1) and found.raw_valid is False
    assert [hit.doc_id for hit in found.hits] == ["d1"]


def test_empty_corpus_has_no_hits():
    table = corpus_table([[1, 1], [0, 0]], [2, 2], live=[False, False])
    for variant in DECODER_VARIANTS:
        assert search(table, hashed(width=2), **{**variant, "beam_per_step": 1})[0].hits == []


def test_best_of_n_runs_differ_and_unite():
    table = corpus_table(list(itertools.product(range(5), repeat=4)), [5] * 4)
    pools = set()
    for n in (1, 8):
        found, _ = search(table, hashed(1.0), decoder="best_of_n", n=n, pool=1, k=8, constraint="bitset", steps=4)
        pools.add(8 - found.filled)
    assert len(pools) == 2 and max(pools) > 4


def exhaustive_maximum(table, rule, key=0):
    """The largest sum of log-probabilities over all codes of the corpus and all orders, and its code."""
    best = (-np.inf, None)
    for code in sorted({tuple(code) for code in table.codes[table.live].tolist()}):
        for order in itertools.permutations(range(len(code))):
            z, total = [-1] * len(code), 0.0
            for level in order:
                total += log_softmax(rule(key, tuple(z)))[level, code[level]]
                z[level] = code[level]
            best = max(best, (total, code))
    return best


def test_beam_width_large_equals_exact():
    for seed in range(6):
        table = random_table(np.random.default_rng(seed), documents=12, levels=3, width=3)
        found, _ = search(table, hashed(2.0, 3), seed, decoder="beam", beam=256, k=1)
        score, code = exhaustive_maximum(table, hashed(2.0, 3), seed)
        assert found.raw_code == code
        assert found.hits[0].score == pytest.approx(score, abs=1e-4)


def test_beam_dedupes_orders():
    """Every code is reached by L! orders and stands in the beam once."""
    table = corpus_table(list(itertools.product(range(2), repeat=4)), [2] * 4)
    found, model = search(table, hashed(0.5, 2), decoder="beam", beam=64, k=16)
    assert found.filled == 0 and len({hit.doc_id for hit in found.hits}) == 16
    for z in model.seen:
        partial = z[: len(np.unique(z, axis=0))]
        assert len(np.unique(partial, axis=0)) == len(partial)


def test_beam_no_mixed_lengths():
    table = random_table(np.random.default_rng(0), documents=60, levels=6)
    for per_step in (1, 2, 3):
        found, model = search(table, hashed(), decoder="beam", beam=4, beam_per_step=per_step)
        filled = [set((z >= 0).sum(1).tolist()) for z in model.seen]
        assert filled == [{step} for step in range(0, 6, per_step) for _ in range(filled.count({step}))]
        assert found.nfe == found.steps_used == 6 // per_step


def test_beam_scores_of_the_final_order():
    table = random_table(np.random.default_rng(1), documents=20)
    log_probs = log_softmax(hashed()(0, (-1,) * 4))
    found, _ = search(table, hashed(), decoder="beam", beam=8, beam_score="one_pass", k=5)
    for hit in found.hits[: 5 - found.filled]:
        code = table.codes[table.rows[hit.doc_id]]
        assert hit.score == pytest.approx(log_probs[np.arange(4), code].sum(), abs=1e-4)
    assert found.scored_by == "beam_one_pass"
    mc, _ = search(table, hashed(), decoder="beam", beam=8, beam_score="mc", mc=6)
    assert mc.nfe == 5 and mc.scored_by == "beam_mc"


def test_beam_topc_limits_expansions():
    table = corpus_table(list(itertools.product(range(3), repeat=3)), [3] * 3)
    found, _ = search(table, hashed(width=3), decoder="beam", beam=9, beam_topc=1, k=27)
    assert found.filled == 26

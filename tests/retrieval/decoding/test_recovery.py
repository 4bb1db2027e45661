"""Forced early errors."""

import itertools

import numpy as np
import pytest
from planted import Planted, corpus_table, keys

from mobula.retrieval.decoding import ArDecoder, Decoder
from mobula.retrieval.decoding.recovery import recovery
from mobula.retrieval.search import BadSearch, SearchOptions

TABLE = corpus_table(list(itertools.product(range(3), repeat=4)), [3] * 4)
GOLD = [{"d40"}]  # (1, 1, 1, 1)


def knowing(key, z):
    """Sure of code 1 at every position, a little less at position 0."""
    logits = np.zeros((4, 3))
    logits[:, 1] = [2.0, 4.0, 4.0, 4.0]
    logits[:, 2] = 1.0
    return logits


def measure(paradigm="diffusion", **options):
    model = Planted(TABLE, knowing, paradigm)
    kind = Decoder if paradigm == "diffusion" else ArDecoder
    found = recovery(kind(model, TABLE), keys(0), SearchOptions(**options), GOLD)
    return bool(found.final[0]), bool(found.top[0])


def test_an_error_is_final_without_remasking():
    assert measure(decoder="match", steps=4) == (False, True)
    assert measure("autoregressive", decoder="greedy")[0] is False
    assert measure("autoregressive", decoder="beam", beam=50) == (False, False)


def test_remasking_repairs_the_error():
    for options in ({"remask": "low_conf"}, {"remask": "low_conf", "remask_conf": "leave_one_out"}):
        assert measure(decoder="match", steps=8, **options) == (True, True)
    repaired = [measure(decoder="match", steps=8, remask="remdm", remask_cap=0.1, seed=seed)[0] for seed in range(20)]
    assert any(repaired) and not all(repaired)


SPARSE = corpus_table(np.random.default_rng(0).integers(0, 4, (12, 6)), [4] * 6)


def knowing_one(key, z):
    """Sure of the codes of document ``key``, wherever nothing else is given away."""
    logits = np.zeros((6, 4))
    logits[np.arange(6), SPARSE.codes[key]] = [3.0, 3.5, 4.0, 4.5, 5.0, 5.5]
    return logits


@pytest.mark.parametrize("remask_conf", ["at_commit", "leave_one_out"])
def test_an_error_that_leaves_one_document_is_repaired_under_the_constraint(remask_conf: str) -> None:
    """The wrong code forces all others, which must not make them certain."""
    decoder, queries = Decoder(Planted(SPARSE, knowing_one), SPARSE), range(12)
    options = {"decoder": "match", "steps": 6}
    gold = [{f"d{i}"} for i in queries]
    plain = recovery(decoder, keys(*queries), SearchOptions(**options), gold)
    again = SearchOptions(**options, remask="low_conf", remask_conf=remask_conf)
    repaired = recovery(decoder, keys(*queries), again, gold)
    assert not plain.final.any()
    assert repaired.final.all()


def test_the_forced_code_is_wrong_and_valid():
    table = corpus_table([[0, 0], [1, 0], [1, 1]], [3, 3])
    logits = np.array([[0.0, 5.0, 9.0], [0.0, 5.0, 9.0]])
    decoder = Decoder(Planted(table, lambda key, z: logits), table)
    forbidden = [np.array([[False, True, False], [False, True, False]])]
    (found,) = decoder.search(keys(0), [SearchOptions(decoder="match", steps=2)], [{"d2"}], True, forbidden)
    # Code 2 is most probable but no document's, code 1 is right: what is left is 0.
    assert found.trace[0].commits[0][1] == 0 and found.raw_valid


def test_without_error_the_same_decoder_is_right():
    decoder = Decoder(Planted(TABLE, knowing), TABLE)
    (found,) = decoder.search(keys(0), [SearchOptions(decoder="match", steps=4)], GOLD)
    assert found.raw_exact


def test_recovery_needs_a_right_code_and_a_suitable_decoder():
    decoder = Decoder(Planted(TABLE, knowing), TABLE)
    with pytest.raises(BadSearch, match="none of the relevant"):
        recovery(decoder, keys(0), SearchOptions(decoder="match"), [{"unknown"}])
    with pytest.raises(BadSearch, match="one_pass"):
        recovery(decoder, keys(0), SearchOptions(decoder="one_pass"), GOLD)

"""Likelihoods, accuracy by level, ranks of docids and cost, against what can be counted by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from planted import Planted, corpus_table, hashed, keys, log_softmax
from torch.utils.flop_counter import FlopCounterMode

from mobula.retrieval.decoding import ArDecoder, Decoder
from mobula.retrieval.diagnostics import code_ranks, flops, levels, model_bytes
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.network import DocidTransformer, NetworkShape

TABLE = corpus_table(list(itertools.product(range(3), repeat=3)), [3] * 3)
GOLD = [{"d5"}, {"d20", "d7"}]  # (0, 1, 2) and, the first row of the two, (0, 2, 1)


def test_the_bound_of_a_model_without_context_is_its_likelihood() -> None:
    """Where levels do not depend on each other every mask gives the same, so the bound is tight."""
    tables = [log_softmax(hashed(width=3)(key, (-1, -1, -1))) for key in (0, 1)]
    model = Planted(TABLE, lambda key, z: tables[key])
    found = levels(Decoder(model, TABLE), keys(0, 1), GOLD, 0)
    for query, code in enumerate(((0, 1, 2), (0, 2, 1))):
        wanted = -tables[query][np.arange(3), code]
        assert found.nll[query] == pytest.approx(wanted, abs=1e-5)
        assert found.right[query].tolist() == (tables[query].argmax(1) == code).tolist()
        # 32 stratified draws are no exact average over masks.
        assert found.bound[query] == pytest.approx(wanted.sum(), rel=0.3)


def test_the_twin_is_scored_given_the_codes_before() -> None:
    rule = hashed(width=3)
    found = levels(ArDecoder(Planted(TABLE, rule, "autoregressive"), TABLE), keys(0), [{"d5"}], 0)
    prefixes = [(-1, -1, -1), (0, -1, -1), (0, 1, -1)]
    wanted = [-log_softmax(rule(0, prefix))[level, (0, 1, 2)[level]] for level, prefix in enumerate(prefixes)]
    assert found.nll[0] == pytest.approx(wanted, abs=1e-5)
    assert found.bound[0] == pytest.approx(sum(wanted), abs=1e-5)


def test_documents_of_one_docid_are_one_place_of_the_list() -> None:
    table = corpus_table([[0, 0], [0, 0], [1, 1], [1, 2]], [2, 3])
    hits = [["d0", "d1", "d3", "d2"]]
    assert code_ranks(hits, [{"d3"}], table).tolist() == [2]
    assert code_ranks(hits, [{"d1"}], table).tolist() == [1]
    assert code_ranks([["d0", "d1"]], [{"d2"}], table).tolist() == [np.inf]


def model() -> tuple[DocidTransformer, DocidTable]:
    shape = NetworkShape("diffusion", (3, 3, 3), 16, 2, 2, 0.0, "tokens", 5, 8)
    return DocidTransformer(shape, table=torch.zeros(7, 8)).eval(), TABLE


def test_operations_are_those_of_the_matrix_products() -> None:
    network, _ = model()
    by_hand = FlopCounterMode(display=False)
    with by_hand, torch.inference_mode():
        network({"ids": torch.ones(1, 5, dtype=torch.long)}, torch.full((1, 3), -1))
    found = flops(network, 1.0)
    assert found == pytest.approx(by_hand.get_total_flops(), rel=0.15)
    assert flops(network, 3.0) - flops(network, 2.0) == pytest.approx(flops(network, 2.0) - found)


def test_bytes_are_those_of_weights_and_of_what_is_kept_of_documents() -> None:
    network, table = model()
    found = model_bytes(Decoder(network, table))
    assert found["weights"] == sum(weight.numel() * 4 for weight in network.parameters())
    assert found["index"] == table.codes.nbytes + 3 * 3 * 8  # 27 documents are bits of one word

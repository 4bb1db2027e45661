"""Trap 15: a result does not depend on its batch companions, to the last bit (real network)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import corpus_table

from mobula.retrieval.decoding import ArDecoder, Decoder
from mobula.retrieval.network import DocidTransformer, NetworkShape
from mobula.retrieval.search import SearchOptions

LEVELS, CODES, QUERY = 6, 16, 10
TABLE = corpus_table(np.random.default_rng(0).integers(0, CODES, (500, LEVELS)), [CODES] * LEVELS)

DIFFUSION = [
    SearchOptions(steps=1),
    SearchOptions(steps=3, seed=5),
    SearchOptions(threshold=0.2),
    SearchOptions(steps=6, constraint="off", order="margin"),
    SearchOptions(decoder="match", steps=3, sampler="ancestral", seed=1),
    SearchOptions(decoder="match", steps=3, sampler="ancestral", seed=2),
    SearchOptions(steps=12, remask="remdm", seed=3, constraint="project"),
    SearchOptions(steps=6, remask="low_conf", remask_conf="leave_one_out"),
    SearchOptions(decoder="best_of_n", n=5, seed=4),
    SearchOptions(decoder="beam", beam=7),
    SearchOptions(decoder="beam", beam=33, beam_score="mc", mc=4),
    SearchOptions(decoder="chain_rescore"),
    SearchOptions(decoder="one_pass", k=100),
    SearchOptions(steps=2, cfg=1.0),
]
AUTOREGRESSIVE = [
    SearchOptions(decoder="greedy"),
    SearchOptions(decoder="beam", beam=10),
    SearchOptions(decoder="beam", beam=3),
    SearchOptions(decoder="exhaustive"),
    SearchOptions(decoder="greedy", k=3),
]


def network(paradigm):
    torch.manual_seed(0)
    shape = NetworkShape(paradigm, (CODES,) * LEVELS, 32, 2, 2, 0.0, "tokens", QUERY, 24)
    model = DocidTransformer(shape, table=torch.randn(50, 24)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)  # an untrained network is too even for its last bits to matter
    return model


def queries(count):
    ids = torch.from_numpy(np.random.default_rng(1).integers(1, 50, (count, QUERY)))
    ids[:, 7:] *= torch.arange(count)[:, None] % 2
    return {"ids": ids}


@pytest.mark.parametrize(
    ("decoder", "variants"),
    [(Decoder(network("diffusion"), TABLE), DIFFUSION), (ArDecoder(network("autoregressive"), TABLE), AUTOREGRESSIVE)],
    ids=["diffusion", "autoregressive"],
)
def test_batch_independence(decoder, variants):
    query = queries(len(variants) * 2)
    options = variants + [replace(one, seed=one.seed + 10) for one in reversed(variants)]
    together = decoder.search(query, options, trace=True)
    for i in range(len(options)):
        row = {name: values[i : i + 1] for name, values in query.items()}
        (alone,) = decoder.search(row, [options[i]], trace=True)
        assert alone == together[i], options[i]
    # In another company, at another place of the batch.
    order = np.random.default_rng(2).permutation(len(options))[:9]
    shuffled = decoder.search({"ids": query["ids"][order]}, [options[i] for i in order], trace=True)
    assert shuffled == [together[i] for i in order]


def test_seeds_of_a_batch_are_their_own():
    decoder = Decoder(network("diffusion"), TABLE)
    one = queries(1)["ids"].expand(8, -1)
    options = [SearchOptions(decoder="match", temperature=2.0, seed=seed) for seed in (0, 1, 2, 3, 0, 1, 2, 3)]
    codes = [found.raw_code for found in decoder.search({"ids": one}, options)]
    assert codes[:4] == codes[4:] and len(set(codes)) > 1


def test_cached_steps_equal_teacher_forcing():
    """The trie beam's cached log-likelihood is that of the exhaustive, teacher-forced pass."""
    decoder = ArDecoder(network("autoregressive"), TABLE)
    query = queries(2)
    beam = decoder.search(query, [SearchOptions(decoder="beam", beam=256, k=5)] * 2)
    exhaustive = decoder.search(query, [SearchOptions(decoder="exhaustive", k=500)] * 2)
    for a, b in zip(beam, exhaustive, strict=True):
        scores = {hit.doc_id: hit.score for hit in b.hits}
        assert all(hit.score == pytest.approx(scores[hit.doc_id], abs=1e-4) for hit in a.hits)


def test_concurrent_searches_agree():
    """One decoder serves several threads: it keeps no state of a request."""
    from concurrent.futures import ThreadPoolExecutor

    decoder = Decoder(network("diffusion"), TABLE)
    query = queries(len(DIFFUSION))
    expected = decoder.search(query, DIFFUSION)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: decoder.search(query, DIFFUSION), range(4))) == [expected] * 4

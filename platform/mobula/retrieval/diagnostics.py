"""What there is to know of a docid model besides its rankings (spec, section 8): likelihoods, levels, cost, size.

Q queries, L levels, K codes a level; likelihoods in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mobula.retrieval.decoding import ArDecoder, Decoder
from mobula.retrieval.decoding.batched_calls import Call, Network, device_of
from mobula.retrieval.decoding.scores import monte_carlo
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.network import MASK, DocidModel, DocidTransformer

DRAWS = 32  # of the bound, per query
BATCH = 64


@dataclass(frozen=True)
class Levels:
    """A model on gold docids: ``bound`` f64[Q] bounds -log p(c|q) from above (NELBO; of an AR model it is the value).

    ``nll`` f64[Q, L] is -log p(c_l) and ``right`` bool[Q, L] whether c_l is the likeliest code, with everything masked,
    or for an AR model given the codes before it.
    """

    bound: np.ndarray
    nll: np.ndarray
    right: np.ndarray


def levels(decoder: Decoder | ArDecoder, query: dict[str, Tensor], gold: Sequence[set[str]], seed: int) -> Levels:
    """Likelihood and accuracy of the first gold docid, in the order of the ids, of every query."""
    table, model = decoder.corpus.table, decoder.model
    codes = table.codes[[min(table.rows[doc_id] for doc_id in one) for one in gold]].astype(np.int64)
    visible = codes if model.causal else np.full_like(codes, MASK)
    log_probs = _log_probs(model, query, visible)
    nll = -np.take_along_axis(log_probs, codes[..., None], -1)[..., 0]
    right = log_probs.argmax(-1) == codes
    return Levels(nll.sum(1) if model.causal else -_bounds(model, query, codes, seed), nll, right)


def _log_probs(model: DocidModel, query: dict[str, Tensor], z: np.ndarray) -> np.ndarray:
    """Log-probabilities f64[Q, L, K]."""
    device, parts = device_of(model), []
    with torch.inference_mode():
        for start in range(0, len(z), BATCH):
            part = slice(start, start + BATCH)
            of_part = {name: values[part].to(device) for name, values in query.items()}
            logits = model(of_part, torch.from_numpy(z[part]).to(device)).double()
            parts.append(torch.log_softmax(logits, -1).cpu().numpy())
    return np.concatenate(parts)


def _bounds(model: DocidModel, query: dict[str, Tensor], codes: np.ndarray, seed: int) -> np.ndarray:
    """Monte-Carlo bounds f64[Q] of log p(c|q)."""
    network = Network.encode(model, query)
    calls = [Call(i, monte_carlo(code[None], DRAWS, np.random.default_rng([seed, i]))) for i, code in enumerate(codes)]
    for start in range(0, len(calls), BATCH):
        part = calls[start : start + BATCH]
        for call in part:
            call.advance(None)
        network.round(part)
    return np.array([call.result[0] for call in calls])


def code_ranks(hits: Sequence[Sequence[str]], gold: Sequence[set[str]], table: DocidTable) -> np.ndarray:
    """The rank f64[Q] of the first gold docid among the distinct docids of ranked documents; infinite without one.

    Documents that share a docid are one place of the list here, where document-level measures count them all.
    """
    ranks = np.full(len(hits), np.inf)
    for i, (ids, relevant) in enumerate(zip(hits, gold, strict=True)):
        wanted = {table.codes[table.rows[doc_id]].tobytes() for doc_id in relevant if doc_id in table.rows}
        codes = dict.fromkeys(table.codes[table.rows[doc_id]].tobytes() for doc_id in ids)
        ranks[i] = next((rank for rank, code in enumerate(codes, 1) if code in wanted), np.inf)
    return ranks


def flops(model: DocidModel, rows: float) -> float | None:
    """Floating-point operations of a query with ``rows`` docid rows: 2 a weight and position, and attention.

    The frozen encoder that reads the query, embeddings and softmax are not counted. None for a pretrained network.
    """
    if not isinstance(model, DocidTransformer):
        return None
    shape, layers = model.shape, sum(p.numel() for p in model.layers.parameters())
    attention = 4 * shape.layers * shape.width
    docid = 2 * layers * model.levels + attention * model.levels * (shape.query_len + model.levels)
    output = 2 * model.levels * model.width * (shape.codeword_dim + shape.width)
    query = shape.query_len * (2 * layers + attention * shape.query_len + 2 * shape.input_dim * shape.width)
    return query + rows * (docid + output)


def model_bytes(decoder: Decoder | ArDecoder) -> dict[str, int]:
    """Bytes of a model's weights, and of its index: the codes of documents and what decoding looks them up in."""
    corpus = decoder.corpus
    lookup = corpus.trie.nbytes if isinstance(decoder, ArDecoder) else corpus.bitset.bits.nbytes
    # A frozen table of embeddings is a buffer of the network, and none of what was learned.
    weights = sum(p.numel() * p.element_size() for p in decoder.model.parameters())
    return {"weights": weights, "index": corpus.table.codes.nbytes + lookup}

"""Docids that carry no meaning: unique random rows, and one atomic code per document."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container, Sequence

import numpy as np

from mobula.data.records import Document
from mobula.errors import ConfigError
from mobula.retrieval.search import Unsupported


def random_sizes(levels: int, codes: int, documents: int) -> np.ndarray:
    """Sizes i32[L] of a random space.

    Raises:
        ConfigError: if it has fewer than two codes per document, where drawing unique ones would stall.
    """
    if levels * math.log(codes) < math.log(2 * documents):
        raise ConfigError(
            [f"{codes}^{levels} random codes are too few for {documents} documents; raise levels or codes"], "docid"
        )
    return np.full(levels, codes, np.int32)


def encode_random(sizes: np.ndarray, seed: int, documents: Sequence[Document], taken: Container[bytes]) -> np.ndarray:
    """Unique rows i32[N, L], uniform over the codes, drawn from (seed, document id) in the order of ids.

    The same documents get the same rows again; ``taken`` holds the bytes of rows already in use.
    """
    drawn: set[bytes] = set()
    codes = np.empty((len(documents), len(sizes)), np.int32)
    for position in sorted(range(len(documents)), key=lambda i: documents[i].id):
        row, attempt = _draw(sizes, f"{seed}/0/{documents[position].id}"), 0
        while row.tobytes() in drawn or row.tobytes() in taken:
            attempt += 1
            row = _draw(sizes, f"{seed}/{attempt}/{documents[position].id}")
        drawn.add(row.tobytes())
        codes[position] = row
    return codes


def encode_atomic(ids: Sequence[str], documents: Sequence[Document]) -> np.ndarray:
    """Codes i32[N, 1]: the position of each document in the corpus of the fit.

    Raises:
        Unsupported: for a document that was not in it.
    """
    position = {doc_id: i for i, doc_id in enumerate(ids)}
    unknown = [d.id for d in documents if d.id not in position]
    if unknown:
        raise Unsupported(
            f"document {unknown[0]!r} ({len(unknown)} such): atomic docids cannot be added without training; "
            "use another docid.family"
        )
    return np.array([[position[d.id]] for d in documents], np.int32).reshape(-1, 1)


def _draw(sizes: np.ndarray, text: str) -> np.ndarray:
    state = int.from_bytes(hashlib.sha256(text.encode()).digest(), "little")
    return np.random.default_rng(state).integers(0, sizes).astype(np.int32)

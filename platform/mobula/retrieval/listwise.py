"""The docids that a docid model learns to tell apart, beside the codes of the right one (:mod:`.paradigms`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RankedDocids:
    """The distinct docids i64[C, L] of all documents, sorted, and which of them are right for a query.

    ``of_document`` i64[N] is the index of a document's docid; ``right`` has those of every query, by its row.
    """

    docids: Tensor
    of_document: Tensor
    right: Mapping[int, np.ndarray]

    @classmethod
    def of(cls, codes: Tensor, examples: np.ndarray) -> RankedDocids:
        """From all codes i64[N, L] and the examples i64[M, 2]."""
        docids, of_document = torch.unique(codes, dim=0, return_inverse=True)
        pairs = np.unique(np.column_stack([examples[:, 0], of_document.numpy()[examples[:, 1]]]), axis=0)
        queries, starts = np.unique(pairs[:, 0], return_index=True)
        right = np.split(pairs[:, 1], starts[1:])
        return cls(docids, of_document, dict(zip(queries.tolist(), right, strict=True)))

    def all(self, pairs: np.ndarray, most: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``docids`` i64[C', L] for all examples ``pairs`` i64[B, 2]: every one, or theirs and some that are drawn."""
        own = self.of_document[torch.from_numpy(pairs[:, 1])]
        kept = torch.arange(len(self.docids))
        if len(kept) > most:
            drawn = torch.randperm(len(kept), generator=generator)[:most]
            kept = torch.unique(torch.cat([own, drawn]))
        index = torch.full((len(self.docids),), -1)
        index[kept] = torch.arange(len(kept))
        others = torch.zeros(len(own), len(kept), dtype=torch.bool)
        for row, (query, right) in enumerate(zip(pairs[:, 0].tolist(), own.tolist(), strict=True)):
            also = index[torch.from_numpy(self.right[query][self.right[query] != right])]
            others[row, also[also >= 0]] = True
        return {"docids": self.docids[kept], "target": index[own], "others": others}

    def drawn(self, pairs: np.ndarray, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``docids`` i64[B, 1 + count, L] for each example: its own, and others that are drawn for it.

        Half of these share its first code, as far as there are any: what a beam has to tell apart.
        """
        own = self.of_document[torch.from_numpy(pairs[:, 1])]
        drawn = torch.randint(len(self.docids), (len(own), count), generator=generator)
        # Docids are sorted, so those of one first code are neighbours.
        first = self.docids[:, 0].contiguous()
        low, high = (torch.searchsorted(first, first[own], right=side) for side in (False, True))
        close = torch.rand(len(own), count // 2, generator=generator) * (high - low)[:, None]
        drawn[:, : count // 2] = low[:, None] + close.long()
        ranked = torch.cat([own[:, None], drawn], 1)
        others = [
            np.isin(row, self.right[query]) for row, query in zip(ranked.numpy(), pairs[:, 0].tolist(), strict=True)
        ]
        right = torch.from_numpy(np.stack(others))
        right[:, 0] = False
        return {"docids": self.docids[ranked], "target": torch.zeros(len(own), dtype=torch.long), "others": right}

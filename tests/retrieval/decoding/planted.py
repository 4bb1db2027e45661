"""Planted networks and small corpora whose right answers can be enumerated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mobula.retrieval.docids.space import DocidSpace
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.network import Memory

Rule = Callable[[int, tuple[int, ...]], np.ndarray]


def corpus_table(codes, sizes=None, family="random", live=None, doc_ids=None) -> DocidTable:
    """A table with the given codes; documents are d0, d1, ..."""
    codes = np.asarray(codes, np.int32)
    sizes = np.asarray(codes.max(0) + 1 if sizes is None else sizes, np.int32)
    space = DocidSpace(family, sizes, {}, {"seed": 0})
    doc_ids = doc_ids or [f"d{i}" for i in range(len(codes))]
    live = np.ones(len(codes), bool) if live is None else np.asarray(live, bool)
    return DocidTable(space, codes, doc_ids, live, sizes)


def random_table(rng, documents=40, levels=4, width=5, collisions=True, deletions=True) -> DocidTable:
    """Random codes with some buckets and some deleted documents."""
    codes = rng.integers(0, width, (documents, levels))
    if collisions:
        codes[documents // 2 : documents // 2 + 5] = codes[:5]
    live = rng.random(documents) > 0.2 if deletions else None
    return corpus_table(codes, [width] * levels, live=live)


def hashed(scale: float = 3.0, width: int = 5) -> Rule:
    """Logits that are another random table for every query and every partial code."""

    def rule(key: int, z: tuple[int, ...]) -> np.ndarray:
        seed = [key + 1, *(code + 1 for code in z)]
        return np.random.default_rng(seed).normal(size=(len(z), width)) * scale

    return rule


class Planted(nn.Module):
    """A network that follows a rule (query key, partial code) -> logits [L, K]; it records its calls."""

    def __init__(self, table: DocidTable, rule: Rule, paradigm: str = "diffusion") -> None:
        super().__init__()
        self.rule, self.paradigm, self.causal = rule, paradigm, paradigm == "autoregressive"
        self.levels, self.width = table.levels, table.width
        self.register_buffer("sizes", torch.tensor(table.sizes.tolist()))
        self.seen: list[np.ndarray] = []
        self.eval()

    def memory(self, query: dict[str, Tensor]) -> Memory:
        keys = query["key"].float()[:, None]
        return Memory(torch.ones_like(keys, dtype=torch.bool), keys)

    def unconditional(self, memory: Memory) -> Memory:
        return Memory(memory.mask, torch.full_like(memory.pooled, 999.0))

    def forward(self, query: dict[str, Tensor], z: Tensor) -> Tensor:
        return self.logits(self.memory(query), z)

    def logits(self, memory: Memory, z: Tensor) -> Tensor:
        if z.dim() == 3:
            return torch.stack([self.logits(memory.rows(torch.zeros(g.shape[0], dtype=torch.long)), g) for g in z])
        self.seen.append(z.numpy().copy())
        keys = memory.pooled[:, 0].long().tolist()
        return torch.stack([self._row(key, tuple(row)) for key, row in zip(keys, z.tolist(), strict=True)])

    def _row(self, key: int, z: tuple[int, ...]) -> Tensor:
        if self.paradigm == "diffusion":
            table = self.rule(key, z)
        else:
            prefixes = [z[:level] + (-1,) * (self.levels - level) for level in range(self.levels)]
            table = np.stack([self.rule(key, prefix)[level] for level, prefix in enumerate(prefixes)])
        logits = torch.tensor(table, dtype=torch.float32)
        impossible = torch.arange(self.width) >= self.sizes[:, None]
        return logits.masked_fill(impossible, float("-inf"))

    def start(self, memory: Memory, width: int = 1) -> PlantedCache:
        return PlantedCache(torch.full((memory.size, width, 0), -1))

    def step(self, memory, cache, previous):
        self.seen.append(cache.prefix.numpy().copy())
        prefix = cache.prefix if previous is None else torch.cat([cache.prefix, previous[..., None]], -1)
        level = prefix.shape[-1]
        keys = memory.pooled[:, 0].long().tolist()
        rows = []
        for key, group in zip(keys, prefix.tolist(), strict=True):
            full = [tuple(one) + (-1,) * (self.levels - level) for one in group]
            rows.append(torch.stack([self._row(key, z)[level] for z in full]))
        return torch.stack(rows), PlantedCache(prefix)


@dataclass
class PlantedCache:
    prefix: Tensor

    def reorder(self, parents: Tensor) -> PlantedCache:
        batch = torch.arange(len(parents)).unsqueeze(1)
        return PlantedCache(self.prefix[batch, parents])


def keys(*values: int) -> dict[str, Tensor]:
    """Queries for a planted network."""
    return {"key": torch.tensor(values)}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The reference, in float64."""
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )

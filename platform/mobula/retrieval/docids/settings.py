"""The keys that decide what a family of docids is fitted with."""

from __future__ import annotations

from dataclasses import dataclass

from mobula.config import key, section

ASSIGNMENTS = ("balanced", "normalised", "plain")


@dataclass
class RqConfig:
    """How the codebooks of ``rq`` are fitted."""

    assign: str = key("balanced", "fit of a codebook; every final code is the nearest entry", choices=ASSIGNMENTS)
    rounds: int = key(10, "rounds of balanced assignment after k-means", ge=1, le=1000)
    temperature: float = key(0.05, "Sinkhorn temperature, in mean squared distances", gt=0, le=10)


@dataclass
class HkConfig:
    """The k-means tree of ``hkmeans``."""

    branch: int = key(10, "children of a node", ge=2, le=4096)
    leaf: int = key(100, "documents above which a node is split", ge=1, le=100_000)


@dataclass
class CodeConfig:
    """A code of ``levels`` positions."""

    levels: int = key(8, "code length L (atomic: always 1)", ge=1, le=256)
    codes: int = key(32, "codebook size K per level (rq, pq, opq, random)", ge=2, le=65_536)
    fit_on: str = key("documents", "what codebooks are fitted on", choices=("documents", "windows"))
    min_entropy: float = key(0.6, "least entropy of a level, as a share of log2 K", ge=0, le=1)
    iterations: int = key(25, "k-means iterations", ge=1, le=10_000)
    rq: RqConfig = section(RqConfig)
    hk: HkConfig = section(HkConfig)

"""The ``docid`` section of an experiment."""

from __future__ import annotations

from dataclasses import dataclass

from mobula.config import key, section

QUANTISED = ("rq", "pq", "opq")
EMBEDDED = (*QUANTISED, "hkmeans")
TEXT = ("text.title", "text.lead", "text.keywords")
CONTROLS = ("random", "atomic")
FAMILIES = (*EMBEDDED, *TEXT, *CONTROLS)
COLLISIONS = ("bucket", "append")
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
class DocidConfig:
    """What identifies a document: a code of ``levels`` positions."""

    family: str = key("rq", "how a document gets its code", choices=FAMILIES)
    levels: int = key(8, "code length L (atomic: always 1)", ge=1, le=256)
    codes: int = key(32, "codebook size K per level (rq, pq, opq, random)", ge=2, le=65_536)
    collision: str = key("bucket", "documents of equal code: share it, or append a level", choices=COLLISIONS)
    fit_on: str = key("documents", "what codebooks are fitted on", choices=("documents", "windows"))
    encoder: str = key("wordllama", "document encoder, by name or path (rq, pq, opq, hkmeans)")
    min_entropy: float = key(0.6, "least entropy of a level, as a share of log2 K", ge=0, le=1)
    iterations: int = key(25, "k-means iterations", ge=1, le=10_000)
    rq: RqConfig = section(RqConfig)
    hk: HkConfig = section(HkConfig)

    def problems(self) -> list[str]:
        """Contradictions between keys of this section."""
        found = []
        if self.family == "hkmeans" and self.levels < 3:
            found.append(f"levels={self.levels}: hkmeans needs 3 (a branch, a leaf index, the end token)")
        if self.fit_on == "windows" and self.family not in EMBEDDED:
            found.append(f"fit_on=windows has no meaning for family={self.family}; use documents")
        return found


def code_length(config: DocidConfig, family: str) -> int:
    """Positions of a code of ``family``, before any corpus is looked at."""
    appended = config.collision == "append" and family not in CONTROLS
    return (1 if family == "atomic" else config.levels) + appended

"""The ``docid`` section of an experiment."""

from __future__ import annotations

from dataclasses import dataclass

from mobula.config import key
from mobula.retrieval.docids.families import FAMILIES
from mobula.retrieval.docids.settings import CodeConfig

COLLISIONS = ("bucket", "append")


@dataclass
class DocidConfig(CodeConfig):
    """What identifies a document: a code of ``levels`` positions, made by a family."""

    family: str = key("rq", "how a document gets its code", choices=tuple(FAMILIES))
    collision: str = key("bucket", "documents of equal code: share it, or append a level", choices=COLLISIONS)
    encoder: str = key("wordllama", "document encoder, by name or path (rq, pq, opq, hkmeans)")

    def problems(self) -> list[str]:
        """Contradictions between keys of this section."""
        family, problems = FAMILIES[self.family], []
        if self.levels < family.fewest_levels:
            problems.append(f"levels={self.levels}: {family.name} needs {family.fewest_levels} ({family.why_fewest})")
        if self.fit_on == "windows" and not family.is_numeric:
            problems.append(f"fit_on=windows has no meaning for family={self.family}; use documents")
        return problems


def code_length(config: DocidConfig, family: str) -> int:
    """Positions of a code of ``family``, before any corpus is looked at."""
    kind = FAMILIES[family]
    return kind.length(config.levels) + (kind.collision(config.collision) == "append")

"""An arm of the comparison: which docid family, learned by which paradigm."""

from __future__ import annotations

from dataclasses import dataclass

from mobula.config import nearest
from mobula.retrieval.docids.families import FAMILIES, Family
from mobula.retrieval.paradigms import PARADIGMS, Paradigm


@dataclass(frozen=True)
class Arm:
    """``paradigm/family``, as written in ``arms:`` of an experiment."""

    paradigm: str
    family: str

    def __str__(self) -> str:
        return f"{self.paradigm}/{self.family}"

    @property
    def learner(self) -> Paradigm:
        """How its network is trained and decoded."""
        return PARADIGMS[self.paradigm]

    @property
    def docids(self) -> Family:
        """How its documents get their codes."""
        return FAMILIES[self.family]

    @property
    def directory(self) -> str:
        """A name that is safe as a folder."""
        return f"{self.paradigm}-{self.family}"


def parse(text: str) -> Arm:
    """Read ``paradigm/family``.

    Raises:
        ValueError: naming what is unknown.
    """
    paradigm, _, family = text.partition("/")
    for value, valid in ((paradigm, tuple(PARADIGMS)), (family, tuple(FAMILIES))):
        if value not in valid:
            raise ValueError(f"arm {text!r}: unknown {value!r}{nearest(value, valid)}; write paradigm/family")
    return Arm(paradigm, family)

"""What travels to other processes leaves behind what it has opened."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import cached_property

from mobula.portable import Portable


@dataclass(frozen=True)
class Opened(Portable):
    path: str

    @cached_property
    def model(self) -> list[str]:
        return [self.path]


def test_cached_properties_stay_behind_and_are_opened_again() -> None:
    opened = Opened("here")
    before = opened.model
    copy = pickle.loads(pickle.dumps(opened))
    assert "model" in vars(opened) and "model" not in vars(copy)
    assert copy == opened and copy.model == before and copy.model is not before

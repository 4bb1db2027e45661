"""Ordered lists of passages as language models write them: "[2] > [5] > [1]", numbers from 1."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"\[\s*(\d+)\s*\]", re.ASCII)


def parse_permutation(text: str, n: int) -> list[int]:
    """The passages that a text names, from 1 to n, each once and in its order.

    Only digits within brackets count. What is out of range or named again is left out; the list may be empty.
    """
    # Longer runs of digits name no passage, and Python refuses to read very long ones.
    numbers = (int(found) for found in _NUMBER.findall(text) if len(found) <= len(str(n)))
    return list(dict.fromkeys(number for number in numbers if 1 <= number <= n))


def repaired(order: Sequence[int], n: int, k: int) -> list[int]:
    """The first k of an order, filled up to min(k, n) with the passages it does not name, as they were shown."""
    chosen = list(order[:k])
    unused = [number for number in range(1, n + 1) if number not in set(order)]
    return chosen + unused[: min(k, n) - len(chosen)]


def written(order: Sequence[int]) -> str:
    """An order as text."""
    return " > ".join(f"[{number}]" for number in order)

"""Every number of a results table in docs/ comes from a stored JSON.

A table of results follows a comment ``<!-- results: moat_reduced.json -->`` that names its files in docs/results. A
value with an interval must be one measure, difference or claim of these files, all three numbers together; a number
alone must be one of theirs. Where the row's name is known to a file, its numbers must be found under that name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"
# Numbers of others, or seen once, stand below <!-- not stored: why -->.
MARK = re.compile(r"<!-- results: (?P<files>[\w., -]+) -->")
OTHERS = re.compile(r"<!-- not stored: .+ -->")
NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
INTERVAL = re.compile(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]")
BARE = re.compile(rf"\[({NUMBER}), ({NUMBER})\]")
ALONE = re.compile(rf"(?<![\w.\[@=-]){NUMBER}(?![\w\]=])")
RESULT = re.compile(rf"(?:{NUMBER}|[\[\], %])*\d\.\d(?:{NUMBER}|[\[\], %])*")
LABEL = re.compile(r"`([^`]+)`")
NAMES = ("name", "arm", "system")
Triple = tuple[float, float, float]


@dataclass
class Facts:
    """The numbers of some results: single ones, and (value, low, high) together."""

    numbers: list[float] = field(default_factory=list)
    triples: list[Triple] = field(default_factory=list)

    def has(self, shown: str) -> bool:
        return any(same(shown, number) for number in self.numbers)

    def has_interval(self, shown: tuple[str, str, str]) -> bool:
        return any(all(map(same, shown, triple)) or all(map(same, shown, _minus(triple))) for triple in self.triples)


def _minus(triple: Triple) -> Triple:
    value, low, high = triple
    return -value, -high, -low


def same(shown: str, number: float) -> bool:
    """Whether a number, or its per cent or points, is shown so at the digits that are shown."""
    text = shown.replace(",", "")
    digits = text.partition("e")[0]
    half = 0.5000001 * 10.0 ** -len(digits.partition(".")[2]) * float(f"1e{text.partition('e')[2] or 0}")
    return any(abs(float(text) - scale * number) <= half for scale in (1, 100))


@lru_cache
def facts(name: str) -> dict[str, Facts]:
    """The numbers of a file by the names that lead to them; "" has all."""
    found: dict[str, Facts] = {"": Facts()}
    _collect(json.loads((DOCS / "results" / name).read_text()), [], found)
    return found


def _collect(value: Any, names: list[str], found: dict[str, Facts]) -> None:
    own = [value[name] for name in NAMES if isinstance(value.get(name), str)] if isinstance(value, dict) else []
    scopes = [found.setdefault(name, Facts()) for name in {"", *names, *own}]
    if isinstance(value, dict):
        low, high = value.get("low"), value.get("high")
        middle = value.get("value", value.get("effect", value.get("ratio", value.get("median"))))
        if None not in (middle, low, high):
            for scope in scopes:
                scope.triples.append((middle, low, high))
        for name, item in value.items():
            _collect(item, [*names, *own, name], found)
    elif isinstance(value, list):
        head = [str(value[0])] if value and isinstance(value[0], str) else []
        for item in value:
            _collect(item, [*names, *head], found)
    elif isinstance(value, str):
        for scope in scopes:
            scope.triples.extend(tuple(float(g.replace(",", "")) for g in m) for m in INTERVAL.findall(value))  # type: ignore[misc]
            # Numbers in prose are no results.
            if not re.search("[a-zA-Z]", re.sub(NUMBER, "", value)):
                scope.numbers.extend(float(m.replace(",", "")) for m in re.findall(NUMBER, value))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        for scope in scopes:
            scope.numbers.append(float(value))


def tables() -> Iterator[tuple[Path, int, list[str], list[str]]]:
    """(page, line, files or none, rows) of every table."""
    for page in sorted(DOCS.glob("*.md")):
        lines = page.read_text().splitlines()
        start = 0
        while start < len(lines):
            if not lines[start].startswith("|"):
                start += 1
                continue
            end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
            above = next((line for line in reversed(lines[:start]) if line.strip()), "")
            mark = MARK.fullmatch(above.strip())
            if "<!--" in above:
                assert mark or OTHERS.fullmatch(above.strip()), f"{page.name}:{start}: {above}"
            if not OTHERS.fullmatch(above.strip()):
                yield page, start + 1, mark["files"].replace(",", " ").split() if mark else [], lines[start:end]
            start = end


TABLES = [pytest.param(*entry, id=f"{entry[0].name}:{entry[1]}") for entry in tables()]


@pytest.mark.parametrize(("page", "line", "files", "rows"), TABLES)
def test_every_number_of_a_results_table_is_stored(page: Path, line: int, files: list[str], rows: list[str]) -> None:
    if not files:
        results = [cell for row in rows[2:] for cell in _cells(row)[1:] if RESULT.fullmatch(cell)]
        assert not results, f"{page.name}:{line} has results ({results[0]}) and names no file"
        return
    targets = [i for i, head in enumerate(_cells(rows[0])) if head == "target"]  # wanted, not measured
    kept = ["|".join(c for i, c in enumerate(_cells(row)) if i not in targets) for row in rows[2:]]
    wrong = [problem for row in kept for problem in problems(row, files)]
    assert not wrong, f"{page.name}:{line} ({', '.join(files)})\n" + "\n".join(wrong)


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().removeprefix("|").removesuffix("|"))]


def problems(row: str, files: list[str]) -> Iterator[str]:
    first, *cells = _cells(row)
    every = [facts(name) for name in files]
    names = [name for name in (*LABEL.findall(first), first) if not re.fullmatch(NUMBER, name)]
    scopes = [found[known] for found in every for known in found for name in names if known and name in known]
    scopes = scopes or [found[""] for found in every]
    # An effect and its interval may stand in two columns.
    joined = re.sub(rf"({NUMBER}) \| (\[{NUMBER}, {NUMBER}\])", r"\1 \2", " | ".join(cells))
    for cell in joined.split(" | "):
        for low, high in BARE.findall(INTERVAL.sub("", cell)):
            if not any(scope.has(low) and scope.has(high) for scope in scopes):
                yield f"{first}: [{low}, {high}] is nowhere"
        for shown in INTERVAL.findall(cell):
            if not any(scope.has_interval(shown) for scope in scopes):
                yield f"{first}: {shown[0]} [{shown[1]}, {shown[2]}] is nowhere"
        if cell[:1].isalpha():
            continue  # a description
        for number in ALONE.findall(LABEL.sub("", INTERVAL.sub("", cell))):
            if not any(scope.has(number) for scope in scopes):
                yield f"{first}: {number} is nowhere"


def test_a_wrong_number_is_found() -> None:
    name = "dro_reduced.json"
    measure = json.loads((DOCS / "results" / name).read_text())["measures"]["dro/exact"]
    value, low, high = (100 * measure[part] for part in ("value", "low", "high"))
    assert not list(problems(f"| `dro` | {value:.1f} [{low:.1f}, {high:.1f}] |", [name]))
    assert list(problems(f"| `dro` | {value + 0.1:.1f} [{low:.1f}, {high:.1f}] |", [name]))
    assert list(problems(f"| `uniform` | {value:.1f} [{low:.1f}, {high:.1f}] |", [name]))
    assert list(problems("| `dro` | 12.3456 |", [name]))

"""Whether two runs of one recipe have the same results: what a refactoring must show.

    python -m benchmarks.same_results runs/before runs/after

Compared are every training's losses and dev metrics, every alternation's metrics by iteration, and the measures of the
report by their names and up to rounding; their intervals and claims are not. Of rows numbers are compared, not names:
keys may be renamed, folders moved and columns added, and two metrics that change places are not noticed. Times are left
out. Exits with 1 where anything differs, or where there is nothing to compare.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMES = ("seconds", "examples_per_s", "time", "ms", "wall_s")
ROUNDING = 1e-12  # the same values, added up in another order
SHOWN = 10  # measures that differ, by name
Numbers = tuple[tuple[float, ...], ...]


def numbers(value: Any) -> list[float]:
    """Every number in a JSON value except times, those of a mapping in rising order."""
    if isinstance(value, dict):
        return sorted(n for name, item in value.items() if name not in TIMES for n in numbers(item))
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def rows(run: Path, file: str) -> Iterator[tuple[Numbers, str]]:
    """(numbers of each row, path) of the files of a name below a run; the run's own log is no training."""
    for path in sorted(run.rglob(file)):
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if found and path.parent != run:
            yield tuple(tuple(numbers(row)) for row in found), str(path.parent.relative_to(run))


def _extends(new: Numbers, old: Numbers) -> bool:
    """Whether every row of the one has all numbers of the other's, and perhaps more."""
    return len(new) == len(old) and all(
        not Counter(before) - Counter(after) for before, after in zip(old, new, strict=True)
    )


def same(title: str, before: list[tuple[Numbers, str]], after: list[tuple[Numbers, str]]) -> bool:
    """Print how many agree, and the paths of those that do not."""
    left, right = defaultdict(list), defaultdict(list)
    for paths, entries in ((left, before), (right, after)):
        for found, path in entries:
            paths[found].append(path)
    for old in list(left):  # a row that has gained a column still has the same results
        if not right[old] and (new := next((new for new in right if right[new] and _extends(new, old)), None)):
            right[old] = right.pop(new)
    equal = sum(min(len(left[found]), len(right[found])) for found in list(left))
    print(f"{title}: {len(before)} before, {len(after)} after, {equal} identical")
    for name, mine, others in (("before", left, right), ("after", right, left)):
        alone = [path for found, paths in mine.items() if not others.get(found) for path in paths]
        if alone:
            print(f"   only {name}: {', '.join(alone)}")
    return equal == len(before) == len(after)


def main(before: Path, after: Path) -> int:
    """Compare two run directories; the exit status."""
    agree = [
        same(title, list(rows(before, file)), list(rows(after, file)))
        for title, file in (("trainings", "metrics.jsonl"), ("alternations", "iterations.jsonl"))
    ]
    one, two = (json.loads((run / "report.json").read_text(encoding="utf-8"))["measures"] for run in (before, after))
    shared = sorted(one.keys() & two.keys())
    differ = [name for name in shared if not math.isclose(one[name]["value"], two[name]["value"], abs_tol=ROUNDING)]
    print(
        f"measures: {len(one)} before, {len(two)} after, {len(shared) - len(differ)} of {len(shared)} shared are equal"
    )
    for name in differ[:SHOWN]:
        print(f"   {name}: {one[name]['value']} before, {two[name]['value']} after")
    compared = any(next(rows(before, file), None) for file in ("metrics.jsonl", "iterations.jsonl")) and shared
    return 0 if all(agree) and compared and not differ else 1


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))

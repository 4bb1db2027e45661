"""A small real alternation for tests: fit the mean of a Gaussian to data by sampling, scoring and moving the mean.

Run as a command it does so in a directory and prints the rows; ``SLOW`` is a pause in seconds in every call.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mobula.alternation import AlternationConfig, Context, History, Loop, Row, Sharded, Step, run
from mobula.artifacts import write_json

DATA = [2.0 + 0.1 * i for i in range(23)]


@dataclass
class Sampler:
    """Proposes means around the present one; with ``fatal`` its process dies once, at the item of this number."""

    mean: float
    fatal: Path | None = None

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        time.sleep(float(os.environ.get("SLOW", "0")))
        if self.fatal and any(item["i"] == 7 for item in items) and not self.fatal.exists():
            self.fatal.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        chance = random.Random(seed)
        return [{"i": item["i"], "x": item["x"], "m": self.mean + chance.gauss(0, 1)} for item in items]


@dataclass
class Scorer:
    """The log-likelihood of an item under its proposed mean."""

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        time.sleep(float(os.environ.get("SLOW", "0")))
        return [{**item, "score": -((item["x"] - item["m"]) ** 2)} for item in items]


@dataclass
class Who:
    """Tells in which process an item was worked on."""

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        return [{"pid": os.getpid()} for _ in items]


def mean(history: History) -> float:
    """The present mean."""
    return json.loads((history.latest("move") / "mean.json").read_text())


def begin(context: Context) -> Row:
    write_json(context.directory / "mean.json", 0.0)
    return {}


def move(context: Context) -> Row:
    time.sleep(float(os.environ.get("SLOW", "0")))
    rows = context.history.rows("score")
    weights = [math.exp(row["score"]) for row in rows]
    moved = sum(w * row["m"] for w, row in zip(weights, rows, strict=True)) / sum(weights)
    write_json(context.directory / "mean.json", moved)
    return {"samples": len(rows), "sum": sum(row["i"] for row in rows)}


def measure(history: History, iteration: int) -> Row:
    value = mean(history)
    row = {"mean": value, "error": abs(value - sum(DATA) / len(DATA))}
    return {**row, **history.facts("move")} if iteration else row


def gaussian(fatal: Path | None = None) -> Loop:
    """The loop."""
    data = [{"i": i, "x": x} for i, x in enumerate(DATA)]
    return Loop(
        identity="gaussian",
        start=[Step("move", begin)],
        phases=[
            Sharded("sample", lambda _: data, lambda context: Sampler(mean(context.history), fatal), size=5),
            Sharded("score", lambda context: context.history.rows("sample"), lambda _: Scorer(), size=4),
            Step("move", move),
        ],
        measure=measure,
    )


if __name__ == "__main__":
    outcome = run(gaussian(), AlternationConfig(iterations=3, actors=0), Path(sys.argv[1]), seed=1)
    print(json.dumps(outcome.rows))

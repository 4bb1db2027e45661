"""The cold start: both networks learn a little from questions whose gold facts are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mobula.alternation import seed_of
from mobula.artifacts import write_jsonl
from mobula.rag.dro.config import Config
from mobula.rag.dro.loop import shapes, split_of
from mobula.rag.dro.pair import STATE, Pair
from mobula.rag.dro.training import WeightedTask
from mobula.training import fit


def cold_start(config: Config, directory: Path, seed: int) -> Pair:
    """The pair in ``directory``, trained there unless it is.

    The selector learns the gold order, the generator to answer from the gold facts in that order.
    """
    sizes = shapes(config)
    if not (directory / STATE).is_file():
        directory.mkdir(parents=True, exist_ok=True)
        steps = {"selector": config.cold.selector_steps, "generator": config.cold.generator_steps}
        trained = {kind: _train(config, directory / kind, seed, kind, count) for kind, count in steps.items()}
        pair = Pair(trained["selector"], trained["generator"], sizes["selector"], sizes["generator"])
        pair.write(directory)
    return Pair.read(directory, sizes["selector"], sizes["generator"])


def _train(config: Config, directory: Path, seed: int, kind: str, steps: int) -> Path:
    split = split_of(config, "labelled")
    gold = split.draw().gold.tolist()
    rows = [{"query": query, "orders": [order], "weights": [1.0]} for query, order in enumerate(gold)]
    write_jsonl(directory / "weights.jsonl", rows)
    fresh = seed_of(seed, kind) % 2**31
    task = WeightedTask(kind, shapes(config)[kind], split, directory / "weights.jsonl", None, fresh)
    result = fit(task, replace(config.fit, steps=steps), directory / "fit", seed=fresh, name=kind)
    return result.weights

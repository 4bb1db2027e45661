"""The cold start: both networks learn a little from questions whose gold passages are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mobula.alternation import seed_of
from mobula.artifacts import write_jsonl
from mobula.rag.dro.config import Config
from mobula.rag.dro.loop import WEIGHTS
from mobula.rag.dro.pair import STATE, Pair
from mobula.rag.dro.source import Source
from mobula.training import fit


def cold_start(config: Config, source: Source, directory: Path, seed: int) -> Pair:
    """The pair in ``directory``, trained there unless it is."""
    if not (directory / STATE).is_file():
        directory.mkdir(parents=True, exist_ok=True)
        steps = {"selector": config.cold.selector_steps, "generator": config.cold.generator_steps}
        trained = {kind: _train(config, source, directory / kind, seed, kind, n) for kind, n in steps.items()}
        Pair(**trained).write(directory)
    return Pair.read(directory)


def _train(config: Config, source: Source, directory: Path, seed: int, kind: str, steps: int) -> Path:
    drawn = seed_of(seed, kind) % 2**31
    start = source.fresh(kind, directory, drawn)
    write_jsonl(directory / WEIGHTS, source.labels(kind, drawn))
    task = source.task(kind, "labelled", directory / WEIGHTS, start, drawn)
    return fit(task, replace(config.fit, steps=steps), directory / "fit", seed=drawn, name=kind).weights

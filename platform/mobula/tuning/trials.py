"""What one trial does, in a process of its own, and what it leaves in its folder.

A point has one folder whatever trial runs it: ``reports.jsonl`` while it trains, ``result.json`` once it is complete,
``error.json`` if it failed. A trial whose result is there gives it back without computing it again, so a sweep that was
killed between the end of a trial and Tune's next snapshot repeats nothing.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ray import tune

from mobula import artifacts
from mobula import config as configs
from mobula.errors import ConfigError, TrainingError
from mobula.experiment import ExperimentConfig
from mobula.tuning.space import Point, with_keys

REPORTS = "reports.jsonl"
UNITS = ("iteration", "step")  # by which a report says how far its trial is


@dataclass(frozen=True)
class Trials:
    """What all trials of a sweep share; small and picklable.

    ``required`` are the metrics every report must hold, with ASHA its unit of progress last; ``limit`` is the
    progress at which ASHA ends a trial; ``artifact`` is None where trials train.
    """

    module: str
    base: dict[str, Any]
    required: tuple[str, ...]
    limit: int | None
    folder: Path
    artifact: Path | None

    def method(self) -> ModuleType:
        """The method's module."""
        return importlib.import_module(self.module)

    def experiment(self, point: Point) -> ExperimentConfig:
        """The experiment at a point."""
        return configs.build(self.method().Config, with_keys(self.base, point), source="point")

    def at(self, point: Point) -> Path:
        """The folder of a point."""
        return self.folder / configs.digest(point)[:16]

    def kept(self, point: Point) -> dict[str, Any] | None:
        """The result of a point that is complete: {"metrics", "seconds"}."""
        return _read(self.at(point) / "result.json")

    def error(self, point: Point) -> str | None:
        """Why a point failed, in one line; None also where its process was killed."""
        record = _read(self.at(point) / "error.json")
        return record["error"] if record else None

    def history(self, point: Point) -> list[dict[str, Any]]:
        """Every report of a training trial so far; what an interrupted attempt reported and the next again is once."""
        path = self.at(point) / REPORTS
        rows = artifacts.read_jsonl(path) if path.is_file() else []
        by_progress = {next((row[unit] for unit in UNITS if unit in row), -i): row for i, row in enumerate(rows, 1)}
        return list(by_progress.values())

    def note(self, point: Point, metrics: dict[str, Any]) -> None:
        """Add a report to the history."""
        path = self.at(point) / REPORTS
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(metrics, default=float) + "\n")

    def keep(self, point: Point, result: dict[str, Any]) -> None:
        """Record a point as complete."""
        artifacts.write_json(self.at(point) / "result.json", result)

    def check(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """``metrics``, if they hold every objective as a finite number.

        Raises:
            ConfigError: if the method does not report one; names what it reports.
            TrainingError: if one is not finite.
        """
        for name in self.required:
            if name not in metrics:
                hint = configs.nearest(name, list(metrics))
                raise ConfigError([f"the method reports no metric {name!r}{hint}"], "objectives")
            if not math.isfinite(metrics[name]):
                raise TrainingError(f"{name} is {metrics[name]}")
        return metrics

    @contextmanager
    def failures(self, point: Point) -> Iterator[None]:
        """Leave the reason in the point's folder if the block raises; Tune then marks the trial as failed."""
        path = self.at(point) / "error.json"
        path.unlink(missing_ok=True)
        try:
            yield
        except Exception as error:
            artifacts.write_json(path, {"error": " ".join(f"{type(error).__name__}: {error}".split())})
            raise


class Measurement(tune.Trainable):
    """A trial that measures a frozen artifact. Its process serves many trials: the artifact is opened once."""

    def setup(self, config: dict[str, Any], trials: Trials) -> None:  # type: ignore[override]
        """Open and verify the artifact."""
        assert trials.artifact is not None
        self.trials = trials
        self.artifact = artifacts.open_artifact(trials.artifact)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next point; Tune has put it into ``self.config``."""
        return True

    def step(self) -> dict[str, Any]:
        """The whole trial."""
        trials, point = self.trials, self.config["point"]
        result = trials.kept(point)
        if result is None:
            with trials.failures(point):
                started = time.perf_counter()
                metrics = trials.check(trials.method().measure(self.artifact, trials.experiment(point), split="dev"))
                result = {"metrics": metrics, "seconds": time.perf_counter() - started}
            trials.keep(point, result)
        return {**result, "done": True}


def train(config: dict[str, Any], trials: Trials) -> None:
    """A trial that trains its point; the method reports after each evaluation, and a scheduler may stop it there."""
    point = config["point"]
    kept = trials.kept(point)
    if kept is not None:
        tune.report(kept)
        return
    started = time.perf_counter()
    last: dict[str, Any] = {}

    def report(metrics: dict[str, Any]) -> None:
        last.update(metrics=trials.check(dict(metrics)), seconds=time.perf_counter() - started)
        trials.note(point, last["metrics"])
        tune.report(dict(last))

    with trials.failures(point):
        trials.method().train_trial(trials.experiment(point), trials.at(point), report)
        if not last:
            raise TrainingError("the method trained without reporting; lower its evaluation interval")
    trials.keep(point, last)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

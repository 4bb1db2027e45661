"""A method small enough for tests of sweeps: a polynomial fitted to a noisy sine by gradient descent.

Its trade-off is real: with fewer terms a prediction costs fewer multiplications and is worse.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from mobula import artifacts
from mobula.config import key, section
from mobula.errors import MobulaError
from mobula.experiment import ExperimentConfig, Report, Run

DEGREE = 9


@dataclass
class Training:
    lr: float = key(0.3, "learning rate", gt=0)
    steps: int = key(120, "gradient steps", ge=1)
    eval_every: int = key(10, "steps between reports", ge=1)
    workers: int = key(0, "always 0: this process", ge=0)
    pause_s: float = key(0.0, "sleep after every report", ge=0)


@dataclass
class Decode:
    terms: int = key(DEGREE, "polynomial terms evaluated", ge=1, le=DEGREE)
    steps: int | None = key(None, "a budget", ge=1)
    threshold: float | None = key(None, "another budget", gt=0, lt=1)
    fault: str = key("none", "what goes wrong", choices=("none", "raise", "die", "nan"))
    pause_s: float = key(0.0, "sleep before a measurement", ge=0)

    def problems(self) -> list[str]:
        both = self.steps is not None and self.threshold is not None
        return ["threshold and steps exclude each other"] if both else []


@dataclass
class Config(ExperimentConfig):
    training: Training = section(Training)
    decode: Decode = section(Decode)
    journal: str = key("", "file that gets a line for every training and measurement")


def run(run: Run) -> Report:
    """Fit and write the artifact."""
    weights = _fit(run.config.training, lambda metrics: run.log(**metrics))
    artifacts.write(
        run.artifact_directory, kind="curve", method="curve", meta={},
        fill=lambda folder: save_file({"weights": weights}, folder / "weights.safetensors"),
    )  # fmt: skip
    _note(run.config, "trained once")
    return run.report()


def measure(artifact: artifacts.Artifact, config: Config, split: str = "dev") -> dict[str, float]:
    """R2 and multiplications of the first ``terms`` terms."""
    time.sleep(config.decode.pause_s)
    if config.decode.fault == "raise":
        raise MobulaError("asked to fail")
    if config.decode.fault == "die":
        os._exit(7)
    weights = load_file(artifact.path("weights.safetensors"))["weights"]
    weights[config.decode.terms :] = 0
    _note(config, f"measured {config.decode.terms} in {os.getpid()}")
    r2 = float("nan") if config.decode.fault == "nan" else _r2(weights)
    return {"r2": r2, "multiplications": float(config.decode.terms)}


def train_trial(config: Config, directory: Path, report) -> None:
    """Fit, reporting at each evaluation."""

    def told(metrics: dict[str, float]) -> None:
        report(metrics)
        time.sleep(config.training.pause_s)

    _note(config, f"training lr={config.training.lr:.6f}")
    directory.mkdir(parents=True, exist_ok=True)
    _fit(config.training, told)
    (directory / "note.json").write_text(json.dumps({"lr": config.training.lr}))


def _features(seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.uniform(-1, 1, 200)
    y = np.sin(3 * x) + 0.05 * generator.normal(size=200)
    return np.stack([x**i for i in range(DEGREE)], axis=1), y


def _r2(weights: np.ndarray) -> float:
    x, y = _features(seed=1)
    return float(1 - ((x @ weights - y) ** 2).mean() / y.var())


def _fit(training: Training, report) -> np.ndarray:
    x, y = _features(seed=0)
    weights = np.zeros(DEGREE)
    for step in range(1, training.steps + 1):
        weights -= training.lr * x.T @ (x @ weights - y) / len(y)
        if step % training.eval_every == 0:
            report({"step": step, "r2": _r2(weights)})
    return weights


def _note(config: Config, line: str) -> None:
    if config.journal:
        with open(config.journal, "a") as stream:
            stream.write(line + "\n")

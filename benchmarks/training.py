"""Step time of our training loop against a plain PyTorch loop: R1 and R2.

Same model, seed and data. The two arms take turns, step by step, in one process; the first steps are dropped;
the reported ratio is the median over pairs of neighbouring steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.language_task import LanguageTask
from benchmarks.measuring import ratio
from mobula.threads import one_thread
from mobula.training import FitResult, TrainingConfig, fit
from mobula.training.loop import batch_indices, learning_rate, read_metrics

WARMUP = 5
PAIRS = 40
SEED = 0


class PlainLoop:
    """The loop one would write by hand."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.task = LanguageTask()
        torch.manual_seed(SEED)
        self.model = self.task.build()
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]))
        self.losses: list[Tensor] = []

    def step(self, number: int) -> float:
        """One optimizer step; returns its seconds."""
        started = time.perf_counter()
        indices = batch_indices(self.task.examples, self.config.batch, number, SEED)
        loss, _ = self.task.loss(self.model, self.task.batch(indices, torch.default_generator))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, number)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())
        return time.perf_counter() - started


@dataclasses.dataclass
class TakingTurns(LanguageTask):
    """The task, whose ``batch`` marks the end of our previous step, lets the plain loop take one, and goes on."""

    plain: PlainLoop | None = None
    plain_s: list[float] = dataclasses.field(default_factory=list)
    ours_s: list[float] = dataclasses.field(default_factory=list)
    _started: float = 0.0

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        if self.plain_s:
            self.ours_s.append(time.perf_counter() - self._started)
        assert self.plain is not None
        self.plain_s.append(self.plain.step(len(self.plain_s)))
        self._started = time.perf_counter()
        return super().batch(indices, generator)


def run(pairs: int = PAIRS) -> dict[str, Any]:
    """Ratios of step times, ZeRO stages 0 to 3 over the plain loop, one worker."""
    ratios, details = {}, {}
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        for stage in range(4):
            name = f"zero{stage}_over_torch"
            ratios[name], details[name] = _compare(stage, pairs, Path(folder) / name)
        checkpoint = _checkpoint(Path(folder) / "checkpoint")
    return {
        "name": "training",
        "ratios": ratios,
        "details": details,
        "checkpoint": checkpoint,
        "pairs": pairs,
        "threads": 1,
    }


def _compare(stage: int, pairs: int, directory: Path) -> tuple[dict[str, float], dict[str, float]]:
    config = TrainingConfig(steps=WARMUP + pairs + 1, batch=8, zero=stage, report_every=10, workers=0)
    task = TakingTurns(plain=PlainLoop(config))
    result = fit(task, config, directory, seed=SEED, name="benchmark")
    plain, ours = task.plain_s[WARMUP:-1], task.ours_s[WARMUP:]
    assert task.plain is not None
    return ratio(ours, plain), {
        "plain_ms": round(1000 * sorted(plain)[len(plain) // 2], 2),
        "ours_ms": round(1000 * sorted(ours)[len(ours) // 2], 2),
        "largest_loss_difference": _loss_difference(result, task.plain, config.report_every),
    }


@dataclasses.dataclass
class Watching(LanguageTask):
    """The task, which notes when each batch is drawn and how large the newest checkpoint is."""

    directory: Path = Path()
    drawn: list[float] = dataclasses.field(default_factory=list)
    size: int = 0

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        self.drawn.append(time.perf_counter())
        files = [path for path in (self.directory / "checkpoints").rglob("*") if path.is_file()]
        self.size = max(self.size, sum(path.stat().st_size for path in files))
        return super().batch(indices, generator)


def _checkpoint(directory: Path, saves: int = 5) -> dict[str, float]:
    """R4: what saving, hashing and committing a state costs; every second step saves."""
    task = Watching(directory=directory)
    config = TrainingConfig(steps=2 * saves + 3, batch=8, checkpoint_every=2, keep=1, report_every=1000, workers=0)
    fit(task, config, directory, seed=SEED, name="benchmark")
    steps = [b - a for a, b in itertools.pairwise(task.drawn)][2:]
    plain, saving = sorted(steps[0::2]), sorted(steps[1::2])
    weights = sum(p.numel() for p in task.build().parameters())
    return {
        "save_and_commit_ms": round(1000 * (saving[len(saving) // 2] - plain[len(plain) // 2]), 1),
        "bytes_per_weight": round(task.size / weights, 2),
        "weights": weights,
    }


def _loss_difference(result: FitResult, plain: PlainLoop, every: int) -> float:
    """How far the two loss curves come apart, over the rows of the metrics file."""
    theirs = torch.stack(plain.losses).double()
    rows = [row for row in read_metrics(result.history) if row["step"] % every == 0]
    return max(abs(row["loss"] - float(theirs[row["step"] - every : row["step"]].mean())) for row in rows)


if __name__ == "__main__":
    import json

    print(json.dumps(run(), indent=2))

"""From the command to the first optimizer step, in parts, on Ray Train's workers; no compiler runs.

A fresh process is timed. Every compiler on its PATH is shadowed by a script that leaves a mark and fails, and it
sees no build of an earlier start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.language_task import LanguageTask

ROOT = Path(__file__).parents[1]
COMPILERS = ("g++", "c++", "gcc", "cc", "clang", "clang++", "ninja", "nvcc")
WORKERS = 2
# In the order in which they are reached.
MARKS = ("command", "imported", "ray_started", "workers_started", "first_batch", "first_step")


@dataclass
class Marking(LanguageTask):
    """The task, which notes the time at which a worker builds the model, draws a batch, and draws the next."""

    marks: str = ""
    drawn: int = 0

    def build(self) -> Any:
        mark(Path(self.marks), "workers_started")
        return super().build()

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        mark(Path(self.marks), "first_step" if self.drawn else "first_batch")
        self.drawn += 1
        return super().batch(indices, generator)


def mark(folder: Path, name: str) -> None:
    """Note the time, unless another worker did so first."""
    path = folder / name
    if not path.exists():
        path.write_text(repr(time.time()))


def run() -> dict[str, Any]:
    """Seconds of each part, and the compilers that ran (none)."""
    with tempfile.TemporaryDirectory(prefix="start") as name:
        folder = Path(name)
        started = time.time()
        arguments = [sys.executable, "-m", "benchmarks.startup", str(folder)]
        subprocess.run(arguments, cwd=ROOT, env=_environment(folder), check=True, timeout=600)
        times = [started, *(float((folder / name).read_text()) for name in MARKS[1:])]
        compiled = (folder / "compiled").read_text().split() if (folder / "compiled").exists() else []
    parts = ("imports", "ray_init", "worker_start", "deepspeed_init", "first_step")
    seconds = {part: round(b - a, 2) for part, a, b in zip(parts, times, times[1:], strict=False)}
    return {
        "name": "startup",
        "ratios": {},
        "seconds": {**seconds, "total": round(times[-1] - times[0], 2)},
        "compilers_run": compiled,
        "workers": WORKERS,
    }


def _environment(folder: Path) -> dict[str, str]:
    shadows = folder / "bin"
    shadows.mkdir()
    for name in COMPILERS:
        script = shadows / name
        script.write_text(f"#!/bin/sh\necho {name} >> {folder / 'compiled'}\nexit 1\n")
        script.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{shadows}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "RAY_TMPDIR": str(folder),
    }


def _command(folder: Path) -> None:
    """What the timed process does."""
    # Under this name the workers can import the task; here the module is called __main__.
    from benchmarks.startup import Marking
    from mobula.cluster.connect import connect
    from mobula.training import TrainingConfig, fit

    mark(folder, "imported")
    with connect():
        mark(folder, "ray_started")
        config = TrainingConfig(steps=2, batch=4 * WORKERS, workers=WORKERS)
        fit(Marking(marks=str(folder)), config, folder / "run", seed=0, name="startup")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _command(Path(sys.argv[1]))
    else:
        print(json.dumps(run(), indent=2))

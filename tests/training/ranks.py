"""Two ranks without Ray: a standing process for each, joined over gloo."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from mobula.training import Task, TrainingConfig, loop

CPU = torch.device("cpu")


class TwoRanks:
    """Trains tasks on both ranks."""

    def __init__(self, executors: list[ProcessPoolExecutor]) -> None:
        self._executors = executors

    def train(self, task: Task, config: TrainingConfig, directory: Path, seed: int) -> None:
        directory.mkdir(parents=True)
        for future in [e.submit(_train, task, config, directory, seed) for e in self._executors]:
            future.result(120)


@contextlib.contextmanager
def two_ranks() -> Iterator[TwoRanks]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        executors = [ProcessPoolExecutor(1, context, _join, (rank, port)) for rank in range(2)]
        for executor in executors:
            stack.enter_context(executor)
        yield TwoRanks(executors)


def _join(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)


def _train(task: Task, config: TrainingConfig, directory: Path, seed: int) -> None:
    loop.train(task, config, directory, seed, CPU, report=_silent)


def _silent(row: dict) -> None:
    """Nobody watches."""

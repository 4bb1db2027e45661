"""By how much an M-step has raised the objective that it was given, and how spread the selector's orders are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from mobula.alternation import Row
from mobula.artifacts import write_jsonl
from mobula.rag.dro.source import OrdersTask, Source

QUESTIONS = 1000  # training questions that are looked at


def objective(task: OrdersTask, network: nn.Module, size: int) -> float:
    """sum over k of w_k log p of a question's rows under a network, in nats: what a training with them raises.

    The mean over the first questions of the task, ``size`` at a time.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = network.eval().to(device)
    rows, total = torch.arange(min(task.examples, QUESTIONS)), 0.0
    with torch.inference_mode():
        for part in rows.split(size):
            batch = {name: value.to(device) for name, value in task.batch(part, torch.Generator()).items()}
            total -= float(task.loss(model, batch)[0]) * len(part)
    return total * task.tokens / len(rows)


def entropy(source: Source, samples: Sequence[Row], selector: Path, file: Path, size: int) -> float:
    """H(z|x) in nats, estimated from rows ``{query, orders}`` that ``selector`` drew; ``file`` is written on the way.

    Of a list that was filled, only the passages that it named itself count.
    """
    names = ("query", "orders", "valid")
    kept = [{name: row[name] for name in names if name in row} for row in samples[:QUESTIONS]]
    write_jsonl(file, [{**row, "weights": [1 / len(row["orders"])] * len(row["orders"])} for row in kept])
    task = source.task("selector", "train", file, selector, 0)
    return -objective(task, task.build(), size) if task.examples else 0.0

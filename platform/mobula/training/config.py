"""The schema of a ``training:`` section."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mobula.config import key

# Keys that decide how a run is carried out but not what comes out of it: they may change between attempts.
OPERATIONAL = ("checkpoint_every", "keep", "max_failures", "gradient_checkpointing")


@dataclass
class TrainingConfig:
    """How a model is trained. Batch sizes count examples, intervals count optimizer steps."""

    examples: int = key(30_000, "examples to train on, repeats included; rounded up to whole batches", ge=1)
    steps: int | None = key(None, "optimizer steps to train for, instead of examples", ge=1)
    batch: int = key(128, "examples per optimizer step, over all workers", ge=1)
    micro_batch: int | None = key(None, "examples per forward pass of a worker; its whole share if not set", ge=1)
    lr: float = key(1e-3, "peak learning rate of AdamW", gt=0)
    betas: list[float] = key([0.9, 0.98], "AdamW's two decay rates", ge=0, lt=1)
    weight_decay: float = key(0.01, "AdamW's weight decay; biases, gains and other vectors are left out", ge=0)
    clip: float = key(1.0, "largest gradient norm; 0: no clipping", ge=0)
    warmup: float = key(0.05, "fraction of the steps with a rising learning rate", ge=0, le=1)
    decay: float = key(0.3, "fraction of the steps, at the end, with a falling learning rate", ge=0, le=1)
    schedule: str = key("linear", "form of the falling part", choices=("linear", "cosine"))
    combine: str = key("sum", "what becomes of the gradients of a task's named losses", choices=("sum", "pcgrad"))
    precision: str = key("fp32", "fp32, or bf16 for mixed precision")
    gradient_checkpointing: bool = key(
        False, "run a pretrained model's layers again for their gradients instead of keeping what they computed"
    )
    zero: int = key(0, "ZeRO stage: what the workers share out (0 nothing ... 3 all states and weights)", ge=0, le=3)
    workers: int | None = key(
        None, "Ray Train workers; 0: train in this process, without Ray; not set: as cluster.yaml says", ge=0
    )
    eval_every: int | None = key(None, "evaluate on the dev split this often; at the end only if not set", ge=1)
    monitor: str = key("", "dev metric that chooses the best weights; empty: the last weights are used")
    mode: str = key("max", "whether a larger or a smaller monitored metric is better", choices=("max", "min"))
    early_stop: int | None = key(None, "stop after this many evaluations without a better metric", ge=1)
    report_every: int = key(10, "write a row of metrics this often", ge=1)
    checkpoint_every: int | None = key(None, "save the state to resume from this often; never if not set", ge=1)
    keep: int = key(2, "resume states to keep", ge=1)
    max_failures: int = key(2, "times that lost workers are replaced before training gives up", ge=0)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps or -(-self.examples // self.batch)

    @property
    def world(self) -> int:
        """Processes that share a batch."""
        return max(1, self.workers or 0)

    @property
    def micro(self) -> int:
        """Examples per forward pass of a worker."""
        return self.micro_batch or self.batch // self.world

    @property
    def accumulation(self) -> int:
        """Forward passes of a worker per optimizer step."""
        return self.batch // (self.world * self.micro)

    def identity(self) -> dict[str, Any]:
        """The keys that decide the result."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in OPERATIONAL}

    def problems(self) -> Iterator[str]:
        """What the keys contradict each other in."""
        if self.precision == "fp16":
            yield "precision=fp16: needs loss scaling and does not run on CPU; use bf16 or fp32"
        elif self.precision not in ("fp32", "bf16"):
            yield f"precision={self.precision!r}: expected fp32 or bf16"
        if self.combine != "sum" and self.zero == 3:
            yield f"combine={self.combine} does not work with zero=3, which shares out the gradients: use zero <= 2"
        share, rest = divmod(self.batch, self.world)
        if rest:
            yield f"batch={self.batch} does not divide among workers={self.workers}"
        elif self.micro_batch is not None and share % self.micro_batch:
            yield f"micro_batch={self.micro_batch} does not divide a worker's share of the batch ({share})"
        if len(self.betas) != 2:
            yield f"betas={self.betas}: expected two numbers"
        if self.warmup + self.decay > 1:
            yield f"warmup={self.warmup} and decay={self.decay} together exceed the whole run"
        if self.early_stop is not None and not (self.monitor and self.eval_every):
            yield "early_stop needs monitor and eval_every"

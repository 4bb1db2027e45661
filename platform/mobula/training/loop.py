"""The training loop. It is the same in this process, in a Tune trial and in every Ray Train worker.

Everything random is a function of the seed and the place in the run: the batch of step s, and the state of
torch's generators in each of its slices. A resumed run therefore needs no saved generator, and ends with the
weights of an uninterrupted one, bit for bit on the same number of ranks.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mobula.artifacts import write_json, write_text
from mobula.errors import ArtifactError, RunConflict, TrainingError
from mobula.training import checkpoints
from mobula.training.combine import scale_of
from mobula.training.config import TrainingConfig
from mobula.training.engine import Engine, join_process_group
from mobula.training.task import Task

METRICS = "metrics.jsonl"
WEIGHTS = "model.safetensors"
LAST = "last.safetensors"
REFERENCE = "reference.safetensors"
RESULT = "result.json"
# After its driver was killed, a worker of an earlier attempt may live on for some seconds.
LOCK_WAIT_S = 60.0

Row = dict[str, Any]


class RankFailure(TrainingError):
    """One rank failed while the others wait for it: they have to be ended from outside."""


class Diverged(TrainingError):
    """A loss that is not finite."""


@dataclass
class State:
    """Where a run stands after ``step`` steps; travels with every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    best: Row = field(default_factory=dict)
    stale: int = 0
    stopped: bool = False
    referred: bool = False
    losses: list[float] = field(default_factory=list)
    extras: dict[str, float] = field(default_factory=dict)


def train(
    task: Task,
    config: TrainingConfig,
    directory: Path,
    seed: int,
    device: torch.device,
    report: Callable[[Row], None],
    trial: bool = False,
) -> None:
    """Train to the end, from the newest checkpoint in ``directory`` if there is one.

    Every rank calls this. A ``trial`` whose loss is not finite any more ends there and says so in its result. Rank 0
    writes metrics.jsonl, the weights and, last of all, result.json; it calls ``report`` with every row of metrics,
    other ranks with rows of evaluation only.

    Raises:
        TrainingError: the loss is not finite, the monitored metric is absent, the storage refuses.
        ArtifactError: the checkpoint is damaged.
        RunConflict: another process trains in this directory.
    """
    join_process_group()
    with _locked(directory):
        torch.manual_seed(seed)
        engine = Engine(task, config, device)
        try:
            _Loop(task, config, directory, seed, engine, report, trial).run()
        finally:
            engine.close()


class _Loop:
    """One rank's run through the steps."""

    def __init__(
        self,
        task: Task,
        config: TrainingConfig,
        directory: Path,
        seed: int,
        engine: Engine,
        report: Callable,
        trial: bool,
    ) -> None:
        self.task, self.config, self.directory, self.seed = task, config, directory, seed
        self.engine, self.report, self.trial = engine, report, trial
        self.first = dist.get_rank() == 0
        self.state = State()
        self.window = _Window()
        self.started = time.perf_counter()
        self.reported = (self.started, 0)

    def run(self) -> None:
        """All steps that are left, then the final weights and the result."""
        self._resume()
        self._refer()
        self.engine.train()
        if self.config.monitor and self.state.step == 0:
            # The weights it starts from may be better than any that training finds.
            self._evaluate()
        diverged = False
        try:
            while self.state.step < self.config.total_steps and not self.state.stopped:
                self._step()
                self._after_step()
        except Diverged:
            if not self.trial:
                raise
            diverged = True
        if self.window.losses:
            self._report()
        self._finish(diverged)

    def _step(self) -> None:
        step = self.state.step
        lr = learning_rate(self.config, step)
        indices = batch_indices(self.task.examples, self.config.batch, step, self.seed)
        weights = self.task.weights(indices)
        last = self.config.accumulation - 1
        for micro in range(self.config.accumulation):
            part = dist.get_rank() * self.config.accumulation + micro
            generator = seed_slice(self.seed, step, part)
            mine = slice(part * self.config.micro, (part + 1) * self.config.micro)
            batch = self.task.batch(indices[mine], generator)
            loss, extras = self.engine.backward(batch, scale_of(weights, mine))
            norm, combination = self.engine.step(lr, boundary=micro == last, seed=_mix("combine", self.seed, step))
            self.window.add(loss, extras, 1 / self.config.accumulation)
        self.window.close(norm, lr, combination)
        self.state.step = step + 1

    def _after_step(self) -> None:
        step, config = self.state.step, self.config
        final = step == config.total_steps
        evaluates = final or _due(step, config.eval_every)
        saves = _due(step, config.checkpoint_every) and not final
        reports = _due(step, config.report_every)
        if reports or evaluates or saves:
            self.window.settle(step)
        if reports:
            self._report()
        if evaluates:
            self._evaluate()
        if saves:
            self._save()

    def _report(self) -> None:
        seconds, examples = time.perf_counter(), self.state.step * self.config.batch
        rate = (examples - self.reported[1]) / max(seconds - self.reported[0], 1e-9)
        self.reported = (seconds, examples)
        row = {"step": self.state.step, **self.window.row(), "examples": examples, "examples_per_s": round(rate, 1)}
        self._write(row)

    def _evaluate(self) -> None:
        seed_slice(self.seed, self.state.step, -1)
        metrics = _from_first(self.engine.evaluate())
        if metrics or self.config.monitor:
            self._judge(metrics)
            self._write({"step": self.state.step, "dev": metrics}, everywhere=True)
            self.task.check(metrics, self.state.step, self.config.total_steps)
        # Time spent on the dev split is no part of the training rate.
        self.reported = (time.perf_counter(), self.state.step * self.config.batch)

    def _judge(self, metrics: dict[str, float]) -> None:
        """Keep the weights if the monitored metric has never been better."""
        name = self.config.monitor
        if not name:
            return
        if name not in metrics:
            known = ", ".join(sorted(metrics)) or "none"
            raise TrainingError(f"monitor={name}: the task does not measure it (it measures: {known})")
        before, now = self.state.best.get(name), metrics[name]
        if before is None or (now > before if self.config.mode == "max" else now < before):
            self.state.best = {"step": self.state.step, **metrics}
            self.state.stale = 0
            self._export(WEIGHTS)
            return
        self.state.stale += 1
        self.state.stopped = self.config.early_stop is not None and self.state.stale >= self.config.early_stop

    def _export(self, name: str) -> None:
        weights = self.engine.weights()
        self._together(lambda: checkpoints.export_weights(self.directory / name, weights))

    def _save(self) -> None:
        self.state.seconds = self._seconds()
        self.state.losses, self.state.extras = self.window.losses, self.window.extras
        facts = {**asdict(self.state), "world": dist.get_world_size()}
        partial = checkpoints.partial_state(self.directory, self.state.step)
        try:
            with checkpoints.writing(partial):
                partial.mkdir(parents=True, exist_ok=True)
                self.engine.save(partial)
        except TrainingError as error:
            raise RankFailure(str(error)) from error
        self._together(lambda: checkpoints.commit_state(self.directory, self.state.step, facts, self.config.keep))

    def _resume(self) -> None:
        self._together(lambda: checkpoints.remove_partial(self.directory))
        found = self._newest()
        if found is not None:
            folder, facts = found
            world = facts.pop("world")
            if world != dist.get_world_size():
                raise RunConflict(
                    f"{self.directory}: training began on {world} ranks and cannot go on on {dist.get_world_size()}; "
                    f"set training.workers={world}, or use another directory"
                )
            self.engine.load(folder)
            self.state = State(**facts)
            self.window = _Window(list(self.state.losses), dict(self.state.extras))
        self.started = time.perf_counter() - self.state.seconds
        self.reported = (time.perf_counter(), self.state.step * self.config.batch)
        self._together(self._cut_metrics)

    def _refer(self) -> None:
        """Reference values are those of the model before its first step: computed then, read from then on."""
        path = self.directory / REFERENCE
        if self.state.step == 0 and not _from_first(path.is_file()):
            seed_slice(self.seed, 0, -1)
            values = self.engine.reference()
            self.state.referred = bool(values)
            if values:
                self._together(lambda: checkpoints.export_weights(path, values))
        elif self.state.step == 0:
            self.state.referred = True
        if self.state.referred:
            self.task.refer(_from_first(self._reference(path) if self.first else None))

    def _reference(self, path: Path) -> dict[str, Tensor]:
        """The values of the first attempt; those of the model as it is now would be others.

        Raises:
            RankFailure: they are gone or damaged.
        """
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            problem = f"{path}: the reference values of this training cannot be read ({type(error).__name__})"
            raise RankFailure(f"{problem}; remove {path.parent} to train again") from error

    def _newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Rank 0 verifies the newest checkpoint for all."""
        found: Any = None
        if self.first:
            try:
                found = checkpoints.newest_state(self.directory)
            except ArtifactError as error:
                found = error
        found = _from_first(found)
        if isinstance(found, ArtifactError):
            raise found
        return found

    def _cut_metrics(self) -> None:
        """Drop the rows of steps that will be done again."""
        path = self.directory / METRICS
        rows = read_metrics(path) if path.is_file() else []
        # Without a checkpoint the evaluation before the first step is done again as well.
        done = self.state.step or -1
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= done]
        write_text(path, "".join(kept))

    def _finish(self, diverged: bool) -> None:
        last = LAST if self.config.monitor else WEIGHTS
        if diverged:
            last = WEIGHTS  # the best ones so far; the last are worth nothing
        else:
            self._export(last)
        result = {
            "steps": self.state.step,
            "examples": self.state.step * self.config.batch,
            "seconds": round(self._seconds(), 3),
            "best": self.state.best,
            "last": last,
            "diverged": diverged,
        }
        self._together(lambda: write_json(self.directory / RESULT, result))
        if self.first:
            checkpoints.remove_states(self.directory)

    def _write(self, row: Row, everywhere: bool = False) -> None:
        self._together(lambda: _append(self.directory / METRICS, row))
        if self.first or everywhere:
            self.report(row)

    def _seconds(self) -> float:
        return time.perf_counter() - self.started

    def _together(self, write: Callable[[], None]) -> None:
        """Rank 0 writes; all ranks fail alike if it cannot."""
        problem = None
        if self.first:
            try:
                with checkpoints.writing(self.directory):
                    write()
            except TrainingError as error:
                problem = error
        problem = _from_first(problem)
        if problem is not None:
            raise problem


class _Window:
    """Losses and further values since the last report.

    Values stay on the device until :meth:`settle`, so that a GPU is not made to wait at every step.
    """

    def __init__(self, losses: list[float] | None = None, extras: dict[str, float] | None = None) -> None:
        self.losses = losses or []
        self.extras = extras or {}
        self.norm = 0.0
        self.lr = 0.0
        self._pending: list[Tensor] = []
        self._sum: Tensor | None = None
        self._named: dict[str, Tensor] = {}
        self._last: Tensor | None = None

    def add(self, loss: Tensor, extras: dict[str, Tensor | float], share: float) -> None:
        """Add a micro-batch that makes up this share of a step."""
        part = loss * share
        self._sum = part if self._sum is None else self._sum + part
        self._extend(extras, share, loss.device)

    def _extend(self, extras: dict[str, Tensor | float], share: float, device: torch.device) -> None:
        for name, value in extras.items():
            part = torch.as_tensor(value, dtype=torch.float32, device=device).detach() * share
            self._named[name] = self._named[name] + part if name in self._named else part

    def close(self, norm: Tensor, lr: float, extras: dict[str, Tensor | float]) -> None:
        """End a step; ``extras`` are values of the step as a whole."""
        assert self._sum is not None
        self._pending.append(self._sum)
        self._extend(extras, 1.0, self._sum.device)
        self._sum, self._last, self.lr = None, norm, lr

    def settle(self, step: int) -> None:
        """Average what is pending over all ranks, and check it; ``step`` is the number of steps done.

        Raises:
            Diverged: naming the first step whose loss is NaN or infinite.
        """
        if not self._pending:
            return
        names = list(self._named)
        values = torch.stack([*self._pending, *(self._named[name] for name in names)]).float()
        if dist.get_world_size() > 1:
            dist.all_reduce(values)
            values /= dist.get_world_size()
        done = len(self._pending)
        numbers = values.tolist()
        for offset, loss in enumerate(numbers[:done]):
            if not math.isfinite(loss):
                at = step - done + offset + 1
                raise Diverged(
                    f"the loss became {loss} at step {at}; nothing of it was saved: lower training.lr, or look at "
                    "the data of that step"
                )
        self.losses.extend(numbers[:done])
        for name, value in zip(names, numbers[done:], strict=True):
            self.extras[name] = self.extras.get(name, 0.0) + value
        self.norm = float(self._last) if self._last is not None else 0.0
        self._pending, self._named, self._last = [], {}, None

    def row(self) -> Row:
        """The means since the last report, which this call ends."""
        count = len(self.losses)
        row = {"loss": math.fsum(self.losses) / count, "lr": self.lr, "grad_norm": self.norm}
        row.update({name: value / count for name, value in self.extras.items()})
        self.losses, self.extras = [], {}
        return row


def batch_indices(examples: int, batch: int, step: int, seed: int) -> Tensor:
    """The examples (i64[batch]) of a step: the next stretch of an endless row of shuffled passes."""
    start = step * batch
    parts = []
    while start < (step + 1) * batch:
        epoch, offset = divmod(start, examples)
        part = _shuffled(examples, epoch, seed)[offset : offset + (step + 1) * batch - start]
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def seed_slice(seed: int, step: int, part: int) -> torch.Generator:
    """Seed torch for one slice of a step's batch (``part`` counts micro-batches over all ranks), and return a
    generator for the task's own draws."""
    value = _mix("slice", seed, step, part)
    torch.manual_seed(value)
    return torch.Generator().manual_seed(value ^ 1)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of a step (from 0): a linear rise, a plateau, and a fall that ends just above zero."""
    total = config.total_steps
    rising, falling = round(config.warmup * total), round(config.decay * total)
    if step < rising:
        return config.lr * (step + 1) / rising
    left = total - step
    if left > falling:
        return config.lr
    part = left / (falling + 1)
    return config.lr * (part if config.schedule == "linear" else (1 - math.cos(math.pi * part)) / 2)


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics file; a last line that a crash cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _append(path: Path, row: Row) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


@functools.lru_cache(maxsize=2)
def _shuffled(examples: int, epoch: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(_mix("epoch", seed, epoch))
    return torch.randperm(examples, generator=generator)


def _mix(*parts: Any) -> int:
    """A 63-bit seed that differs wherever the parts differ."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _from_first(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other trainings out of the directory while this one runs (rank 0 holds the lock).

    Raises:
        RunConflict: on every rank, if the lock does not come free in time.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        if dist.get_rank() == 0:
            with checkpoints.writing(directory):
                stream = stack.enter_context((directory / ".training.lock").open("w"))
            problem = _acquire(stream, directory)
        problem = _from_first(problem)
        if problem is not None:
            raise problem
        yield


def _acquire(stream: Any, directory: Path) -> RunConflict | None:
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            if time.monotonic() > deadline:
                return RunConflict(f"{directory}: another process is training here; wait for it or end it")
            time.sleep(0.5)

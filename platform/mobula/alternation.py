"""The one driver of methods that alternate: sample, score, choose, train, evaluate, and again.

A method hands over a :class:`Loop` of phases. The driver owns what lies around them: their order, their inputs and
outputs on disk, resuming inside an interrupted phase, random seeds, the pool of actors, the row of metrics of every
iteration, keep-best and the end. Iteration 0 is the start: what happens once, before anything alternates.

On disk, everything written once and atomically::

    iteration-002/03-score/inputs.jsonl         what the phase works on
                           shard-00004.jsonl    the rows that came of the fifth part of it
                           phase.json           the phase is finished: facts, shards, seconds
    iterations.jsonl                            one row of metrics an iteration

A phase that has its ``phase.json`` is never run again, a shard that has its file is never computed again, and only the
files that ``phase.json`` counts are ever read: so nothing is done twice and nothing counts twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from mobula.artifacts import read_jsonl, write_json, write_jsonl
from mobula.cluster import pool as pools
from mobula.cluster.pool import Pool, Row, Worker
from mobula.cluster.spec import ClusterSpec
from mobula.config import key
from mobula.errors import RunConflict

DONE, INPUTS, ROWS = "phase.json", "inputs.jsonl", "iterations.jsonl"
PROGRESS_S = 20.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class History:
    """What the finished phases left behind, up to and including the iteration that runs."""

    root: Path
    finished: list[tuple[int, str, Path]] = field(default_factory=list)

    def latest(self, phase: str) -> Path | None:
        """The directory of the last finished phase of this name."""
        return next((directory for _, name, directory in reversed(self.finished) if name == phase), None)

    def until(self, iteration: int) -> History:
        """What stood at the end of an iteration: later phases are left out."""
        return History(self.root, [entry for entry in self.finished if entry[0] <= iteration])

    def only(self, iteration: int) -> History:
        """What the phases of one iteration left."""
        return History(self.root, [entry for entry in self.finished if entry[0] == iteration])

    def ran(self, phase: str) -> bool:
        """Whether a phase of this name has finished."""
        return self.latest(phase) is not None

    def rows(self, phase: str) -> list[Row]:
        """Every row that the last phase of this name wrote, in the order of its inputs.

        Raises:
            KeyError: if there is none yet.
        """
        directory = self._need(phase)
        shards = range(_read(directory / DONE)["shards"])
        return [row for shard in shards for row in read_jsonl(directory / _shard_file(shard))]

    def facts(self, phase: str) -> Row:
        """What the last phase of this name returned or, of a sharded phase, its number of items and rows.

        Raises:
            KeyError: if there is none yet.
        """
        return _read(self._need(phase) / DONE)["facts"]

    def _need(self, phase: str) -> Path:
        directory = self.latest(phase)
        if directory is None:
            raise KeyError(f"phase {phase!r} has not run yet; finished: {[name for _, name, _ in self.finished]}")
        return directory


@dataclass(frozen=True)
class Context:
    """Where and when a phase runs: its directory, its iteration, its own seed, and what came before it."""

    directory: Path
    iteration: int
    seed: int
    history: History
    cluster: ClusterSpec | None


@dataclass(frozen=True)
class Step:
    """A phase in one piece, such as a training or a choice over all rows.

    ``run`` returns facts (JSON) for later phases and the row of metrics. After an interruption it is called again in
    the same directory, where ``training.fit`` goes on by itself. ``seeded_as``: the name that enters the phase's seed,
    if not its own: a phase that was renamed keeps its older name there, so that results repeat.
    """

    name: str
    run: Callable[[Context], Row]
    seeded_as: str = ""


@dataclass(frozen=True)
class Sharded:
    """A phase over many items, such as sampling or scoring, spread over actors in shards of ``size`` items.

    ``items`` is asked once; its answer is kept on disk. ``worker`` says who works, given what came before.
    ``seeded_as``: as in :class:`Step`.
    """

    name: str
    items: Callable[[Context], Sequence[Row]]
    worker: Callable[[Context], Worker]
    size: int = 64
    seeded_as: str = ""


Phase = Step | Sharded


@dataclass(frozen=True)
class Loop:
    """A method's phases: ``start`` once as iteration 0, ``phases`` in every later iteration.

    ``identity`` names all that decides the result (config, data, seed). ``measure`` makes the row of metrics of an
    iteration; with ``stop`` in it, and true, the loop ends there.
    """

    identity: str
    start: Sequence[Phase]
    phases: Sequence[Phase]
    measure: Callable[[History, int], Row]


@dataclass
class AlternationConfig:
    """How long a method alternates, and who samples and scores."""

    iterations: int = key(3, "iterations", ge=1)
    monitor: str = key("", "metric of an iteration's row that chooses the best one; empty: the last is the best")
    mode: str = key("max", "whether a larger or a smaller monitored metric is better", choices=("max", "min"))
    patience: int | None = key(None, "stop after this many iterations without a better metric; null: never", ge=1)
    max_hours: float | None = key(None, "begin no iteration after this many hours; null: no limit", gt=0)
    actors: int | None = key(
        None, "Ray actors that sample and score; 0: in this process; null: as many as training has workers", ge=0
    )
    max_failures: int = key(2, "times that a lost actor's shard is given to another before the run gives up", ge=0)

    def problems(self) -> list[str]:
        """Contradictions between keys."""
        return ["patience needs monitor"] if self.patience is not None and not self.monitor else []


@dataclass(frozen=True)
class Outcome:
    """What a finished loop left: a row an iteration, the best iteration, and why it ended."""

    rows: list[Row]
    best: int
    ended: str
    history: History


def run(
    loop: Loop,
    config: AlternationConfig,
    directory: Path,
    *,
    seed: int,
    cluster: ClusterSpec | None = None,
    pool: Pool | None = None,
    progress: Callable[[Row], None] | None = None,
) -> Outcome:
    """Run the loop in ``directory``, or go on where an interrupted call stopped.

    ``pool`` is who works on shards, for callers that run several loops; without it the loop has its own.
    ``progress`` is called with the row of every iteration that this call finished.

    Raises:
        RunConflict: the directory holds another loop.
        ClusterError: the cluster cannot give the actors what they need, or they were lost too often.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _claim(directory, loop, seed)
    history = History(directory)
    rows = read_jsonl(directory / ROWS) if (directory / ROWS).is_file() else []
    with _pool(config, cluster, pool) as workers:
        for iteration in range(config.iterations + 1):
            ended = _ended(rows, config)
            if ended and iteration >= len(rows):
                return _outcome(rows, config, ended, history)
            seconds = 0.0
            for number, phase in enumerate(loop.phases if iteration else loop.start):
                path = directory / f"iteration-{iteration:03}" / f"{number:02}-{phase.name}"
                own = seed_of(seed, iteration, phase.seeded_as or phase.name)
                context = Context(path, iteration, own, history, cluster)
                seconds += _run_phase(phase, context, workers)
                history.finished.append((iteration, phase.name, path))
            if iteration < len(rows):
                continue
            row = {"iteration": iteration, **loop.measure(history, iteration), "seconds": round(seconds, 3)}
            rows.append(row)
            write_jsonl(directory / ROWS, rows)
            if progress:
                progress(row)
    return _outcome(rows, config, _ended(rows, config) or "iterations", history)


def _pool(config: AlternationConfig, cluster: ClusterSpec | None, given: Pool | None) -> AbstractContextManager[Pool]:
    if given is not None:
        return contextlib.nullcontext(given)
    return pools.pool(config.actors, cluster, max_failures=config.max_failures)


def report_iterations(
    loop: Loop,
    config: AlternationConfig,
    directory: Path,
    seed: int,
    facts: Callable[[Row], Row],
    report: Callable[[Row], None],
) -> None:
    """Run the loop and report facts of each iteration, the start included: what a sweep's trial does.

    A loop that was interrupted after its last iteration has no new row, so it reports its last one once more.
    """
    reported: list[int] = []

    def progress(row: Row) -> None:
        reported.append(row["iteration"])
        report(facts(row))

    outcome = run(loop, config, directory, seed=seed, progress=progress)
    if not reported:
        report(facts(outcome.rows[-1]))


def seed_of(seed: int, *path: int | str) -> int:
    """The seed of a phase (seed, iteration, name) or of a shard (seed of the phase, number): 63 bits."""
    digest = hashlib.sha256("\0".join(map(str, (seed, *path))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def best_iteration(rows: Sequence[Row], config: AlternationConfig) -> int:
    """The iteration whose monitored metric is best, the earliest of several; without a metric the last.

    Raises:
        KeyError: if rows lack the metric.
    """
    if not config.monitor:
        return len(rows) - 1
    sign = 1.0 if config.mode == "max" else -1.0
    values = [sign * row[config.monitor] for row in rows]
    return max(range(len(values)), key=lambda i: (-math.inf if math.isnan(values[i]) else values[i], -i))


def _ended(rows: Sequence[Row], config: AlternationConfig) -> str:
    """Why no further iteration is to begin; empty if one is."""
    if not rows:
        return ""
    if rows[-1].get("stop"):
        return "stop"
    if config.patience is not None and len(rows) - 1 - best_iteration(rows, config) >= config.patience:
        return "patience"
    if config.max_hours is not None and sum(row["seconds"] for row in rows) > config.max_hours * 3600:
        return "max_hours"
    return ""


def _outcome(rows: list[Row], config: AlternationConfig, ended: str, history: History) -> Outcome:
    return Outcome(rows, best_iteration(rows, config), ended, history)


def _claim(directory: Path, loop: Loop, seed: int) -> None:
    """Make the directory this loop's own."""
    names = [[phase.name for phase in phases] for phases in (loop.start, loop.phases)]
    own = {"identity": loop.identity, "seed": seed, "phases": names}
    path = directory / "loop.json"
    if not path.is_file():
        write_json(path, own)
    held = _read(path)
    changed = [name for name in own if held.get(name) != own[name]]
    if changed:
        raise RunConflict(f"{directory}: holds another loop ({', '.join(changed)} differ); use another directory")


def _run_phase(phase: Phase, context: Context, pool: Pool) -> float:
    """Run a phase unless it is finished; the seconds it took."""
    path = context.directory / DONE
    if not path.is_file():
        context.directory.mkdir(parents=True, exist_ok=True)
        log.info("iteration %d: %s", context.iteration, phase.name)
        began = time.monotonic()
        if isinstance(phase, Sharded):
            facts, shards = _run_shards(phase, context, pool)
        else:
            facts, shards = phase.run(context), 0
        write_json(path, {"facts": facts, "shards": shards, "seconds": round(time.monotonic() - began, 3)})
    return _read(path)["seconds"]


def _run_shards(phase: Sharded, context: Context, pool: Pool) -> tuple[Row, int]:
    items = _inputs(phase, context)
    parts = [items[start : start + phase.size] for start in range(0, len(items), phase.size)]
    files = [context.directory / _shard_file(shard) for shard in range(len(parts))]
    missing = [shard for shard, file in enumerate(files) if not file.is_file()]
    if missing:
        tasks = [(shard, parts[shard], seed_of(context.seed, shard)) for shard in missing]
        logged = time.monotonic()
        for done, (shard, rows) in enumerate(pool.process(phase.worker(context), tasks), 1):
            write_jsonl(files[shard], rows)
            if time.monotonic() - logged > PROGRESS_S:
                logged = time.monotonic()
                log.info("%s: %d of %d shards", phase.name, len(files) - len(missing) + done, len(files))
    written = sum(len(read_jsonl(file)) for file in files)
    return {"items": len(items), "rows": written}, len(files)


def _inputs(phase: Sharded, context: Context) -> list[Row]:
    """The phase's items, as they were when it first began."""
    path = context.directory / INPUTS
    if not path.is_file():
        write_jsonl(path, phase.items(context))
    return read_jsonl(path)


def _shard_file(shard: int) -> str:
    return f"shard-{shard:05}.jsonl"


def _read(path: Path) -> Row:
    return json.loads(path.read_text(encoding="utf-8"))

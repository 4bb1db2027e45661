"""The vocabulary of experiments: the config every method shares, the Run directory, and the Report.

A run is a directory. Nothing outside it is written. Its fingerprint (config, data, base model) decides
whether the same command may go on with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from mobula import artifacts
from mobula.config import differences, digest, key, read_yaml, section, to_dict, to_yaml
from mobula.errors import RunConflict

Verdict = Literal["holds", "does_not_hold", "undecided"]
LOCK = ".lock"
SECRETS = ("token", "secret", "password", "api_key", "bearer")
PACKAGES = (
    "ray",
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "faiss-cpu",
    "omegaconf",
    "numpy",
    "bm25s",
)


@dataclass
class About:
    """What a reader should know before running a recipe. Not part of the fingerprint."""

    what: str = key("", "one sentence: what the recipe shows")
    minutes: float = key(0.0, "expected duration on 2 CPU cores, minutes", ge=0)
    memory_gb: float = key(0.0, "expected peak memory, GiB", ge=0)
    gpu_gb: float = key(0.0, "memory of a GPU, GiB; `mobula validate` holds pretrained models' trainings to it", ge=0)
    result: str = key("", "the result to expect, with its interval")


@dataclass
class ExperimentConfig:
    """Keys that every experiment has; a method's config extends it with its own sections."""

    method: str = key("", "key of the method, see `mobula methods`")
    name: str = key("experiment", "name of the experiment, shown in reports")
    seed: int = key(0, "seed of everything random", ge=0, le=2**32 - 1)
    about: About = section(About)


@dataclass(frozen=True)
class Measure:
    """A measured value with its 95 % interval over n units (queries unless the name says otherwise).

    ``seeds`` are the values seed by seed, where there are several.
    """

    value: float
    low: float
    high: float
    n: int
    seeds: list[float] | None = None


@dataclass(frozen=True)
class Claim:
    """A named comparison: its effect with a 95 % interval over n paired units, and what follows from it.

    ``p`` is the two-sided p-value of what is claimed, adjusted where it was one of a family.
    """

    name: str
    statement: str
    effect: float
    low: float
    high: float
    n: int
    verdict: Verdict
    p: float | None = None


@dataclass(frozen=True)
class DataFacts:
    """Which data a run really used."""

    name: str
    source: str
    sha256: str
    records: int


@dataclass
class Report:
    """The one format all methods write (report.json), with tables and plots for people beside it.

    ``tables`` maps a title to rows (the first row is the header); the first table is the headline, which a terminal
    shows. ``notes`` are sentences a reader must see; ``plots`` maps a file name to the data that
    :mod:`mobula.evaluation.report` draws.
    """

    method: str
    experiment: str
    seed: int
    config_hash: str
    data: list[DataFacts] = field(default_factory=list)
    measures: dict[str, Measure] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)
    tables: dict[str, list[list[Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    plots: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As written to report.json: without the fields that a measure or a claim does not have."""
        written = asdict(self)
        for row in (*written["measures"].values(), *written["claims"]):
            for name in ("seeds", "p"):
                if name in row and row[name] is None:
                    del row[name]
        return written


class Run:
    """A run directory: config, provenance, metrics, checkpoints, artifact and report.

    Use :meth:`open`. While it is open, a lock keeps a second process out.
    """

    def __init__(self, directory: Path, config: ExperimentConfig, cluster: Any = None) -> None:
        self.directory = directory
        self.config = config
        self.cluster = cluster
        self.config_hash = digest(identity(config))
        self.started = time.time()

    @property
    def id(self) -> str:
        """Identifies this run among all runs on a cluster (used as Ray's run name)."""
        return f"{self.config.method}-{digest([str(self.directory), self.config_hash])[:16]}"

    @property
    def artifact_directory(self) -> Path:
        """Where the run's artifact goes."""
        return self.directory / "artifact"

    @property
    def seconds(self) -> float:
        """Wall-clock seconds spent on this run, earlier interrupted attempts included."""
        return self._seconds_before() + time.time() - self.started

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, directory: Path, config: ExperimentConfig, *, resume: str = "auto", cluster: Any = None
    ) -> Iterator[Run]:
        """Open a run directory for writing. ``cluster`` is the :class:`mobula.cluster.spec.ClusterSpec`, if any.

        ``resume``: ``auto`` goes on with an unfinished run of the same config and starts an absent one,
        ``never`` wants an absent or empty directory, ``must`` wants an unfinished run.

        Raises:
            RunConflict: if the directory holds a finished run, another config, or is in use.
        """
        run = cls(directory.resolve(), config, cluster)
        try:
            run.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunConflict(f"{directory}: cannot create the run directory ({error.strerror})") from error
        with run._locked():
            run._check(resume)
            run._begin()
            try:
                yield run
            finally:
                run._write_state(finished=run.finished())

    def finished(self) -> bool:
        """Whether the run has written its report."""
        return (self.directory / "report.json").is_file()

    def bind(self, name: str, value: Any) -> None:
        """Make ``value`` (a hash of data, of a base model, another config) part of the fingerprint.

        Raises:
            RunConflict: if an earlier attempt of this run had another value.
        """
        path = self.directory / "fingerprint.json"
        bound = json.loads(path.read_text()) if path.is_file() else {}
        changed = differences({name: bound[name]}, {name: value}) if name in bound else []
        if changed:
            raise RunConflict(
                f"{self.directory}: {name} changed since this run began ({'; '.join(changed[:6])}); "
                "use another --out, or remove the directory"
            )
        artifacts.write_json(path, {**bound, name: value})

    def log(self, **metrics: Any) -> None:
        """Append a row to metrics.jsonl."""
        row = {"time": round(time.time(), 3), **metrics}
        with (self.directory / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, default=float) + "\n")

    def report(self) -> Report:
        """An empty report that names this run."""
        return Report(self.config.method, self.config.name, self.config.seed, self.config_hash)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.directory / LOCK).open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunConflict(f"{self.directory}: another process is writing this run") from error
            yield

    def _check(self, resume: str) -> None:
        before = self.directory / "config.yaml"
        if not before.is_file():
            if resume == "must":
                raise RunConflict(f"{self.directory}: no run to resume here (resume=must)")
            if resume == "never" and any(path.name != LOCK for path in self.directory.iterdir()):
                raise RunConflict(f"{self.directory}: not empty (resume=never); use another --out")
            return
        changed = differences(_strip(read_yaml(before)), identity(self.config))
        if changed:
            raise RunConflict(
                f"{self.directory}: holds a run of another config ({'; '.join(changed[:6])}); use another --out"
            )
        if self.finished():
            raise RunConflict(f"{self.directory}: this run is finished; see its report.md, or use another --out")
        if resume == "never":
            raise RunConflict(f"{self.directory}: holds an unfinished run (resume=never)")

    def _begin(self) -> None:
        artifacts.write_text(self.directory / "config.yaml", to_yaml(self.config))
        artifacts.write_json(self.directory / "provenance.json", provenance(self.config.seed))

    def _seconds_before(self) -> float:
        path = self.directory / "state.json"
        return json.loads(path.read_text())["seconds"] if path.is_file() else 0.0

    def _write_state(self, finished: bool) -> None:
        with contextlib.suppress(OSError):
            artifacts.write_json(self.directory / "state.json", {"seconds": self.seconds, "finished": finished})


def identity(config: ExperimentConfig) -> dict[str, Any]:
    """What of a config decides the result (all but ``about``)."""
    return _strip(to_dict(config))


def _strip(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "about"}


def provenance(seed: int) -> dict[str, Any]:
    """Versions, revision, seed and command line of this process, secrets redacted."""
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "revision": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "seed": seed,
        "argv": redact(sys.argv),
        "cores": os.cpu_count(),
    }


def redact(arguments: Sequence[str]) -> list[str]:
    """A command line with the values of secrets hidden, in ``key=value`` and in ``--key value``."""
    shown: list[str] = []
    for before, text in zip(["", *arguments], arguments, strict=False):
        name, separator, _ = text.partition("=")
        if separator and _is_secret(name):
            text = f"{name}=***"
        elif before.startswith("-") and "=" not in before and _is_secret(before):
            text = "***"
        shown.append(text)
    return shown


def _is_secret(name: str) -> bool:
    return any(word in name.lower().replace("-", "_") for word in SECRETS)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

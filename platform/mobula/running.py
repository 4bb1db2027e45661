"""What the commands and jobs/ do: run an experiment, a sweep, a deployment, a benchmark."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobula import environment, methods
from mobula.errors import ConfigError, ModelError
from mobula.experiment import Report, Run
from mobula.models import memory
from mobula.models.memory import Step
from mobula.study import StudyConfig

if TYPE_CHECKING:
    from mobula.cluster.spec import ClusterSpec
    from mobula.retrieval.stored_index import Manifest

BENCHMARKS = (
    "training", "startup", "decoding", "serving", "growth", "rollouts", "engines", "coverage", "retrieve_scale",
)  # fmt: skip


def run_experiment(
    experiment: Path,
    overrides: Sequence[str],
    out: Path | None = None,
    *,
    resume: str = "auto",
    cluster_file: Path | None = None,
) -> Report:
    """Run an experiment file into ``out`` (None: :func:`run_directory`); prints the report's headline.

    Raises:
        MobulaError: for anything the user can mend.
    """
    environment.driver_environment()
    from mobula import training
    from mobula.evaluation import report as reports

    config = methods.load_config(experiment, list(overrides))
    method = methods.get(config.method)
    cluster = find_cluster(cluster_file)
    with Run.open(out or run_directory(experiment, cluster), config, resume=resume, cluster=cluster) as run:
        with training.group(cluster, run.id):
            report = method.run(run)
        report.cost["wall_s"] = round(run.seconds, 3)
        reports.write(report, run.directory)
    reports.print_report(report)
    print(f"report: {run.directory / 'report.md'}, plots: {run.directory / 'plots'}")
    print(f"artifact: {run.artifact_directory}")
    return report


def validate_experiment(experiment: Path, cluster_file: Path | None = None) -> None:
    """Check an experiment file, and print what its trainings of a pretrained model take of each GPU.

    Raises:
        ConfigError: for what is wrong in it; also if a training has no room in ``about.gpu_gb``.
        ModelError: if the room of a model is asked for that is not at hand, and whose shape is not known.
    """
    config = methods.load_config(experiment)
    if not isinstance(config, StudyConfig):
        return
    cluster = find_cluster(cluster_file)
    workers = cluster.platform.train.workers if cluster else 1
    steps = [step.on(workers) for step in config.steps()]
    if steps:
        print_memory(steps, config, str(experiment))


def print_memory(steps: Sequence[Step], config: Any, source: str) -> None:
    """Print what trainings take of each GPU; raises as :func:`validate_experiment`."""
    from mobula.evaluation.report import print_table

    try:
        rows = memory.table(steps, config.model)
    except ModelError as error:
        if config.about.gpu_gb:
            raise
        print(f"memory of its trainings is not known: {error}")
        return
    print_table(f"{source}: {config.model.base}, {config.model.tuning}, GiB on each GPU", rows)
    too_large = list(memory.misfits(rows, config.about.gpu_gb)) if config.about.gpu_gb else []
    if too_large:
        raise ConfigError(too_large, source)


def run_sweep(
    space: Path,
    overrides: Sequence[str],
    out: Path | None = None,
    *,
    resume: str = "auto",
    cluster_file: Path | None = None,
) -> None:
    """Run the sweep of a space file into ``out`` (None: :func:`run_directory`); prints its table.

    Raises:
        MobulaError: for anything the user can mend.
    """
    environment.driver_environment()
    from mobula.tuning.sweep import sweep

    cluster = find_cluster(cluster_file)
    result = sweep(space, out or run_directory(space, cluster), overrides, cluster=cluster, resume=resume)
    report = result.directory.resolve() / "report.md"
    print(report.read_text(encoding="utf-8"))
    print(f"report: {report}")


def run_serve(
    apps: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    cluster_file: Path | None = None,
    host: str | None = None,
    port: int | None = None,
) -> None:
    """Deploy applications of the cluster file and keep them running until interrupted.

    Raises:
        MobulaError: for anything the user can mend.
    """
    environment.driver_environment()
    from mobula.serving import deploy

    spec = find_cluster(cluster_file)
    if spec is None:
        raise ConfigError(["no cluster file: give --cluster, or run where cluster.yaml is"], "serve")
    deploy.run(spec, apps, overrides, host=host, port=port)


def run_index(
    corpus: Path, out: Path, options: dict[str, Any], actors: int | None = None, cluster_file: Path | None = None
) -> Manifest:
    """Build the index of a corpus into ``out``; ``options`` of :class:`mobula.retrieval.build_index.BuildOptions`.

    Raises:
        MobulaError: for anything the user can mend.
    """
    environment.driver_environment()
    from mobula.cluster.pool import pool
    from mobula.rag.stored_search import build
    from mobula.retrieval.build_index import BuildOptions

    with pool(actors, find_cluster(cluster_file)) as workers:
        # Workers are elsewhere, so every path is absolute.
        return build(corpus.resolve(), out.resolve(), BuildOptions(**options), workers)


def run_directory(recipe: Path, cluster: ClusterSpec | None) -> Path:
    """Where a recipe's run goes if nobody says: the cluster's storage (``runs`` without a file), then its name."""
    storage = Path(cluster.platform.storage if cluster else "runs")
    if environment.in_job():
        # Ray removes a job's working directory after the job.
        storage = Path.home() / "mobula" / storage
    return storage / recipe.stem


def find_cluster(path: Path | None) -> ClusterSpec | None:
    """The cluster file that was named, or cluster.yaml of the current directory, or none.

    Raises:
        ConfigError: if the file is missing or wrong.
    """
    from mobula.cluster import spec

    if path is None and not spec.DEFAULT.is_file():
        return None
    return spec.load(path or spec.DEFAULT)


def run_benchmark(name: str) -> dict[str, Any]:
    """Run benchmarks/NAME.py of the checkout in the current directory.

    Raises:
        ConfigError: if there is no such benchmark.
    """
    if name not in BENCHMARKS:
        raise ConfigError([f"unknown benchmark {name!r}; expected one of {', '.join(BENCHMARKS)}"], "benchmark")
    if not Path("benchmarks", f"{name}.py").is_file():
        raise ConfigError([f"no benchmarks/{name}.py in {Path.cwd()}; run this in a checkout of Mobula"], "benchmark")
    environment.driver_environment()
    sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(f"benchmarks.{name}").run()

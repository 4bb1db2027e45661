"""The `mobula` command: help everywhere, and one clear line with exit status 2 for what a person can mend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from mobula import artifacts
from mobula.cli import Commands, main
from mobula.methods import METHODS

ROOT = Path(__file__).parents[1]
SMOKE = str(ROOT / "jobs" / "diffugr" / "smoke.yaml")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def refused(message: str, *arguments: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def commands(group: click.Group = main, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*prefix, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*prefix, name))


@pytest.fixture
def experiment(tmp_path: Path) -> str:
    path = tmp_path / "x.yaml"
    path.write_text("method: diffugr\ndata: {name: functions}\ndocid: {levels: 4, codes: 16}\n")
    return str(path)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    directory = tmp_path / "artifact"
    fill = lambda folder: (folder / "notes.txt").write_text("text")  # noqa: E731
    artifacts.write(directory, kind="retriever", method="diffugr", meta={"levels": 4}, fill=fill)
    return directory


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) > 4


@pytest.mark.parametrize("command", ["show", "validate"])
def test_bad_experiments_are_refused(command: str, tmp_path: Path) -> None:
    refused("absent.yaml: cannot read the file (FileNotFoundError)", command, str(tmp_path / "absent.yaml"))
    path = tmp_path / "x.yaml"
    path.write_text("method: difugr\n")
    refused("unknown method 'difugr' (did you mean diffugr?)", command, str(path))
    path.write_text("method: diffugr\ntrainig: {lr: 1}\nseed: -1\n")
    refused("unknown key trainig (did you mean training?); seed=-1: must be at least 0", command, str(path))
    path.write_text("method: diffugr\ndecode: {steps: 9}\n")
    refused("StepsAboveLength: steps=9 but codes have 8 positions", command, str(path))
    path.write_text("method: diffugr\narms: [diffusion/qr]\n")
    refused("unknown 'qr'", command, str(path))


def test_validate_goes_through_all_files(experiment: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("seed: 1\n")
    result = invoke("validate", str(tmp_path / "bad.yaml"), experiment, str(tmp_path / "absent.yaml"))
    assert result.exit_code == 2
    assert result.stdout == f"{experiment}: valid\n"
    assert len(result.stderr.splitlines()) == 2


def test_run_refuses_before_it_leaves_anything(experiment: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    refused("absent.yaml", "run", str(tmp_path / "absent.yaml"), "--out", out)
    refused("unknown key training.rl", "run", experiment, "training.rl=1", "--out", out)
    refused("cluster", "run", experiment, "--out", out, "--cluster", str(tmp_path / "absent-cluster.yaml"))
    assert not Path(out).exists()


def test_run_refuses_what_the_evaluation_could_not_do(experiment: str, tmp_path: Path) -> None:
    refused(
        "decode does not go with evaluation.steps", "run", experiment, "decode.block=2", "--out", str(tmp_path / "o")
    )
    remask = "decode does not go with evaluation.remask"  # the recipe does not say which; the default has low_conf
    refused(remask, "run", experiment, "decode.order=margin", "--out", str(tmp_path / "q"))
    arms = "arms=[autoregressive/rq]"
    refused(
        "the first arm is the main one and must be diffusion", "run", experiment, arms, "--out", str(tmp_path / "p")
    )


def test_a_missing_data_set_says_where_it_was_looked_for(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOBULA_DATA", raising=False)
    refused("scifact", "run", experiment, "data.name=scifact", "--out", str(tmp_path / "out"))
    refused("name=files needs a folder", "run", experiment, "data.name=files", "--out", str(tmp_path / "out2"))


def test_an_index_is_refused_that_is_none_or_has_no_vectors_for_its_options(tmp_path: Path) -> None:
    refused(f"{tmp_path}: not an index (no index.json)", "index", "info", str(tmp_path))
    refused("c.jsonl: cannot read", "index", "build", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "i"))
    result = invoke("index", "build", "c.jsonl", "--out", str(tmp_path / "i"), "--faiss", "ivf")
    assert result.exit_code == 2 and "--encoder and --faiss are for vectors" in result.stderr


def test_an_output_that_is_a_file_is_refused(experiment: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused("cannot create the run directory", "run", experiment, "--out", str(tmp_path / "file"))


def test_artifacts_are_shown_and_verified(artifact: Path) -> None:
    assert "retriever of method diffugr" in invoke("artifact", "inspect", str(artifact)).stdout
    assert invoke("artifact", "verify", str(artifact)).stdout == f"{artifact}: 1 files match the manifest\n"
    (artifact / "notes.txt").write_text("texT")
    for command in ("inspect", "verify"):
        refused("notes.txt: checksum differs from the manifest", "artifact", command, str(artifact))
        refused("not an artifact", "artifact", command, str(artifact.parent))


def test_data_sets_are_listed() -> None:
    result = invoke("data", "list")
    assert result.exit_code == 0, result.output
    assert "scifact" in result.stdout
    assert "bfcl-eval" in result.stdout


def test_methods_as_json() -> None:
    rows = json.loads(invoke("methods", "--json").stdout)
    assert rows.keys() == METHODS.keys()
    assert rows["diffugr"]["area"] == "retrieval"


def test_show_prints_a_config_that_loads_as_itself(experiment: str, tmp_path: Path) -> None:
    first = invoke("show", experiment, "training.lr=1e-3")
    again = tmp_path / "again.yaml"
    again.write_text(first.stdout)
    assert "lr: 0.001" in first.stdout
    assert invoke("show", str(again)).stdout == first.stdout


def test_show_lists_every_key(experiment: str) -> None:
    text = invoke("show", experiment, "--help-keys").stdout
    assert "training.lr" in text
    assert "peak learning rate" in text


def test_other_commands_refuse_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("unknown benchmark 'speed'", "benchmark", "speed")
    monkeypatch.chdir(tmp_path)
    refused("run this in a checkout", "benchmark", "training")
    refused("no cluster file", "serve", "retriever")
    refused("cluster.yaml", "cluster", "validate")
    refused("name='nonsense'", "data", "prepare", "nonsense", "--out", str(tmp_path / "d"))
    refused("absent.yaml", "sweep", str(tmp_path / "absent.yaml"), "--out", str(tmp_path / "s"))


def test_interrupting_is_no_traceback() -> None:
    group = Commands("g")

    @group.command()
    def wait() -> None:
        raise KeyboardInterrupt

    result = CliRunner().invoke(group, ["wait"])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")

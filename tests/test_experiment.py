"""The Run directory: who may go on with it, what it remembers, what it keeps secret."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mobula.config import key
from mobula.errors import RunConflict
from mobula.evaluation import report as reports
from mobula.experiment import About, ExperimentConfig, Measure, Run, redact


@dataclass
class Config(ExperimentConfig):
    rate: float = key(1e-5, "a rate")


CONFIG = Config(method="diffugr", name="toy")


def finish(directory: Path, config: Config = CONFIG) -> None:
    with Run.open(directory, config) as run:
        report = run.report()
        report.measures["x"] = Measure(0.5, 0.4, 0.6, 10)
        reports.write(report, run.directory)


def start(directory: Path, config: Config = CONFIG) -> None:
    with pytest.raises(KeyboardInterrupt), Run.open(directory, config) as run:
        run.log(step=1)
        raise KeyboardInterrupt


def refused(directory: Path, message: str, config: Config = CONFIG, resume: str = "auto") -> None:
    with pytest.raises(RunConflict, match=message), Run.open(directory, config, resume=resume):
        pass


def test_a_run_leaves_config_provenance_metrics_and_state(tmp_path: Path) -> None:
    finish(tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "provenance.json", "state.json", "report.json", "report.md"} <= names
    facts = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert facts["seed"] == 0
    assert facts["versions"]["torch"]
    assert json.loads((tmp_path / "run" / "state.json").read_text())["finished"] is True


def test_auto_starts_an_absent_run_and_goes_on_with_an_unfinished_one(tmp_path: Path) -> None:
    start(tmp_path)
    with Run.open(tmp_path, CONFIG) as run:
        run.log(step=2)
        assert not run.finished()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


def test_never_wants_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    refused(tmp_path / "other", r"not empty \(resume=never\)", resume="never")
    start(tmp_path / "run")
    refused(tmp_path / "run", r"holds an unfinished run \(resume=never\)", resume="never")
    with Run.open(tmp_path / "fresh", CONFIG, resume="never"):
        pass


def test_must_wants_an_unfinished_run(tmp_path: Path) -> None:
    refused(tmp_path, r"no run to resume here \(resume=must\)", resume="must")
    start(tmp_path)
    with Run.open(tmp_path, CONFIG, resume="must"):
        pass


@pytest.mark.parametrize("resume", ["auto", "never", "must"])
def test_a_finished_run_refuses_and_says_so(tmp_path: Path, resume: str) -> None:
    finish(tmp_path)
    refused(tmp_path, "this run is finished; see its report.md", resume=resume)


def test_another_config_is_refused_naming_the_keys(tmp_path: Path) -> None:
    start(tmp_path)
    refused(tmp_path, r"another config \(rate: 1e-05 -> 0.1; seed: 0 -> 1\)", replace(CONFIG, rate=0.1, seed=1))


def test_what_is_said_about_a_recipe_does_not_decide_its_result(tmp_path: Path) -> None:
    start(tmp_path)
    with Run.open(tmp_path, replace(CONFIG, about=About(what="other words", minutes=9))):
        pass


def test_changed_data_is_refused(tmp_path: Path) -> None:
    with Run.open(tmp_path, CONFIG) as run:
        run.bind("data", "abc")
        run.bind("encoder", {"name": "x", "hash": 1})
    with Run.open(tmp_path, CONFIG) as run:
        run.bind("data", "abc")
        with pytest.raises(RunConflict, match=r"encoder changed since this run began \(encoder.hash: 1 -> 2\)"):
            run.bind("encoder", {"name": "x", "hash": 2})
        with pytest.raises(RunConflict, match=r"data changed since this run began \(data: abc -> xyz\)"):
            run.bind("data", "xyz")


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mobula.experiment import ExperimentConfig, Run\n"
        "with Run.open(Path(sys.argv[1]), ExperimentConfig(method='diffugr', name='toy')): pass"
    )
    with Run.open(tmp_path, ExperimentConfig(method="diffugr", name="toy")):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
        assert "another process is writing this run" in done.stderr
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_seconds_of_interrupted_attempts_are_counted(tmp_path: Path) -> None:
    start(tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**state, "seconds": 100.0}))
    with Run.open(tmp_path, CONFIG) as run:
        assert 100 < run.seconds < 160
    assert json.loads((tmp_path / "state.json").read_text())["seconds"] > 100


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "cannot create the run directory")


def test_s10_secrets_do_not_reach_the_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hunter2"
    monkeypatch.setattr(
        sys, "argv", ["mobula", f"--api-key={secret}", "--token", secret, f"HF_TOKEN={secret}", f"db.password={secret}"]
    )
    start(tmp_path)
    assert all(secret not in path.read_text() for path in tmp_path.iterdir())


def test_redaction_spares_what_is_no_secret() -> None:
    arguments = ["run", "x.yaml", "--out", "d", "training.lr=1", "token=a=b", "--token", "t", "--token=t", "tail"]
    assert redact(arguments) == [
        "run", "x.yaml", "--out", "d", "training.lr=1", "token=***", "--token", "***", "--token=***", "tail",
    ]  # fmt: skip


def test_the_id_depends_on_directory_and_config(tmp_path: Path) -> None:
    ids = {
        Run(tmp_path / "a", CONFIG).id,
        Run(tmp_path / "b", CONFIG).id,
        Run(tmp_path / "a", replace(CONFIG, seed=1)).id,
    }
    assert len(ids) == 3
    assert all(id.startswith("diffugr-") and id.replace("-", "").isalnum() for id in ids)

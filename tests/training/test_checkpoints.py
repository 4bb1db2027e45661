"""Checkpoints and weights: damage, interruption, full and read-only storage."""

from __future__ import annotations

import dataclasses
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_task import ByteTask
from torch import Tensor, nn

from mobula.errors import ArtifactError, TrainingError
from mobula.training import FitResult, TrainingConfig, fit, load_weights
from mobula.training.checkpoints import export_weights, newest_state
from mobula.training.loop import read_metrics

CONFIG = TrainingConfig(steps=6, batch=4, lr=1e-2, report_every=1, checkpoint_every=2, keep=3, workers=0)


class Stopped(Exception):
    """Ends a training from inside."""


class StopsAt(ByteTask):
    """Ends when the batch after ``step`` steps is drawn."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        if self.left == 0:
            raise Stopped
        self.left -= 1
        return super().batch(indices, generator)


def train(directory: Path, task: ByteTask | None = None, **changes) -> FitResult:
    return fit(task or ByteTask(), dataclasses.replace(CONFIG, **changes), directory, seed=5, name="test")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    return train(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    with pytest.raises(Stopped):
        train(tmp_path, StopsAt(5))
    assert names(tmp_path) == ["step-000000002", "step-000000004"]
    return tmp_path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def losses(result: FitResult) -> list[float]:
    return [row["loss"] for row in read_metrics(result.history) if "loss" in row]


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(bytes(data))


def state_files(directory: Path, step: int) -> list[Path]:
    folder = directory / "checkpoints" / f"step-{step:09d}"
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "checkpoint.json"]


def test_f9_a_flipped_bit_is_found_before_anything_is_unpickled(interrupted: Path) -> None:
    canary = interrupted / "executed"

    class Hostile:
        def __reduce__(self):
            return (os.mknod, (str(canary),))

    states = [path for path in state_files(interrupted, 4) if path.suffix == ".pt"]
    torch.save({"module": Hostile()}, states[0], pickle_module=pickle)
    with pytest.raises(ArtifactError, match=r"step-000000004: .* is damaged .* resume from step-000000002"):
        train(interrupted)
    assert not canary.exists()


def test_f9_every_file_of_a_checkpoint_is_covered(interrupted: Path) -> None:
    for path in state_files(interrupted, 4):
        before = path.read_bytes()
        flip(path)
        with pytest.raises(ArtifactError, match="damaged"):
            newest_state(interrupted)
        path.write_bytes(before)
    (interrupted / "checkpoints" / "step-000000004" / "extra.pt").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="list of files"):
        newest_state(interrupted)


def test_after_removing_a_damaged_checkpoint_the_previous_one_gives_the_same_result(
    interrupted: Path, whole: FitResult
) -> None:
    for path in state_files(interrupted, 4):
        path.unlink()
    with pytest.raises(ArtifactError):
        train(interrupted)
    (interrupted / "checkpoints" / "step-000000004" / "checkpoint.json").unlink()
    for path in sorted((interrupted / "checkpoints" / "step-000000004").rglob("*"), reverse=True):
        path.rmdir()
    (interrupted / "checkpoints" / "step-000000004").rmdir()
    result = train(interrupted)
    assert losses(result) == losses(whole)
    assert result.weights.read_bytes() == whole.weights.read_bytes()


DIES_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from mobula.training import checkpoints
from test_checkpoints import train

commit = checkpoints.commit_state
def dies(directory, step, facts, keep):
    if step == 4:
        files = sorted(checkpoints.partial_state(directory, step).rglob("*.pt"))
        os.truncate(files[-1], files[-1].stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    commit(directory, step, facts, keep)
checkpoints.commit_state = dies
train(Path(sys.argv[1]))
"""


def test_f2_a_kill_while_a_checkpoint_is_written_leaves_the_previous_one(tmp_path: Path, whole: FitResult) -> None:
    done = run_python(DIES_WHILE_SAVING, str(tmp_path))
    assert done.returncode == -signal.SIGKILL
    assert names(tmp_path) == ["step-000000002", "step-000000004.partial"]
    found = newest_state(tmp_path)
    assert found is not None and found[1]["step"] == 2
    result = train(tmp_path)
    assert losses(result) == losses(whole)
    assert result.weights.read_bytes() == whole.weights.read_bytes()


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parents[1] / "platform"), str(here)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


def test_f5_storage_that_fills_up_is_a_clear_error_and_corrupts_nothing(tmp_path: Path, whole: FitResult) -> None:
    """A limit on the size of a file stands for a full disk: the kernel refuses the write in the same way."""
    with pytest.raises(Stopped):
        train(tmp_path, StopsAt(3))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limit[1]))
    try:
        with pytest.raises(TrainingError, match=r"cannot write .*mend the storage"):
            train(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    found = newest_state(tmp_path)
    assert found is not None and found[1]["step"] == 2
    result = train(tmp_path)
    assert losses(result) == losses(whole)
    assert result.weights.read_bytes() == whole.weights.read_bytes()


def test_f5_a_directory_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"file/run.*: cannot write \(.*Not a directory"):
        train(tmp_path / "file" / "run")


def test_f5_read_only_storage_is_a_clear_error() -> None:
    with pytest.raises(TrainingError, match=r"cannot write"):
        train(Path("/proc/mobula-run"))


def test_only_the_newest_states_are_kept(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(tmp_path, StopsAt(5), checkpoint_every=1, keep=2)
    assert names(tmp_path) == ["step-000000004", "step-000000005"]


def test_weights_of_another_shape_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    export_weights(path, nn.Linear(3, 2).state_dict())
    with pytest.raises(ArtifactError, match="does not fit the model"):
        load_weights(nn.Linear(3, 4), path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match="cannot read the weights"):
        load_weights(nn.Linear(3, 2), path)
    with pytest.raises(ArtifactError, match="cannot read the weights"):
        load_weights(nn.Linear(3, 2), tmp_path / "absent.safetensors")


def test_an_interrupted_export_leaves_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    export_weights(path, {"a": torch.zeros(2)})
    before = path.read_bytes()
    monkeypatch.setattr("mobula.training.checkpoints._compare", lambda *_: (_ for _ in ()).throw(OSError("differs")))
    with pytest.raises(TrainingError, match="differs"):
        export_weights(path, {"a": torch.ones(2)})
    assert path.read_bytes() == before

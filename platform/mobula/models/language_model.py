"""What is asked of a language model, whatever computes it: continuations of token ids, and log-probabilities of them.

Prompts and targets are token ids that are put together as they are, so that no boundary can move. Scores and samples
of a text do not depend on what is beside it in the batch (up to the rounding of float sums), and a sample depends on
its own seed alone. :class:`mobula.models.causal.CausalModel` computes with PyTorch, and is what is trained;
:class:`mobula.models.vllm_engine.VllmModel` with vLLM. :func:`mobula.models.engines.open_model` chooses.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mobula.config import key
from mobula.errors import ModelError
from mobula.models.turns import end_of_turn

TORCH, VLLM, AUTO = "torch", "vllm", "auto"


@dataclass
class EngineConfig:
    """Who samples and scores with a pretrained model; a section of a config. All but ``kind`` is for vLLM."""

    kind: str = key(AUTO, "torch; vllm; auto: vllm on GPUs where it is installed", choices=(AUTO, TORCH, VLLM))
    dtype: str = key("float32", "numbers that vLLM computes with", choices=("float32", "bfloat16", "float16"))
    context: int | None = key(None, "most tokens of a prompt and what follows it; null: as the model has", ge=16)
    cache_gb: float = key(1.0, "GiB for keys and values of prompts and continuations, in each actor", gt=0)
    tensor_parallel: int = key(1, "devices that share one engine", ge=1)

    @property
    def chosen(self) -> str:
        """The engine, ``auto`` resolved on this machine."""
        if self.kind != AUTO:
            return self.kind
        # On CPUs vLLM takes a multiple of PyTorch's time under an adapter: docs/engines.md.
        return VLLM if vllm_installed() and torch.cuda.is_available() else TORCH


def vllm_installed() -> bool:
    """Whether vLLM can be imported."""
    return importlib.util.find_spec("vllm") is not None


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn. Temperature 0 is greedy; ``top_p`` cuts the unlikely tail (nucleus sampling)."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    @property
    def exact(self) -> bool:
        """Whether tokens are drawn from the model's own distribution."""
        return self.temperature == 1 and self.top_p == 1


@dataclass(frozen=True)
class Continuation:
    """Sampled token ids without EOS, and log p of each under the model as it is (temperature 1), EOS last if drawn.

    ``log_q``: the same under the distribution that they were drawn from, by temperature and nucleus; zeros if greedy.
    ``ended``: EOS was drawn; otherwise ``max_tokens`` were used up, or another token ended it, which is left out.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    log_q: tuple[float, ...]
    ended: bool


class LanguageModel(ABC):
    """A tokenizer, and what continues its tokens.

    ``eos`` ends a turn by the tokenizer's chat template, or a text where there is none; sampling stops at it and at
    ``stops``, what ends a text otherwise: ``ends``, as a generation config has them.

    Raises:
        ModelError: if the tokenizer has no end of sequence.
    """

    def __init__(self, tokenizer: Any, name: str, ends: int | Sequence[int] | None = None) -> None:
        self.tokenizer = tokenizer
        self.name = name
        if tokenizer.eos_token_id is None:
            raise ModelError(f"model {name!r}: its tokenizer has no end-of-sequence token")
        end = end_of_turn(tokenizer)
        self.eos: int = tokenizer.eos_token_id if end is None else end
        others = ends if isinstance(ends, Sequence) else () if ends is None else (ends,)
        self.stops = frozenset({self.eos, tokenizer.eos_token_id, *others})
        self.pad: int = self.eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids, no special tokens added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    @abstractmethod
    def log_probs(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], batch_tokens: int = 8192
    ) -> list[Tensor]:
        """log p f32[n] of every target token after its prompt and the target tokens before it.

        ``batch_tokens`` bounds the padded size of a batch, where the caller makes the batches.

        Raises:
            ValueError: for an empty prompt, after which there is nothing to predict from.
        """

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        batch: int = 64,
        memory: list[Any] | None = None,
    ) -> list[Continuation]:
        """One continuation of every prompt, drawn with its own seed, at most ``batch`` at a time.

        ``memory``: by prompt, what an earlier call left there for the tokens that its prompt began with, or None; this
        call leaves what it has computed of its own prompts. Who remembers by itself, or cannot, ignores it.
        """

    def continuation(self, tokens: list[int], scores: list[tuple[float, float]]) -> Continuation:
        """What was drawn, with (log p, log q) of each token, up to one that stops or the most tokens."""
        ended = tokens[-1] == self.eos
        if not ended and tokens[-1] in self.stops:
            tokens, scores = tokens[:-1], scores[:-1]
        log_probs, log_q = zip(*scores, strict=True) if scores else ((), ())
        return Continuation(tuple(tokens[:-1] if ended else tokens), log_probs, log_q, ended)


def require_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Check that there is something to predict from.

    Raises:
        ValueError: for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("a prompt has no token")

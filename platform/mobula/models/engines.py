"""Which engine samples from a language model and scores with it: PyTorch, or vLLM.

What is trained here from nothing has an architecture that vLLM does not know, so engines are chosen for pretrained
models and adapters on them alone.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from mobula.config import key
from mobula.errors import ModelError
from mobula.models.causal import CausalModel
from mobula.models.language_model import LanguageModel

TORCH, VLLM, AUTO = "torch", "vllm", "auto"


@dataclass
class EngineConfig:
    """Who samples and scores with a pretrained model; a section of a config. All but ``kind`` is for vLLM."""

    kind: str = key(AUTO, "torch; vllm; auto: vllm where it is installed", choices=(AUTO, TORCH, VLLM))
    dtype: str = key("float32", "numbers that vLLM computes with", choices=("float32", "bfloat16", "float16"))
    context: int | None = key(None, "most tokens of a prompt and what follows it; null: as the model has", ge=16)
    cache_gb: float = key(1.0, "GiB for keys and values of prompts and continuations, in each actor", gt=0)
    tensor_parallel: int = key(1, "devices that share one engine", ge=1)

    @property
    def chosen(self) -> str:
        """The engine, ``auto`` resolved on this machine."""
        if self.kind != AUTO:
            return self.kind
        return VLLM if vllm_installed() else TORCH


def vllm_installed() -> bool:
    """Whether vLLM can be imported."""
    return importlib.util.find_spec("vllm") is not None


def open_model(folder: str, engine: EngineConfig | None = None) -> LanguageModel:
    """A model to sample from and to score with, as :meth:`CausalModel.open` finds it, on the device of this process.

    ``engine``: who computes; None: PyTorch.

    Raises:
        ModelError: as :meth:`CausalModel.open`; for vLLM also if it is not installed, or refuses the model.
    """
    if engine is None or engine.chosen == TORCH:
        return CausalModel.open(folder).placed()
    if not vllm_installed():
        raise ModelError("engine.kind=vllm: vLLM is not installed; `make setup` installs it, or take engine.kind=torch")
    from mobula.models.vllm_engine import VllmModel

    return VllmModel.open(folder, engine)

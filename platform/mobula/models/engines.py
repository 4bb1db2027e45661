"""Which engine samples from a language model and scores with it: PyTorch, or vLLM.

What is trained here from nothing has an architecture that vLLM does not know, so engines are chosen for pretrained
models and adapters on them alone.
"""

from __future__ import annotations

from mobula.errors import ModelError
from mobula.models.causal import CausalModel
from mobula.models.language_model import TORCH, EngineConfig, LanguageModel, vllm_installed


def by_torch(engine: EngineConfig | None) -> bool:
    """Whether PyTorch computes on this machine; None: it does in any case."""
    return engine is None or engine.chosen == TORCH


def open_model(folder: str, engine: EngineConfig | None = None) -> LanguageModel:
    """A model to sample from and to score with, as :meth:`CausalModel.open` finds it, on the device of this process.

    ``engine``: who computes; None: PyTorch.

    Raises:
        ModelError: as :meth:`CausalModel.open`; for vLLM also if it is not installed, or refuses the model.
    """
    if engine is None or by_torch(engine):
        return CausalModel.open(folder).placed()
    if not vllm_installed():
        raise ModelError("engine.kind=vllm: vLLM is not installed; `make setup` installs it, or take engine.kind=torch")
    from mobula.models.vllm_engine import VllmModel

    return VllmModel.open(folder, engine)

"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv 2106.09685): y = W x + (alpha / r) B A x with W frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mobula.errors import ModelError


class LoraLinear(nn.Linear):
    """A linear layer that keeps its frozen weight and learns ``lora_a`` f32[r, in] and ``lora_b`` f32[out, r].

    B starts at zero, so that the layer starts as the frozen one. It stays a linear layer with ``weight`` and
    ``bias``, which some networks look at.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        _add_low_rank(self, linear.in_features, linear.out_features, rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        """The frozen layer's output plus the low-rank part's."""
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


class LoraConv1D(Conv1D):
    """The same of GPT-2's linear layer, whose weight is f32[in, out]."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float

    def __init__(self, linear: Conv1D, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.nf, self.nx = linear.nf, linear.nx
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        _add_low_rank(self, linear.nx, linear.nf, rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        """The frozen layer's output plus the low-rank part's."""
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def _add_low_rank(layer: Any, inputs: int, outputs: int, rank: int, alpha: float) -> None:
    layer.scale = alpha / rank
    layer.lora_a = nn.Parameter(torch.empty(rank, inputs))
    layer.lora_b = nn.Parameter(torch.zeros(outputs, rank))
    nn.init.kaiming_uniform_(layer.lora_a, a=math.sqrt(5))


# By the exact class of a linear layer: its class with LoRA.
ADAPTED: dict[type, type] = {nn.Linear: LoraLinear, Conv1D: LoraConv1D}


def add_lora(*networks: nn.Module, rank: int, alpha: float) -> None:
    """Freeze networks and put LoRA on every linear layer in them (``nn.Linear`` and GPT-2's ``Conv1D``).

    Raises:
        ModelError: if there is none in any of them.
    """
    for network in networks:
        network.requires_grad_(False)
    layers = [
        (module, name, child)
        for network in networks
        for module in list(network.modules())
        for name, child in module.named_children()
        if type(child) in ADAPTED
    ]
    if not layers:
        kinds = ", ".join(type(network).__name__ for network in networks)
        raise ModelError(f"{kinds} has no linear layer for LoRA; choose another model")
    for module, name, child in layers:
        setattr(module, name, ADAPTED[type(child)](child, rank, alpha))


@torch.no_grad()
def merge_lora(network: nn.Module) -> None:
    """Add every low-rank part to its frozen weight and leave plain linear layers: W + (alpha / r) B A."""
    plain = {adapted: linear for linear, adapted in ADAPTED.items()}
    for module in network.modules():
        if type(module) in plain:
            layer: Any = module
            low_rank = layer.scale * layer.lora_b @ layer.lora_a
            layer.weight += low_rank.T if isinstance(layer, Conv1D) else low_rank
            del layer.lora_a, layer.lora_b
            layer.__class__ = plain[type(module)]


def leave_out_frozen(module: nn.Module) -> None:
    """Leave a module's frozen weights out of its ``state_dict``, and let such a state be loaded.

    Call it when it is settled what is trained; frozen weights are read from the base model again.
    """
    frozen = [name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad]
    module.register_state_dict_post_hook(_Leave(frozen))
    module.register_load_state_dict_post_hook(_Expect(frozen))


@dataclass
class _Leave:
    """Takes frozen weights out of a ``state_dict``."""

    frozen: list[str]

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in self.frozen:
            state.pop(prefix + name, None)


@dataclass
class _Expect:
    """Lets a ``state_dict`` without the frozen weights be loaded; the model may be part of a larger module."""

    frozen: list[str]

    def __call__(self, module: nn.Module, keys: Any) -> None:
        known = set(self.frozen)
        keys.missing_keys[:] = [key for key in keys.missing_keys if not _endings(key) & known]


def _endings(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}

"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv 2106.09685): y = W x + (alpha / r) B A x with W frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoraLinear(nn.Linear):
    """A linear layer that keeps its frozen weight and learns ``lora_a`` f32[r, in] and ``lora_b`` f32[out, r].

    B starts at zero, so that the layer starts as the frozen one. It stays a linear layer with ``weight`` and
    ``bias``, which some networks look at.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """The frozen layer's output plus the low-rank part's."""
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(network: nn.Module, rank: int, alpha: float) -> None:
    """Freeze a network and put LoRA on every linear layer in it."""
    network.requires_grad_(False)
    found = [
        (module, name, child)
        for module in list(network.modules())
        for name, child in module.named_children()
        if type(child) is nn.Linear
    ]
    for module, name, child in found:
        setattr(module, name, LoraLinear(child, rank, alpha))


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

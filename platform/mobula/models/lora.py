"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv 2106.09685): y = W x + (alpha / r) B A x with W frozen."""

from __future__ import annotations

import math

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

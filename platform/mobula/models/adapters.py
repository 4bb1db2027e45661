"""LoRA (Hu et al. 2021, arXiv 2106.09685) by the peft library: y = W x + (alpha / r) B A x with W frozen.

Layers are put into a network in place, which keeps its class and its paths. An adapter's folder is what PEFT writes,
and ``base.json`` beside it: the name of the model under it, and the hash of that model's files.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from mobula.artifacts import write_json
from mobula.config import key
from mobula.errors import ModelError
from mobula.models.encoders import read_json
from mobula.models.pretrained import PACKAGES, Pretrained

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
FORMER = "adapter.json"  # of adapters before PEFT's
ALL_LINEAR = "all-linear"
NAME = "default"  # PEFT's name of an adapter in a network
PREFIX = "base_model.model."  # PEFT's, before the names of weights in its files


@dataclass
class LoraConfig:
    """Low-rank adaptation of a pretrained model; a section of a config."""

    rank: int = key(16, "rank r of LoRA on a pretrained model", ge=1, le=4096)
    alpha: float = key(32.0, "weight alpha of LoRA, which is scaled by alpha / r", gt=0)
    targets: Any = key(ALL_LINEAR, "all-linear: every linear layer but the output layer; or a list of names, [q_proj]")

    def problems(self) -> list[str]:
        """What is wrong with the form of ``targets``; a network says whether it has them."""
        names = self.targets
        if names == ALL_LINEAR or (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
            return []
        return [f"targets={names!r}: expected {ALL_LINEAR} or a list of names of linear layers, [q_proj, v_proj]"]


@dataclass(frozen=True)
class Base:
    """The model under an adapter: ``name`` as the user gave it, and the hash of its files."""

    name: str
    hash: str


def add_lora(*networks: nn.Module, lora: LoraConfig) -> None:
    """Freeze networks and put LoRA on the linear layers in them that ``targets`` names, drawn from torch's generator.

    Raises:
        ModelError: if one of ``targets`` names no linear layer of any of them.
    """
    layers = [_linear_layers(network) for network in networks]
    _require_targets(lora.targets, [name for names in layers for name in names], networks)
    for network, names in zip(networks, layers, strict=True):
        network.requires_grad_(False)
        every = lora.targets == ALL_LINEAR
        own = names if every else [target for target in lora.targets if any(_ends(name, target) for name in names)]
        if own:
            _inject(network, lora, ALL_LINEAR if every else own)


def save_adapter(network: nn.Module, folder: Path, base: Base) -> None:
    """Write the adapter that is in a network."""
    from peft import get_peft_model_state_dict

    adapted: Any = network
    weights = get_peft_model_state_dict(network, save_embedding_layers=False)
    write_adapter(folder, adapted.peft_config[NAME], weights, base)


def write_adapter(folder: Path, config: Any, weights: dict[str, Any], base: Base) -> None:
    """Write an adapter's files, the same bytes for the same adapter; ``config`` is PEFT's."""
    folder.mkdir(parents=True, exist_ok=True)
    written = copy.copy(config)
    written.inference_mode = True
    # A set in PEFT's hands, whose order differs from process to process.
    written.target_modules = sorted(config.target_modules)
    # A package's name means nothing to PEFT.
    written.base_model_name_or_path = None if base.name in PACKAGES else base.name
    written.save_pretrained(str(folder))
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / BASE, asdict(base))


def read_base(folder: Path) -> Base | None:
    """The model under the adapter in a folder; None if no adapter is there.

    Raises:
        ModelError: if it is of the former form, does not name its model, or that model's files are others.
    """
    if (folder / FORMER).is_file():
        raise ModelError(
            f"{folder}: an adapter of the form before PEFT's; convert it: `mobula artifact convert {folder} OUT`"
        )
    if not (folder / CONFIG).is_file():
        return None
    if not (folder / BASE).is_file():
        raise ModelError(f'{folder}: has no {BASE}, which names the model under it: {{"name": ..., "hash": ...}}')
    base = Base(**read_json(folder / BASE))
    if Pretrained.find(base.name).hash != base.hash:
        raise ModelError(f"{folder}: was trained on other files of {base.name!r} than those that are here")
    return base


def load_adapter(network: nn.Module, folder: Path) -> None:
    """Put the adapter in a folder on a network.

    Raises:
        ModelError: if it does not fit.
    """
    from peft import LoraConfig as PeftConfig
    from peft import set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    network.requires_grad_(False)
    try:
        _put(network, config)
        weights = load_file(folder / WEIGHTS)
        loaded: Any = set_peft_model_state_dict(network, weights)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{folder}: does not fit {type(network).__name__} ({reason})") from error
    layers = {name for name, p in network.named_parameters() if p.requires_grad}
    if loaded.unexpected_keys or len(layers) != len(weights):
        raise ModelError(f"{folder}: {WEIGHTS} has not the weights of the layers that {CONFIG} names")


def _inject(network: nn.Module, lora: LoraConfig, targets: str | Sequence[str]) -> None:
    from peft import LoraConfig as PeftConfig

    modules = targets if isinstance(targets, str) else list(targets)
    _put(network, PeftConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=modules, task_type="CAUSAL_LM"))  # type: ignore[arg-type]


def _put(network: nn.Module, config: Any) -> None:
    """Put PEFT's layers into a network, and mark what stays frozen as a base's."""
    from peft import inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in network.modules())
    inject_adapter_in_model(config, network, NAME)
    for parameter in network.parameters():
        parameter.is_base = not parameter.requires_grad  # type: ignore[attr-defined]


def _linear_layers(network: nn.Module) -> list[str]:
    """The names of linear layers, GPT-2's too, but of the output layer."""
    from transformers.pytorch_utils import Conv1D

    own: Any = network
    output = own.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    modules = network.named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear | Conv1D) and module is not output]


def _require_targets(targets: Any, layers: Sequence[str], networks: Sequence[nn.Module]) -> None:
    kinds = ", ".join(type(network).__name__ for network in networks)
    if not layers:
        raise ModelError(f"{kinds} has no linear layer for LoRA; set model.finetune=true or choose another model")
    named = [] if targets == ALL_LINEAR else targets
    if missing := [target for target in named if not any(_ends(name, target) for name in layers)]:
        known = sorted({name.rsplit(".", 1)[-1] for name in layers})
        raise ModelError(
            f"model.lora.targets: {kinds} has no linear layer {', '.join(missing)}; it has {', '.join(known)}"
        )


def _ends(name: str, target: str) -> bool:
    """Whether a layer is meant by a target, as PEFT reads it: its whole name, or the end of it."""
    return name == target or name.endswith(f".{target}")

"""Frozen weights stay out of a module's state: they are read from the model that was trained on again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


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

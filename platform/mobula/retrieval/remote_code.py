"""Networks whose published code was written for transformers 4 (LLaDA, Dream, MDLM), opened under transformers 5.

The code comes with the weights and is not changed. What it relies on and no longer finds is made good here:

===============================================================  ==================================================
what fails under transformers 5                                  what stands in for it
===============================================================  ==================================================
``from_pretrained``: no ``all_tied_weights_keys`` (LLaDA, MDLM),  :func:`load_published` builds the class and fills in
``tie_weights`` takes no ``missing_keys`` (LLaDA), tables of      its weights by name, all of them or none
rotary frequencies left undefined (Dream)
``config.use_cache`` is gone (LLaDA)                              set to False
``ROPE_INIT_FUNCTIONS["default"]`` is gone (Dream)                :func:`default_rope`
attention that takes no mask (LLaDA, MDLM)                        :class:`PaddingMask`
token ids alone go in (MDLM)                                      :class:`MDLM`
``flash_attn``, which needs a GPU and takes no mask (MDLM)        :func:`flash_attention`, exact
===============================================================  ==================================================

All of this can go once the models are published for transformers 5 and their revisions in
:data:`mobula.models.pretrained.REVISIONS` are moved there.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mobula.errors import ModelError
from mobula.models.pretrained import Pretrained


class PaddingMask(TorchFunctionMode):
    """Within the block, attention that is called without a mask leaves out padding: mask bool[R, S] is False there.

    LLaDA's own code passes no mask to ``scaled_dot_product_attention``, whatever it is given (ML-GSAI/LLaDA#90).
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask[:, None, None, :]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, attention with the mask."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            kwargs = {**kwargs, "attn_mask": self.mask}
        return func(*args, **kwargs)


class MDLM(nn.Module):
    """MDLM's published network behind the interface of a language model of transformers."""

    def __init__(self, published: Any) -> None:
        super().__init__()
        self.published = published
        table = published.backbone.vocab_embed.embedding
        self.embedding = nn.Embedding(table.shape[0], table.shape[1], _weight=table)
        published.backbone.vocab_embed = nn.Identity()  # what goes in as ids is embedded already

    def get_input_embeddings(self) -> nn.Module:
        """The layer that embeds token ids."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The layer that makes logits of the last states."""
        return self.published.backbone.output_layer.linear

    def set_output_embeddings(self, layer: nn.Module) -> None:
        """Put another layer in its place."""
        self.published.backbone.output_layer.linear = layer

    def forward(self, inputs_embeds: Tensor) -> Any:
        """The output for embedded sequences [R, S, d]; this model was trained without regard to the time."""
        times = inputs_embeds.new_zeros(len(inputs_embeds))
        return self.published(input_ids=inputs_embeds, timesteps=times, return_dict=True)


def load_published(base: Pretrained, loader: str) -> nn.Module:
    """The network of ``base`` in fp32 on CPU, by its own code for the transformers class ``loader``.

    Raises:
        ModelError: naming the model, if its code fails or its weights are not those of its network.
    """
    import transformers.modeling_utils  # noqa: F401 (looks for flash_attn, which must not be the stand-in)
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    with base.named_failures(f"its network for {loader}"):
        config = base.config()
        config.use_cache = False
        reference = config.auto_map[loader]
        with entries(sys.modules, flash_attn_modules() if config.model_type == "mdlm" else {}):
            network_class = get_class_from_dynamic_module(reference, str(base.folder), local_files_only=True)
        with entries(ROPE_INIT_FUNCTIONS, {"default": default_rope}):
            network = network_class(config).eval()  # as from_pretrained gives it
        _fill(network, base)
    return MDLM(network) if config.model_type == "mdlm" else network


@torch.no_grad()
def _fill(network: nn.Module, base: Pretrained) -> None:
    """Copy the weights of ``base``'s safetensors files into a network, one by one: two copies need not fit."""
    expected, found = network.state_dict(), set()
    for path in sorted(base.folder.glob("*.safetensors")):
        with safe_open(path, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118
                found.add(name)
                if name in expected and stream.get_slice(name).get_shape() == list(expected[name].shape):
                    expected.pop(name).copy_(stream.get_tensor(name))
    unknown = found - set(network.state_dict())
    if expected or unknown:
        names = ", ".join(sorted([*expected, *unknown])[:3])
        raise ModelError(
            f"model {base.name!r}: the weights in {base.folder} are not those of {type(network).__name__} "
            f"({len(expected)} missing or of another shape, {len(unknown)} unknown: {names}, ...); "
            "fetch the folder anew, weights and code of one revision"
        )


@contextlib.contextmanager
def entries(table: dict[str, Any], stand_ins: dict[str, Any]) -> Iterator[None]:
    """Within the block, ``table`` has these entries; others read it too, so afterwards it is as it was."""
    before = {name: table[name] for name in stand_ins if name in table}
    table.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del table[name]
        table.update(before)


def default_rope(config: Any, device: Any = None, **_: Any) -> tuple[Tensor, float]:
    """Inverse frequencies f32[d/2] of plain rotary embeddings for heads of size d, and the scaling of attention, 1."""
    size = config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    return config.rope_theta**-exponents, 1.0


# What MDLM calls of flash_attn


def flash_attn_modules() -> dict[str, ModuleType]:
    """The modules of ``flash_attn`` by name, with the two functions below."""
    names = ("flash_attn", "flash_attn.layers", "flash_attn.layers.rotary", "flash_attn.flash_attn_interface")
    package, layers, rotary, interface = modules = [ModuleType(name) for name in names]
    rotary.apply_rotary_emb_qkv_ = rotate  # type: ignore[attr-defined]
    interface.flash_attn_varlen_qkvpacked_func = flash_attention  # type: ignore[attr-defined]
    package.layers, layers.rotary, package.flash_attn_interface = layers, rotary, interface  # type: ignore[attr-defined]
    return dict(zip(names, modules, strict=True))


def flash_attention(qkv: Tensor, starts: Tensor, length: int, dropout: float, causal: bool) -> Tensor:
    """Attention [R*S, h, d] of packed queries, keys and values [R*S, 3, h, d]; all sequences have ``length`` S."""
    q, k, v = qkv.unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    return attended.transpose(1, 2).flatten(0, 1)


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the queries and keys in qkv [R, S, 3, h, d] by the angles of cos and sin [S, d/2]."""
    cos, sin = cos[:, None, None, :], sin[:, None, None, :]
    first, second = qkv[:, :, :2].chunk(2, -1)
    rotated = torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
    return torch.cat([rotated, qkv[:, :, 2:]], 2)

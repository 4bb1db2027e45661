"""The blocks of a causal language model: where they are, reading and changing their states, running those above one.

A state is a block's output, the residual stream h_l f[d] after layer l (from 0) at a (row, position) of a forward
pass; with a cache, positions count from that pass's first token. Everything here is a context manager that leaves
the model as it was, also after an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mobula.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """Where the parts of a block are: ``blocks`` in the network, the others in a block.

    ``mlp_out`` is the MLP's second linear layer, ``attention_out`` the attention's output projection. ``conv1d``: their
    weights are [in, out] instead of [out, in]. ``tuples``: a block returns a tuple whose first element is the state.
    """

    blocks: str
    mlp_out: str
    attention_out: str
    conv1d: bool = False
    tuples: bool = False


_LLAMA = Architecture("model.layers", "mlp.down_proj", "self_attn.o_proj")
# By the ``model_type`` of transformers.
ARCHITECTURES = {
    "gpt2": Architecture("transformer.h", "mlp.c_proj", "attn.c_proj", conv1d=True),
    "gptj": Architecture("transformer.h", "mlp.fc_out", "attn.out_proj", tuples=True),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def architecture(network: nn.Module) -> Architecture:
    """The architecture of a causal language model of transformers.

    Raises:
        ModelError: if it is not in ``ARCHITECTURES``.
    """
    kind = getattr(getattr(network, "config", None), "model_type", type(network).__name__)
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"blocks of architecture {kind!r} are not known (known: {', '.join(ARCHITECTURES)}); add it to "
            "mobula.models.blocks.ARCHITECTURES: the paths of its blocks, of the MLP's second linear layer and of the "
            "attention's output projection"
        )
    return ARCHITECTURES[kind]


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks, lowest first; raises as :func:`architecture`."""
    return list(network.get_submodule(architecture(network).blocks).children())


def block(network: nn.Module, layer: int) -> nn.Module:
    """The block of a layer, from 0.

    Raises:
        ModelError: as :func:`architecture`, or if there is no such layer.
    """
    layers = blocks(network)
    if not 0 <= layer < len(layers):
        raise ModelError(f"layer {layer}: the model has layers 0 to {len(layers) - 1}")
    return layers[layer]


def mlp_out(network: nn.Module, layer: int) -> nn.Module:
    """The second linear layer of a layer's MLP; raises as :func:`block`."""
    return block(network, layer).get_submodule(architecture(network).mlp_out)


def attention_out(network: nn.Module, layer: int) -> nn.Module:
    """The output projection of a layer's attention; raises as :func:`block`."""
    return block(network, layer).get_submodule(architecture(network).attention_out)


def projection_weight(network: nn.Module, projection: nn.Module) -> Tensor:
    """The weight f[out, in] of a layer's projection, a view: what is written into it in place, the model uses."""
    weight: Any = projection.weight
    return weight.T if architecture(network).conv1d else weight


@contextmanager
def capture(network: nn.Module, layers: list[int], rows: Tensor, positions: Tensor) -> Iterator[dict[int, Tensor]]:
    """States f[K, d] by layer at K places, ``rows`` and ``positions`` i64[K], of the latest forward pass.

    They carry gradients, where there are any. Raises as :func:`block`.
    """
    states: dict[int, Tensor] = {}

    def keeps(layer: int) -> Callable[[Tensor], None]:
        def keep(hidden: Tensor) -> None:
            states[layer] = hidden[rows.to(hidden.device), positions.to(hidden.device)]

        return keep

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_after(block(network, layer), keeps(layer)))
        yield states


@contextmanager
def replace(network: nn.Module, layer: int, rows: Tensor, positions: Tensor, states: Tensor) -> Iterator[None]:
    """Put ``states`` f[K, d] where a layer's are, at K different places; raises as :func:`block`."""
    with _after(block(network, layer), _put(rows, positions, states, accumulate=False)):
        yield


@contextmanager
def add(network: nn.Module, layer: int, rows: Tensor, positions: Tensor, states: Tensor) -> Iterator[None]:
    """Add ``states`` f[K, d] to a layer's at K places; raises as :func:`block`."""
    with _after(block(network, layer), _put(rows, positions, states, accumulate=True)):
        yield


@contextmanager
def only_above(network: nn.Module, layer: int, states: Tensor) -> Iterator[None]:
    """Forward passes run only the layers above ``layer``, whose output is taken to be ``states`` f[B, n, d].

    The network is called as ever, with the same ids, masks and positions (``inputs_embeds=states`` will do in place of
    ids), and without a cache: positions, rotary embeddings and the causal mask are its own. Raises as :func:`block`.
    """
    block(network, layer)
    tuples = architecture(network).tuples

    def skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, None) if tuples else hidden_states

    def given(*args: Any, **kwargs: Any) -> Any:
        return (states, None) if tuples else states

    below = blocks(network)[: layer + 1]
    with ExitStack() as stack:
        for module in below:
            stack.enter_context(_forward(module, given if module is below[-1] else skip))
        yield


def _put(rows: Tensor, positions: Tensor, states: Tensor, *, accumulate: bool) -> Callable[[Tensor], Tensor]:
    def put(hidden: Tensor) -> Tensor:
        index = (rows.to(hidden.device), positions.to(hidden.device))
        return hidden.index_put(index, states.to(hidden), accumulate=accumulate)

    return put


@contextmanager
def _after(module: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``change`` with the state that a block returns; what it returns, if anything, takes the state's place."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        whole = isinstance(output, tuple)
        changed = change(output[0] if whole else output)
        if changed is None:
            return None
        return (changed, *output[1:]) if whole else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward pass."""
    before = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before  # type: ignore[method-assign]

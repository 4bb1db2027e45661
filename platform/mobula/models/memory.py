"""What training a language model takes of each GPU, known before anything is loaded.

Weights, gradients and optimizer states are counted; activations are those that a forward pass keeps for its gradients,
in which tensors have shapes and no memory. Layers are alike, so two of them tell of all.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from mobula.errors import ModelError
from mobula.models.adapters import add_lora
from mobula.models.blocks import blocks
from mobula.models.finetune import BaseModelConfig, logits_rows
from mobula.models.pretrained import Pretrained
from mobula.training import TrainingConfig
from mobula.training.engine import hold_base_in_bf16

FP32, GIB = 4, 2**30
# Of a logit in fp32: its log-softmax, kept, and the gradients of that and of itself.
OF_A_LOGIT = 3 * FP32
# The models of the recipes that are not at hand on every machine, by id: model type, and what their config.json says.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen/Qwen2.5-7B-Instruct": (
        "qwen2",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
    )
}


@dataclass(frozen=True)
class Step:
    """A training's largest micro-batch: rows, tokens of each, and how many of a row are learned."""

    name: str
    training: TrainingConfig
    rows: int
    tokens: int
    learned: int

    def on(self, workers: int) -> Step:
        """The same where the training leaves the number of its workers to the cluster."""
        if self.training.workers is not None:
            return self
        training = replace(self.training, workers=workers)
        return replace(self, training=training, rows=self.rows * training.micro // self.training.micro)


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU.

    ``optimizer``: AdamW's two moments, and from ZeRO-1 on the weights that it steps. ``activations``: what the forward
    pass keeps; ``layer``: what one layer keeps while it runs again under gradient checkpointing. ``peak``: the most at
    a time, which is where the logits are, or where the last gradients are made.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    layer: int
    logits: int
    peak: int


@dataclass(frozen=True)
class _Counted:
    """Bytes of the frozen weights, and the number of trained ones."""

    frozen: int
    trained: int

    @property
    def bytes(self) -> int:
        """Of all weights; trained ones are in fp32."""
        return self.frozen + self.trained * FP32


def shape_of(base: str) -> Any:
    """The transformers config of a pretrained model, of ``SHAPES`` if the model is not at hand.

    Raises:
        ModelError: if it is neither.
    """
    from transformers import AutoConfig

    try:
        return Pretrained.find(base).config()
    except ModelError:
        if base not in SHAPES:
            raise
        kind, values = SHAPES[base]
        return AutoConfig.for_model(kind, **values)


def of_step(shape: Any, model: BaseModelConfig, step: Step) -> Memory:
    """The memory of a training's step under DeepSpeed.

    ``shape``: the transformers config of the base model; ``training.world`` GPUs share what its ZeRO stage shares.
    """
    training, layers = step.training, shape.num_hidden_layers
    one, two = (_Measured.of(_with_layers(shape, number), model, step) for number in (1, 2))
    counted = _Counted(
        one.counted.frozen + (layers - 1) * (two.counted.frozen - one.counted.frozen),
        one.counted.trained + (layers - 1) * (two.counted.trained - one.counted.trained),
    )
    weights, gradients, optimizer = _states(counted, training.zero, training.world)
    if training.zero == 3:  # a layer in use is whole, and so is the next one, which is being fetched
        weights += 2 * (two.counted.bytes - one.counted.bytes)
    layer = two.activations - one.activations
    around, again = one.activations - layer, training.gradient_checkpointing
    activations = around + layers * (two.between if again else layer)
    rows = min(step.rows * step.learned, logits_rows(shape.vocab_size))
    logits = rows * shape.vocab_size * OF_A_LOGIT
    accumulated = gradients if training.accumulation > 1 else 0
    peak = weights + optimizer + max(activations + logits + accumulated, around + layer + gradients)
    return Memory(weights, gradients, optimizer, activations, layer if again else 0, logits, peak)


def table(steps: Iterable[Step], model: BaseModelConfig) -> list[list[Any]]:
    """GiB on each GPU by training, the first row being the header.

    Raises:
        ModelError: if the model is not at hand, and its shape is not known.
    """
    shape = shape_of(model.base)
    rows: list[list[Any]] = [["training", "GPUs", "ZeRO", "rows x tokens", *(field.name for field in fields(Memory))]]
    for step in steps:
        memory = astuple(of_step(shape, model, step))
        size = f"{step.rows} x {step.tokens}"
        rows.append([step.name, step.training.world, step.training.zero, size, *(round(b / GIB, 2) for b in memory)])
    return rows


def misfits(rows: Sequence[Sequence[Any]], gpu_gb: float) -> Iterator[str]:
    """The trainings of a :func:`table` that a GPU of so many GiB has no room for, and what to do."""
    for name, *_, peak in rows[1:]:
        if peak > gpu_gb:
            yield (
                f"{name} takes {peak:g} GiB of about.gpu_gb={gpu_gb:g}: "
                "take a smaller micro_batch, gradient_checkpointing=true, LoRA or a higher zero"
            )


def _states(counted: _Counted, zero: int, world: int) -> tuple[int, int, int]:
    """Weights, gradients and optimizer states of a rank, in bytes."""
    trained = counted.trained * FP32

    def share(whole: int, stage: int) -> int:
        return math.ceil(whole / world) if zero >= stage else whole

    masters = share(trained, 1) if zero else 0
    return share(counted.frozen + trained, 3), share(trained, 2), share(2 * trained, 1) + masters


@dataclass(frozen=True)
class _Measured:
    """A network of few layers: its weights, what its forward pass keeps, and the states that its last layer takes."""

    counted: _Counted
    activations: int
    between: int

    @classmethod
    def of(cls, shape: Any, model: BaseModelConfig, step: Step) -> _Measured:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from transformers import AutoModelForCausalLM

        bf16 = step.training.precision == "bf16"
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).train()
            if not model.finetune:
                add_lora(network, lora=model.lora)
        if bf16:
            hold_base_in_bf16(network)
        with FakeTensorMode():
            _materialise(network)
            ids = torch.zeros(step.rows, step.tokens, dtype=torch.long)
            # Rows are padded, so attention takes a mask, here one whose values nobody asks for.
            mask = torch.ones(step.rows, 1, step.tokens, step.tokens, dtype=torch.bool)
            between: list[int] = []
            blocks(network)[-1].register_forward_pre_hook(lambda module, inputs: between.append(inputs[0].nbytes))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16), _kept(network) as kept:
                network.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            return cls(_count(network), sum(kept.values()), between[0])


def _materialise(network: nn.Module) -> None:
    """Give a network on the meta device, on which nothing is cast for mixed precision, weights of this mode's kind."""
    made: dict[int, Tensor] = {}  # tied weights are one
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = None if parameter is None else made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def _kept(network: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes by storage of what is kept for gradients within the block, the network's own weights left out."""
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in found:
            found[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # so that no other storage gets its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def _count(network: nn.Module) -> _Counted:
    parameters = list(network.parameters())
    return _Counted(
        sum(p.nbytes for p in parameters if not p.requires_grad), sum(p.numel() for p in parameters if p.requires_grad)
    )


def _with_layers(shape: Any, layers: int) -> Any:
    changed = copy.deepcopy(shape)
    changed.num_hidden_layers = layers
    if getattr(changed, "layer_types", None):
        changed.layer_types = changed.layer_types[:layers]
    return changed

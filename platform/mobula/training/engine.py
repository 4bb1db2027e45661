"""A model under DeepSpeed: the one place that knows DeepSpeed's keys and ways.

On CPU nothing is compiled: the optimizer is torch's AdamW, and collectives are plain gloo.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mobula.environment import in_process_environment
from mobula.errors import TrainingError
from mobula.training.combine import LossGradients, Scale, scaled, surrogate, total
from mobula.training.config import TrainingConfig
from mobula.training.task import Task

TAG = "deepspeed"
# What the loop and the combination of losses log themselves.
LOGGED = ("step", "loss", "lr", "grad_norm", "examples", "examples_per_s", "conflicts", "cosine")
# DeepSpeed reserves a bucket of this many elements, however small the model is.
LARGEST_BUCKET = 500_000_000

Extras = dict[str, Tensor | float]


class Engine:
    """One rank's share of a model in training. Every method is called on all ranks together.

    Raises:
        TrainingError: the task's model has a parameter that DeepSpeed cannot handle, or cannot run its layers again.
    """

    def __init__(self, task: Task, config: TrainingConfig, device: torch.device) -> None:
        deepspeed = _import(device)
        self.task = task
        self.config = config
        self.device = device
        self.model = self._prepared(task.build()).to(device)
        _require_dimensions(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            _groups(trained, config.weight_decay), lr=config.lr, betas=(config.betas[0], config.betas[1])
        )
        self._parameters = trained
        self._zero_norm = torch.zeros(())
        self._gradients = LossGradients(trained) if config.combine == "pcgrad" else None
        settings = _settings(config, sum(p.numel() for p in trained), overlap=device.type == "cuda")
        self._engine, *_ = deepspeed.initialize(
            model=_Differentiated(self.model), optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        if config.zero == 0 and config.world == 1:
            # Alone, a rank has nothing to average; DeepSpeed would still copy all gradients into a bucket and back.
            self._engine.enable_backward_allreduce = False

    def _prepared(self, model: nn.Module) -> nn.Module:
        if self.config.precision == "bf16":
            hold_base_in_bf16(model)
        if self.config.gradient_checkpointing:
            _run_layers_again(model)
        return model

    def backward(self, batch: dict[str, Tensor], scale: Scale) -> tuple[Tensor, Extras]:
        """Forward and backward pass of a micro-batch, its losses multiplied by ``scale``.

        Returns the loss (scalar, detached) and further values, named losses among them; all are scaled likewise.
        """
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        if self._gradients is None:
            loss, extras = self._engine(self._loss, batch, scale)
            self._engine.backward(loss)
            return loss.detach(), extras
        with self._autocast():
            losses, extras = self._losses(batch, scale)
        self._gradients.add(losses, 1 / self.config.accumulation)
        return total(losses).detach(), extras

    def step(self, lr: float, *, boundary: bool, seed: int) -> tuple[Tensor, Extras]:
        """Count a micro-batch and, at the ``boundary`` of accumulation, update the weights.

        ``seed`` is for what combines the gradients of named losses at random. Returns the norm of the gradient before
        clipping (scalar), zero between boundaries, and what there is to log about the combination.
        """
        norm = self._zero_norm
        extras: Extras = {}
        if self._gradients is not None:
            if not boundary:
                return norm, extras
            extras = self._backward_combined(self._gradients, seed)
        if boundary:
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            if self.config.zero == 0:
                # At stage 0 DeepSpeed's own clipping is slower than torch's and keeps the norm to itself.
                norm = nn.utils.clip_grad_norm_(self._parameters, self.config.clip or float("inf"))
        self._engine.step()
        if boundary and self.config.zero > 0:
            norm = torch.as_tensor(self._engine.get_global_grad_norm() or 0.0).detach()
        return norm, extras

    def _backward_combined(self, gradients: LossGradients, seed: int) -> Extras:
        """Hand DeepSpeed the combined gradient in the one way that every stage but the third takes: as a loss."""
        combined, extras = gradients.combine(seed)
        self._engine.backward(self._engine(surrogate, self._parameters, combined))
        return extras

    def _loss(self, batch: dict[str, Tensor], scale: Scale) -> tuple[Tensor, Extras]:
        losses, extras = self._losses(batch, scale)
        loss = total(losses)
        # A micro-batch that weighs nothing still takes part in every rank's backward pass.
        return loss if loss.requires_grad else loss + self._nothing(), extras

    def _nothing(self) -> Tensor:
        """A zero that the weights' gradients reach.

        Raises:
            TrainingError: under ZeRO-3, where a rank does not hold whole weights.
        """
        if self.config.zero == 3:
            raise TrainingError("a micro-batch has nothing to learn from; under zero=3 use a larger micro_batch")
        return 0.0 * self._parameters[0].sum()

    def _losses(self, batch: dict[str, Tensor], scale: Scale) -> tuple[dict[str, Tensor], Extras]:
        """The task's losses by name and further values to log, all scaled."""
        loss, values = self.task.loss(self.model, batch)
        losses = scaled(loss, scale)
        if not isinstance(scale, dict):
            values = {name: value * scale if scale else 0.0 for name, value in values.items()}
        named = {} if isinstance(loss, Tensor) else losses
        _require_free(values, named)
        # Only the loss is differentiated; DeepSpeed would hook every other output that carries a gradient.
        return losses, {n: v.detach() if isinstance(v, Tensor) else v for n, v in {**values, **named}.items()}

    def evaluate(self) -> dict[str, float]:
        """The task's dev metrics."""
        with self._evaluating():
            return {name: float(value) for name, value in self.task.evaluate(self.model).items()}

    def reference(self) -> dict[str, Tensor]:
        """The task's reference values under the model as it is, on CPU."""
        with self._evaluating():
            return {name: value.cpu() for name, value in self.task.reference(self.model).items()}

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        self._engine.eval()
        try:
            with torch.no_grad(), self._autocast():
                yield
        finally:
            self._engine.train()

    def train(self) -> None:
        """Enter training mode."""
        self._engine.train()

    def save(self, folder: Path) -> None:
        """Write this rank's part of weights and optimizer state; returns when all ranks have."""
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote. It is unpickled: verify the folder first."""
        self._engine.load_checkpoint(str(folder), tag=TAG)

    def weights(self) -> dict[str, Tensor]:
        """All weights and buffers of the task's model, gathered; empty on ranks other than 0 under ZeRO-3."""
        if self.config.zero < 3:
            return self.model.state_dict(keep_vars=True)
        return self._gathered()

    def close(self) -> None:
        """Let go of the model and its hooks."""
        self._engine.destroy()

    def _gathered(self) -> dict[str, Tensor]:
        import deepspeed

        # A tied weight has several names and is copied once, so that its names still share memory.
        copies: dict[int, Tensor] = {}
        named = self.model.state_dict(keep_vars=True)
        for tensor in named.values():
            parts = [tensor] if hasattr(tensor, "ds_id") else []
            with deepspeed.zero.GatheredParameters(parts):
                if dist.get_rank() == 0 and id(tensor) not in copies:
                    copies[id(tensor)] = tensor.detach().cpu().clone()
        return {name: copies[id(tensor)] for name, tensor in named.items() if id(tensor) in copies}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")


class _Differentiated(nn.Module):
    """The model in a module whose forward pass is a function's: all that is differentiated runs inside DeepSpeed's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *inputs: Any) -> Any:
        return function(*inputs)


def _require_free(values: Mapping[str, object], losses: Mapping[str, object]) -> None:
    """Names of logged values are not taken twice, nor those that every row has.

    Raises:
        TrainingError: naming those that are.
    """
    taken = [name for name in (*values, *losses) if name in LOGGED or (name in values and name in losses)]
    if taken:
        raise TrainingError(f"the task logs {', '.join(dict.fromkeys(taken))}: a name that another value of a row has")


def join_process_group() -> None:
    """Make a group of this process alone, unless Ray Train has made one.

    It stays until the process ends: DeepSpeed keeps groups derived from it for the next engine.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _import(device: torch.device) -> Any:
    """Import DeepSpeed so that it neither compiles nor chats."""
    in_process_environment(gpu=device.type == "cuda")
    import deepspeed
    import deepspeed.ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has replaced; torch says so at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # Otherwise every start loads a C++ all-reduce through shared memory, which takes minutes to compile the
        # first time, and asks gcc which other ops it could build. There is no public switch (DeepSpeed 0.19);
        # tests fail when an upgrade moves this one.
        deepspeed.ops.__compatible_ops__ = dict.fromkeys(ALL_OPS, False)
    return deepspeed


def hold_base_in_bf16(model: nn.Module) -> None:
    """Matrices of a frozen base, which compute in bf16 in any case; a network may want its few vectors in fp32."""
    for parameter in model.parameters():
        if getattr(parameter, "is_base", False) and not parameter.requires_grad and parameter.ndim > 1:
            parameter.data = parameter.data.to(torch.bfloat16)


def _run_layers_again(model: Any) -> None:
    """Switch transformers' gradient checkpointing on."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise TrainingError(
            f"gradient_checkpointing=true: {type(model).__name__} cannot run its layers again; set it to false"
        )
    model.activation_checkpointing_enable({"use_reentrant": False})


def _require_dimensions(model: nn.Module) -> None:
    """DeepSpeed broadcasts parameters as bytes, and torch has no such view of a tensor without dimensions."""
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise TrainingError(
            f"{', '.join(scalars)}: DeepSpeed cannot train a parameter without dimensions; give it the shape [1]"
        )


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, vectors do not; a parameter's ``lr_scale`` is its share of the learning rate."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in sorted(parameters, key=lambda p: p.ndim <= 1):
        groups.setdefault((getattr(parameter, "lr_scale", 1.0), parameter.ndim > 1), []).append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay if is_matrix else 0.0, "lr_scale": scale}
        for (scale, is_matrix), members in groups.items()
    ]


def _settings(config: TrainingConfig, elements: int, *, overlap: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for ``elements`` trained weights."""
    bucket = min(LARGEST_BUCKET, max(1, elements))
    zero: dict[str, Any] = {"stage": config.zero, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if config.zero > 0:
        zero["overlap_comm"] = overlap
    return {
        "train_micro_batch_size_per_gpu": config.micro,
        # Combined gradients have been accumulated before DeepSpeed sees them.
        "gradient_accumulation_steps": config.accumulation if config.combine == "sum" else 1,
        "gradient_clipping": config.clip if config.zero else 0.0,
        "zero_optimization": zero,
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }

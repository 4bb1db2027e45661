"""Memory of a training step by arithmetic, against that of a step of a small model."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from mobula import methods
from mobula.cli import main
from mobula.models import memory
from mobula.models.adapters import LoraConfig
from mobula.models.causal import CausalModel, word_tokenizer
from mobula.models.finetune import BaseModelConfig
from mobula.models.memory import Memory, Step
from mobula.models.sft import SftTask, write_pairs
from mobula.training import TrainingConfig
from mobula.training.engine import Engine, join_process_group

ROOT = Path(__file__).parents[2]
SHAPE = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 4000, "max_position_embeddings": 512,
}  # fmt: skip
ROWS, GIVEN, LEARNED = 2, 192, 64


class Peak(TorchDispatchMode):
    """The most bytes that tensors have at a time, of those it has seen."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in tensors:
            self.see(tensor)

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.live:
            return
        self.live[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, storage._cdata)

    def gone(self, storage: int) -> None:
        self.now -= self.live.pop(storage)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights, large enough for its activations to count."""
    folder = tmp_path_factory.mktemp("memory") / "base"
    tokenizer = word_tokenizer(["one two three"])
    config = LlamaConfig(**SHAPE, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    CausalModel(AutoModelForCausalLM.from_config(config), tokenizer, "base").save(folder)
    return folder


def measured(model: BaseModelConfig, training: TrainingConfig, folder: Path) -> int:
    """Bytes at the peak of the second of two steps of the training loop's own engine."""
    start, pairs = folder / "start", folder / "pairs.jsonl"
    model.start(0).save(start)
    write_pairs(pairs, [([7] * GIVEN, [8] * LEARNED)] * ROWS)
    join_process_group()
    engine = Engine(SftTask(start, pairs), training, torch.device("cpu"))
    engine.train()
    batch = engine.task.batch(torch.arange(ROWS), torch.Generator())
    with Peak([*engine.model.parameters(), *engine.model.buffers()]) as peak:
        for _ in range(2):
            peak.peak = peak.now
            engine.backward(batch, 1.0)
            engine.step(1e-3, boundary=True, seed=0)
    engine.close()
    return peak.peak


@pytest.mark.parametrize("again", [False, True], ids=["kept", "run_again"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("finetune", [False, True], ids=["lora", "whole"])
def test_it_is_what_a_step_takes(base: Path, tmp_path: Path, finetune: bool, precision: str, again: bool) -> None:
    model = BaseModelConfig(base=str(base), finetune=finetune, lora=LoraConfig(rank=8))
    training = TrainingConfig(batch=ROWS, workers=0, precision=precision, gradient_checkpointing=again)
    step = Step("sft", training, ROWS, GIVEN + LEARNED, LEARNED)
    expected = memory.of_step(memory.shape_of(model.base), model, step).peak
    assert expected == pytest.approx(measured(model, training, tmp_path), rel=0.15)


def of(**changes: Any) -> Memory:
    training = TrainingConfig(batch=8, workers=8, **changes)
    step = Step("fit", training, 1, 64, 16)
    return memory.of_step(Qwen2Config(**SHAPE), BaseModelConfig(base="x", finetune=True), step)


def test_every_stage_shares_what_it_says() -> None:
    alone, optimizer, gradients, all_states = (of(zero=stage) for stage in range(4))
    weights = sum(p.nbytes for p in AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE)).parameters())
    assert (alone.weights, alone.gradients, alone.optimizer) == (weights, weights, 2 * weights)
    # From the first stage on the optimizer steps a copy of the weights, its own share.
    assert optimizer == Memory(weights, weights, 3 * weights // 8, *list(vars(alone).values())[3:6], optimizer.peak)
    assert (gradients.weights, gradients.gradients) == (weights, weights // 8)
    assert weights // 8 < all_states.weights < weights
    assert alone.peak > optimizer.peak > gradients.peak > all_states.peak


def test_accumulated_gradients_are_there_beside_the_logits() -> None:
    assert of(micro_batch=1).peak == of().peak  # one forward pass each
    training = TrainingConfig(batch=16, micro_batch=1, workers=8)
    step = Step("fit", training, 1, 64, 16)
    accumulated = memory.of_step(Qwen2Config(**SHAPE), BaseModelConfig(base="x", finetune=True), step)
    assert accumulated.peak > of().peak


def test_a_training_that_leaves_its_workers_to_the_cluster_has_smaller_micro_batches_there() -> None:
    step = Step("fit", TrainingConfig(batch=16), 64, 128, 16)  # four rows an example
    assert (step.on(8).training.world, step.on(8).rows) == (8, 8)
    fixed = Step("fit", TrainingConfig(batch=16, workers=2), 32, 128, 16)
    assert fixed.on(8) is fixed


@pytest.mark.parametrize("method", ["exsearch", "moat", "dro"])
def test_the_recipe_of_a_7b_model_fits_its_gpus_and_one_too_small_is_refused(method: str, tmp_path: Path) -> None:
    recipe = ROOT / "jobs" / method / "qwen7b.yaml"
    shown = CliRunner().invoke(main, ["validate", str(recipe)])
    assert shown.exit_code == 0 and "Qwen/Qwen2.5-7B-Instruct" in shown.output and "valid" in shown.output
    for step in methods.load_config(recipe).steps():  # type: ignore[attr-defined]
        assert step.training.world == 8
    small = tmp_path / "small.yaml"
    small.write_text(recipe.read_text().replace("gpu_gb: 80", "gpu_gb: 12"))
    refused = CliRunner().invoke(main, ["validate", str(small)])
    assert refused.exit_code == 2
    assert "GiB of about.gpu_gb=12: take a smaller micro_batch, gradient_checkpointing=true" in refused.output


def test_a_model_that_is_not_at_hand_is_an_error_only_where_its_memory_is_asked_for(tmp_path: Path) -> None:
    text = (ROOT / "jobs" / "dro" / "qwen7b.yaml").read_text().replace("Qwen/Qwen2.5-7B-Instruct", "nobody/none")
    for room, status, said in (("gpu_gb: 80", 2, "error: model 'nobody/none'"), ("gpu_gb: 0", 0, "is not known")):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text.replace("gpu_gb: 80", room))
        shown = CliRunner().invoke(main, ["validate", str(recipe)])
        assert shown.exit_code == status and said in shown.output

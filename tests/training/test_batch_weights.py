"""Means over what the examples of a step consist of: how the step is divided makes no difference to them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch
from ranks import TwoRanks
from torch.nn import functional

from mobula.models.causal import CausalModel, SmallShape, word_tokenizer
from mobula.models.sft import IGNORED, SftTask, write_pairs
from mobula.training import FitResult, TrainingConfig, fit
from mobula.training.loop import batch_indices, read_metrics, seed_slice

WORDS = [f"word{i}" for i in range(20)]
CONFIG = TrainingConfig(steps=5, batch=8, lr=1e-3, report_every=1, workers=0)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> SftTask:
    """Targets of 1 to 12 tokens; one pair has no prompt."""
    folder = tmp_path_factory.mktemp("sft")
    model = CausalModel.small(word_tokenizer(WORDS), SmallShape(width=16, positions=24), seed=0)
    model.save(folder / "start")
    ids = model.encode(" ".join(WORDS))
    pairs = [(ids[i : i + 1 + i % 4], [*ids[: (5 * i) % 12], model.eos]) for i in range(16)]
    write_pairs(folder / "pairs.jsonl", [*pairs, ([], ids[:6])])
    return SftTask(folder / "start", folder / "pairs.jsonl")


@pytest.fixture(scope="module")
def whole(task: SftTask, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    return fit(task, CONFIG, tmp_path_factory.mktemp("whole"), seed=1, name="whole")


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("micro", [1, 2, 8])
def test_sft_learns_the_same_however_a_batch_is_divided(
    task: SftTask, whole: FitResult, ranks: TwoRanks, tmp_path: Path, micro: int, workers: int, zero: int
) -> None:
    config = dataclasses.replace(CONFIG, micro_batch=min(micro, 8 // workers), zero=zero)
    if workers == 1:
        fit(task, config, tmp_path / "run", seed=1, name="parts")
    else:
        ranks.train(task, dataclasses.replace(config, workers=2), tmp_path / "run", seed=1)
    expected = safetensors.torch.load_file(whole.weights)
    found = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses == pytest.approx([row["loss"] for row in read_metrics(whole.history)], abs=1e-6)


def test_the_whole_batch_is_learned_as_without_weights_bit_for_bit(
    task: SftTask, whole: FitResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SftTask, "weights", lambda self, indices: torch.ones(len(indices)))
    plain = fit(task, CONFIG, tmp_path / "plain", seed=1, name="plain")
    assert plain.weights.read_bytes() == whole.weights.read_bytes()
    # A mean of the means of micro-batches is something else.
    parts = fit(task, dataclasses.replace(CONFIG, micro_batch=1), tmp_path / "parts", seed=1, name="parts")
    found, expected = (safetensors.torch.load_file(result.weights) for result in (parts, whole))
    assert max((found[name] - expected[name]).abs().max() for name in expected) > 1e-4


def test_weights_are_the_tokens_that_the_loss_is_a_mean_over(task: SftTask) -> None:
    indices = torch.arange(task.examples)
    learned = task.batch(indices, torch.Generator())["mask"][:, 1:]
    assert task.weights(indices).tolist() == learned.sum(1).tolist()
    assert len(set(task.weights(indices).tolist())) > 5


def test_the_logged_loss_is_the_mean_over_the_tokens_of_the_step(task: SftTask, tmp_path: Path) -> None:
    result = fit(task, dataclasses.replace(CONFIG, steps=1, micro_batch=2), tmp_path, seed=1, name="one")
    model = task.build().eval()
    batch = task.batch(batch_indices(task.examples, 8, 0, 1), seed_slice(1, 0, 0))
    logits = model(input_ids=batch["ids"], attention_mask=batch["attention"]).logits[:, :-1]
    labels = batch["ids"].masked_fill(batch["mask"] == 0, IGNORED)[:, 1:].flatten()
    mean = functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED)
    assert read_metrics(result.history)[0]["loss"] == pytest.approx(mean.item(), abs=1e-6)

"""Supervised fine-tuning: which tokens are learned, and that they are."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from mobula.models.causal import CausalModel, SmallShape, word_tokenizer
from mobula.models.finetune import TokenRow, collate, row_log_probs
from mobula.models.language_model import Sampling
from mobula.models.sft import SftTask, read_pairs, write_pairs
from mobula.training import TrainingConfig, fit, load_weights

WORDS = ["red", "blue", "green", "one", "two", "three", "say"]
ANSWERS = {"red": "one", "blue": "two", "green": "three"}


@pytest.fixture(scope="module")
def model() -> CausalModel:
    return CausalModel.small(word_tokenizer(WORDS), SmallShape(width=32, positions=16), seed=0)


@pytest.fixture(scope="module")
def pairs(model: CausalModel) -> list[tuple[list[int], list[int]]]:
    return [(model.encode(f"say {word}"), [*model.encode(ANSWERS[word]), model.eos]) for word in ANSWERS]


@pytest.fixture
def task(model: CausalModel, pairs: list[tuple[list[int], list[int]]], tmp_path: Path) -> SftTask:
    model.save(tmp_path / "start")
    write_pairs(tmp_path / "pairs.jsonl", pairs * 20)
    write_pairs(tmp_path / "dev.jsonl", pairs)
    return SftTask(tmp_path / "start", tmp_path / "pairs.jsonl", tmp_path / "dev.jsonl")


def test_only_targets_are_learned() -> None:
    batch = collate([TokenRow.of([3, 4], [5, 1]), TokenRow.of([3], [1])])
    assert batch["ids"].tolist() == [[3, 4, 5, 1], [3, 1, 0, 0]]
    assert batch["attention"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["mask"].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]


def test_prompt_tokens_have_no_gradient_of_their_own(model: CausalModel, task: SftTask) -> None:
    """Another prompt token as label would change nothing: the loss is the mean over target tokens, EOS included."""
    batch = task.batch(torch.arange(3), torch.Generator())
    loss, _ = task.loss(model.network, batch)
    prompts, targets = zip(*read_pairs(task.data)[:3], strict=True)
    plain = torch.cat(model.log_probs(prompts, targets))
    assert len(plain) == 6
    torch.testing.assert_close(loss.detach(), -plain.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(row_log_probs(model.network, batch).detach(), plain.view(3, 2).sum(1), atol=1e-5, rtol=0)
    with torch.no_grad():
        assert task.evaluate(model.network)["nll"] == pytest.approx(float(-plain.mean()), abs=1e-5)


def test_training_teaches_the_answers(model: CausalModel, task: SftTask, tmp_path: Path) -> None:
    config = TrainingConfig(steps=60, batch=12, lr=1e-2, workers=0, monitor="nll", mode="min", eval_every=20)
    result = fit(task, config, tmp_path / "fit", seed=0, name="sft")
    trained = CausalModel.open(str(task.start))
    load_weights(trained.network, result.weights)
    drawn = trained.sample([model.encode(f"say {word}") for word in ANSWERS], Sampling(3, 0.0), [0, 0, 0])
    assert [trained.decode(c.ids) for c in drawn] == list(ANSWERS.values())
    assert all(c.ended for c in drawn)


def test_identity_names_start_and_data(task: SftTask, pairs: list[tuple[list[int], list[int]]], tmp_path: Path) -> None:
    before = task.identity()
    assert pickle.loads(pickle.dumps(task)).identity() == before
    write_pairs(task.data, pairs)
    assert SftTask(task.start, task.data, task.dev).identity() != before

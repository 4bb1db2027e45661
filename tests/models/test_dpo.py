"""Direct preference optimisation: its value and gradient at the start, its directions, and that it learns."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from mobula.artifacts import write_jsonl
from mobula.models.causal import CausalModel, SmallShape, word_tokenizer
from mobula.models.dpo import DpoTask, Preference
from mobula.models.finetune import row_log_probs
from mobula.training import TrainingConfig, fit, load_weights

PLANS = ["calc 3 - 2", "find the difference of 3 and 2", "work out 2 taken from 3", "calc 3 + 2"]
BETA = 0.2


@pytest.fixture(scope="module")
def model() -> CausalModel:
    model = CausalModel.small(word_tokenizer([*PLANS, "task"]), SmallShape(width=32, positions=32, dropout=0.1), seed=0)
    for parameter in model.network.parameters():
        parameter.data.mul_(3)
    return model


@pytest.fixture(scope="module")
def preferences(model: CausalModel) -> list[Preference]:
    prompt = model.encode("task 3 2")
    plans = [[*model.encode(plan), model.eos] for plan in PLANS]
    wanted = [(0, 2), (1, 2), (0, 3), (1, 3)]
    return [Preference(prompt, plans[w], plans[u]) for w, u in wanted]


@pytest.fixture
def task(model: CausalModel, preferences: list[Preference], tmp_path: Path) -> DpoTask:
    model.save(tmp_path / "start")
    write_jsonl(tmp_path / "pairs.jsonl", map(asdict, preferences))
    return referred(DpoTask(tmp_path / "start", tmp_path / "pairs.jsonl", BETA))


@torch.no_grad()
def referred(task: DpoTask) -> DpoTask:
    """With the log-probabilities of its reference, as the loop computes them."""
    task.refer(task.reference(task.build()))
    return task


def batch_of(task: DpoTask) -> dict[str, torch.Tensor]:
    return task.batch(torch.arange(task.examples), torch.Generator())


def test_at_the_start_the_loss_is_ln_2_and_the_gradient_that_of_half_beta(task: DpoTask) -> None:
    network = task.build()
    batch = batch_of(task)
    loss, facts = task.loss(network, batch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    assert float(facts["chosen_shift"]) == pytest.approx(0, abs=1e-4)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    network.zero_grad()
    chosen, rejected = row_log_probs(network, batch).view(-1, 2).unbind(1)
    (-BETA / 2 * (chosen - rejected).mean()).backward()
    wanted = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_doubling_beta_doubles_the_implicit_reward(task: DpoTask) -> None:
    network = task.build()
    for parameter in network.parameters():
        parameter.data.mul_(1.1)
    batch = batch_of(task)
    rewards = []
    for beta in (BETA, 2 * BETA):
        loss, facts = referred(DpoTask(task.start, task.data, beta)).loss(network, batch)
        rewards.append(beta * float(facts["margin"]))
        assert loss.item() > 0
    assert rewards[1] == pytest.approx(2 * rewards[0])


def test_sums_count_every_plan_token_and_eos_and_no_prompt_token(
    model: CausalModel, task: DpoTask, preferences: list[Preference]
) -> None:
    batch = batch_of(task)
    learned = (batch["mask"] > 0).sum(1).tolist()
    assert learned == [len(plan) for p in preferences for plan in (p.chosen, p.rejected)]
    plans = [plan for p in preferences for plan in (p.chosen, p.rejected)]
    sums = model.log_probs([preferences[0].prompt] * len(plans), plans)
    wanted = torch.stack([scores.sum() for scores in sums]).view(-1, 2)
    torch.testing.assert_close(batch["reference"], wanted, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_training_prefers_the_chosen_plans(
    model: CausalModel, task: DpoTask, preferences: list[Preference], tmp_path: Path, weight: float
) -> None:
    tuned = referred(DpoTask(task.start, task.data, BETA, weight))
    config = TrainingConfig(steps=40, batch=4, lr=1e-3, workers=0)
    result = fit(tuned, config, tmp_path / "fit", seed=0, name="dpo")
    planner = CausalModel.open(str(task.start))
    load_weights(planner.network, result.weights)
    _, facts = tuned.loss(planner.network, batch_of(tuned))
    assert float(facts["preferred"]) == 1
    shifted = float(facts["chosen_shift"])
    assert shifted > 0 or weight == 0  # without the anchor, chosen plans may become less likely as well


def test_the_reference_never_moves(task: DpoTask, preferences: list[Preference], tmp_path: Path) -> None:
    before = task.data.read_bytes(), sorted(p.read_bytes() for p in task.start.iterdir())
    fit(task, TrainingConfig(steps=3, batch=4, lr=1e-2, workers=0), tmp_path / "fit", seed=0, name="dpo")
    assert before == (task.data.read_bytes(), sorted(p.read_bytes() for p in task.start.iterdir()))
    assert task.items == preferences


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reference_is_scored_at_the_precision_of_the_training(
    task: DpoTask, tmp_path: Path, precision: str
) -> None:
    """In the first step planner and reference are one: the margin is 0 and not what rounding makes of it."""
    config = TrainingConfig(steps=1, batch=4, lr=1e-3, workers=0, precision=precision, report_every=1)
    result = fit(task, config, tmp_path / "fit", seed=0, name="dpo")
    row = json.loads(result.history.read_text().splitlines()[0])
    assert row["margin"] == pytest.approx(0, abs=1e-3)
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_the_planner_trains_without_dropout_as_its_reference_was_scored(task: DpoTask) -> None:
    network, batch = task.build(), batch_of(task)
    assert network.training
    assert torch.equal(row_log_probs(network, batch), row_log_probs(network, batch))


def test_identity_names_what_decides(task: DpoTask) -> None:
    assert pickle.loads(pickle.dumps(task)).identity() == task.identity()
    others = [DpoTask(task.start, task.data, 0.3), DpoTask(task.start, task.data, BETA, 0.3)]
    assert len({task.identity(), *(other.identity() for other in others)}) == 3

"""Named losses: their sum, and PCGrad on the gradients of the global batch at every stage that has it."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conflicting_task import ConflictingTask
from ranks import TwoRanks
from small_task import ByteTask
from torch import Tensor, nn

from mobula.errors import ConfigError, TrainingError
from mobula.training import FitResult, TrainingConfig, fit, load_weights, loop
from mobula.training.combine import LossGradients, pcgrad, scale_of, scaled, surrogate
from mobula.training.engine import join_process_group
from mobula.training.loop import batch_indices, learning_rate, read_metrics

SEED = 3
CONFIG = TrainingConfig(steps=5, batch=8, lr=1e-2, clip=0.5, combine="pcgrad", report_every=1, workers=0)
LAYOUTS = [(zero, accumulation) for zero in (0, 1, 2) for accumulation in (1, 4)]


def train(directory: Path, task: ConflictingTask | None = None, **changes) -> FitResult:
    return fit(task or ConflictingTask(), dataclasses.replace(CONFIG, **changes), directory, seed=SEED, name="test")


def rows_of(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "examples_per_s"} for row in read_metrics(path / "metrics.jsonl")]


def surgery(gradients: list[Tensor], rng: torch.Generator) -> Tensor:
    """PCGrad as the paper writes it, on the vectors themselves."""
    projected = []
    for i, gradient in enumerate(gradients):
        for j in torch.randperm(len(gradients), generator=rng).tolist():
            if j != i and gradient @ gradients[j] < 0:
                gradient = gradient - (gradient @ gradients[j]) / gradients[j].square().sum() * gradients[j]
        projected.append(gradient)
    return torch.stack(projected).sum(0)


def reference(task: ConflictingTask) -> tuple[nn.Module, list[dict[str, float]]]:
    """The weights and metrics after five steps of plain PyTorch on whole batches."""
    torch.manual_seed(SEED)
    model = task.build()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim > 1) == matrix]} for matrix in (True, False)]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.01, 0.0
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    rows = []
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(CONFIG, step)
        batch = task.batch(batch_indices(task.examples, 8, step, SEED), torch.Generator())
        losses, _ = task.loss(model, batch)
        gradients = []
        for each in losses.values():
            parts = torch.autograd.grad(each, trained, retain_graph=True, allow_unused=True)
            zeros = [torch.zeros_like(p) for p in trained]
            gradients.append(torch.cat([(z if g is None else g).flatten() for g, z in zip(parts, zeros, strict=True)]))
        rng = torch.Generator().manual_seed(loop._mix("combine", SEED, step))
        combined = surgery(gradients, rng).split([p.numel() for p in trained])
        for parameter, gradient in zip(trained, combined, strict=True):
            parameter.grad = gradient.view_as(parameter)
        rows.append({"grad_norm": float(nn.utils.clip_grad_norm_(trained, 0.5))})
        rows[-1] |= {name: each.item() for name, each in losses.items()} | {"loss": sum(losses.values()).item()}
        optimizer.step()
    return model, rows


def assert_equals_reference(task: ConflictingTask, directory: Path) -> None:
    model, rows = reference(task)
    trained = task.build()
    load_weights(trained, directory / "model.safetensors")
    for (name, actual), expected in zip(trained.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    for actual, expected in zip(rows_of(directory), rows, strict=True):
        assert {name: actual[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(("zero", "accumulation"), LAYOUTS)
def test_one_rank_equals_plain_pcgrad(tmp_path: Path, zero: int, accumulation: int, tokens: bool) -> None:
    task = ConflictingTask(tokens=tokens)
    train(tmp_path, task, zero=zero, micro_batch=8 // accumulation)
    assert_equals_reference(task, tmp_path)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(("zero", "accumulation"), LAYOUTS)
def test_two_ranks_equal_plain_pcgrad(
    tmp_path: Path, ranks: TwoRanks, zero: int, accumulation: int, tokens: bool
) -> None:
    task = ConflictingTask(tokens=tokens)
    config = dataclasses.replace(CONFIG, zero=zero, micro_batch=4 // accumulation, workers=2)
    ranks.train(task, config, tmp_path / "run", SEED)
    assert_equals_reference(task, tmp_path / "run")


def test_the_losses_conflict_and_the_order_of_projections_matters() -> None:
    """Otherwise the comparisons above would prove little."""
    task = ConflictingTask()
    torch.manual_seed(SEED)
    model = task.build()
    trained = [p for p in model.parameters() if p.requires_grad]
    losses, _ = task.loss(model, task.batch(torch.arange(8), torch.Generator()))
    parts = [torch.autograd.grad(each, trained, retain_graph=True, allow_unused=True) for each in losses.values()]
    private = [i for i, p in enumerate(trained) if p is model.private.weight]
    assert [part[private[0]] is None for part in parts] == [False, True, True]
    rows = torch.stack(
        [
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(trained, part, strict=True)])
            for part in parts
        ]
    )
    found = {tuple(pcgrad((rows @ rows.T).double(), rng(seed)).tolist()) for seed in range(20)}
    assert len(found) > 1
    ends = [torch.tensor(weights).float() @ rows for weights in found]
    assert max(float((a - b).norm() / a.norm()) for a, b in itertools.combinations(ends, 2)) > 1e-2


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(20))
def test_weights_from_inner_products_are_the_papers_projections(seed: int) -> None:
    gradients = torch.randn(4, 6, generator=rng(seed), dtype=torch.float64)
    weights = pcgrad(gradients @ gradients.T, rng(seed))
    torch.testing.assert_close(weights @ gradients, surgery(list(gradients), rng(seed)))


def test_gradients_without_conflict_are_added_up() -> None:
    gradients = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert pcgrad(gradients @ gradients.T, rng(0)).tolist() == [1.0, 1.0, 1.0]


def test_two_conflicting_gradients_are_each_projected_onto_the_others_normal_plane() -> None:
    one, other = torch.tensor([1.0, 0.0]).double(), torch.tensor([-1.0, 1.0]).double()
    gram = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
    expected = (one + 0.5 * other) + (other + one)
    torch.testing.assert_close(pcgrad(gram, rng(0)) @ torch.stack([one, other]), expected)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_named_losses_are_added_up_as_one_loss_would_be_bit_for_bit(tmp_path: Path, zero: int) -> None:
    changes = {"combine": "sum", "zero": zero, "micro_batch": 2}
    named = train(tmp_path / "named", **changes)
    single = train(tmp_path / "single", ConflictingTask(named=False), **changes)
    assert named.weights.read_bytes() == single.weights.read_bytes()
    rows = rows_of(tmp_path / "named")
    assert [{k: v for k, v in row.items() if k not in ("one", "two", "other")} for row in rows] == rows_of(
        tmp_path / "single"
    )
    for row in rows:
        assert row["one"] + row["two"] + row["other"] == pytest.approx(row["loss"], rel=1e-6)


def test_a_sum_of_means_over_different_tokens_is_that_of_the_whole_batch(tmp_path: Path, ranks: TwoRanks) -> None:
    task = ConflictingTask(tokens=True)
    whole = train(tmp_path / "whole", task, combine="sum")
    parts = train(tmp_path / "parts", task, combine="sum", micro_batch=1)
    config = dataclasses.replace(CONFIG, combine="sum", micro_batch=2, workers=2)
    ranks.train(task, config, tmp_path / "ranks", SEED)
    expected = safetensors.torch.load_file(whole.weights)
    for path in (parts.weights, tmp_path / "ranks" / "model.safetensors"):
        torch.testing.assert_close(safetensors.torch.load_file(path), expected, atol=1e-6, rtol=0)
    for name, row in itertools.product(("loss", "one", "two", "other"), range(5)):
        assert rows_of(tmp_path / "parts")[row][name] == pytest.approx(rows_of(tmp_path / "whole")[row][name], abs=1e-6)


def test_bf16_accumulates_in_fp32(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain")
    mixed = [train(tmp_path / f"mixed-{micro}", precision="bf16", micro_batch=micro) for micro in (8, 2)]
    expected = safetensors.torch.load_file(plain.weights)
    for result in mixed:
        found = safetensors.torch.load_file(result.weights)
        assert found["mix.weight"].dtype == torch.float32
        assert not torch.equal(found["mix.weight"], expected["mix.weight"])
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)


def test_small_gradients_of_bf16_weights_are_not_lost_in_accumulation() -> None:
    join_process_group()
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    gradients = LossGradients([weight])
    for _ in range(512):
        gradients.add({"one": weight.sum(), "two": weight.sum()}, 1 / 512)
    (combined,), _ = gradients.combine(seed=0)
    assert (combined.dtype, combined.tolist()) == (torch.float32, [2.0])


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_resume_is_bit_equal(tmp_path: Path, zero: int) -> None:
    changes = {"zero": zero, "micro_batch": 2, "checkpoint_every": 2}
    whole = train(tmp_path / "whole", **changes)

    class Interrupted(ConflictingTask):
        drawn = 0

        def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
            if self.drawn == 4 * 3 + 2:
                raise InterruptedError
            self.drawn += 1
            return super().batch(indices, generator)

    with pytest.raises(InterruptedError):
        train(tmp_path / "stopped", Interrupted(), **changes)
    resumed = train(tmp_path / "stopped", **changes)
    assert resumed.weights.read_bytes() == whole.weights.read_bytes()
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")


def test_conflicts_are_logged(tmp_path: Path) -> None:
    train(tmp_path, micro_batch=2)
    rows = rows_of(tmp_path)
    assert all(0 <= row["conflicts"] <= 1 and -1 <= row["cosine"] <= 1 for row in rows)
    assert max(row["conflicts"] for row in rows) > 0
    assert any(row["cosine"] != rows[0]["cosine"] for row in rows)


def test_the_third_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.combine=pcgrad does not work with zero=3"):
        train(Path("/nonexistent"), zero=3)


@pytest.mark.parametrize("names", [(), ("one",)])
def test_a_single_loss_has_nothing_to_combine(tmp_path: Path, names: tuple[str, ...]) -> None:
    class Single(ByteTask):
        def loss(self, model: nn.Module, batch: dict[str, Tensor]):
            loss, extras = super().loss(model, batch)
            return (dict.fromkeys(names, loss) if names else loss), extras

    with pytest.raises(TrainingError, match=r"combine=pcgrad combines several named losses; .* a single one"):
        fit(Single(), CONFIG, tmp_path, seed=0, name="test")


def test_a_loss_that_is_missing_from_a_micro_batch_is_an_error(tmp_path: Path) -> None:
    class Forgetful(ConflictingTask):
        calls = 0

        def loss(self, model: nn.Module, batch: dict[str, Tensor]):
            losses, extras = super().loss(model, batch)
            self.calls += 1
            return ({"one": losses["one"], "two": losses["two"]} if self.calls == 3 else losses), extras

    with pytest.raises(TrainingError, match="losses were one, two, other and are now one, two"):
        train(tmp_path, Forgetful(), micro_batch=4)


def test_weights_and_losses_have_the_same_names() -> None:
    loss = torch.ones(())
    assert scaled({"a": loss}, {"a": 2.0, "b": 0.0}) == {"a": 2 * loss, "b": 0 * loss}
    for losses, scale in (
        ({"a": loss}, {"a": 1.0, "b": 0.5}),
        ({"a": loss, "b": loss}, {"a": 1.0}),
        (loss, {"a": 1.0}),
    ):
        with pytest.raises(TrainingError, match="one weight for every loss"):
            scaled(losses, scale)


def test_scales_average_to_the_weighted_mean() -> None:
    weights = torch.tensor([1, 2, 3, 4, 0, 0, 7, 1])
    parts = [slice(start, start + 2) for start in range(0, 8, 2)]
    scales = [scale_of(weights, part) for part in parts]
    assert scales == pytest.approx([4 * 3 / 18, 4 * 7 / 18, 0.0, 4 * 8 / 18])
    assert scale_of(weights, slice(0, 8)) == 1.0
    assert scale_of(torch.full((6,), 0.1), slice(2, 4)) == pytest.approx(1.0)
    assert scale_of({"none": torch.zeros(4)}, slice(0, 2)) == {"none": 0.0}
    # Equal integer weights leave a loss as it is, bit for bit.
    assert all(scale_of(torch.full((24,), 7), slice(i, i + 8)) == 1.0 for i in (0, 8, 16))


def test_a_surrogate_has_the_given_gradients() -> None:
    parameters = [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4))]
    gradients = [torch.randn(2, 3), torch.randn(4)]
    surrogate(parameters, gradients).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True))


def test_a_loss_that_weighs_nothing_is_zero_whatever_its_value() -> None:
    assert scaled(torch.tensor(float("nan")), 0.0)[""].item() == 0.0
    silenced = scaled({"a": torch.tensor(float("nan")), "b": torch.tensor(2.0)}, {"a": 0.0, "b": 0.5})
    assert [value.item() for value in silenced.values()] == [0.0, 1.0]


def test_micro_batches_without_weight_take_part_and_change_nothing(tmp_path: Path) -> None:
    class Half(ByteTask):
        """The second half of every batch weighs nothing, and its mean is NaN."""

        def weights(self, indices: Tensor) -> Tensor:
            return torch.tensor([1.0] * (len(indices) // 2) + [0.0] * (len(indices) - len(indices) // 2))

        def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
            loss, extras = super().loss(model, batch)
            return loss * (float("nan") if self.calls % 2 else 1.0), extras

        calls = 0

        def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
            type(self).calls += 1
            type(self).calls %= 2
            return super().batch(indices, generator)

    config = TrainingConfig(steps=2, batch=8, micro_batch=4, workers=0)
    Half.calls = 1
    result = fit(Half(), config, tmp_path, seed=1, name="half")
    assert all(torch.isfinite(tensor).all() for tensor in safetensors.torch.load_file(result.weights).values())
    assert read_metrics(result.history)[-1]["loss"] < 10


def test_a_value_may_not_take_a_name_that_a_row_has(tmp_path: Path) -> None:
    class Clash(ByteTask):
        def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
            return super().loss(model, batch)[0], {"lr": 1.0}

    with pytest.raises(TrainingError, match="the task logs lr"):
        fit(Clash(), TrainingConfig(steps=1, batch=4, workers=0), tmp_path, seed=1, name="clash")

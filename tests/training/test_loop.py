"""The training loop in this process: its losses, resuming, accumulation, stages, best weights and stops."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_task import ByteTask
from torch import Tensor, nn

from mobula.errors import ConfigError, RunConflict, TrainingError
from mobula.training import FitResult, Training, TrainingConfig, fit, fit_all, load_weights
from mobula.training.loop import batch_indices, learning_rate, read_metrics, seed_slice

CONFIG = TrainingConfig(
    steps=7, batch=8, micro_batch=4, lr=1e-2, report_every=1, eval_every=3, monitor="loss", mode="min", workers=0
)


class Killed(Exception):
    """Stands for the end of the process."""


def train(directory: Path, task: ByteTask | None = None, **changes) -> FitResult:
    return fit(task or ByteTask(), dataclasses.replace(CONFIG, **changes), directory, seed=3, name="test")


def curve(result: FitResult) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "examples_per_s"} for row in read_metrics(result.history)]


def losses(result: FitResult) -> list[float]:
    return [row["loss"] for row in curve(result) if "loss" in row]


def weights(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


def assert_same(a: FitResult, b: FitResult) -> None:
    assert curve(a) == curve(b)
    assert (a.steps, a.examples, a.best) == (b.steps, b.examples, b.best)
    assert a.weights.read_bytes() == b.weights.read_bytes()
    assert a.last.read_bytes() == b.last.read_bytes()


def test_losses_and_weights_equal_a_plain_loop_bit_for_bit(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, micro_batch=None)
    task = ByteTask()
    torch.manual_seed(3)
    model = task.build()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    expected = []
    for step in range(7):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        batch = task.batch(batch_indices(50, 8, step, 3), seed_slice(3, step, 0))
        loss, _ = task.loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    result = train(tmp_path, micro_batch=None)
    assert losses(result) == expected
    trained = task.build()
    load_weights(trained, result.last)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("zero", [0, 1])
def test_resume_at_every_step_is_bit_equal(tmp_path: Path, zero: int) -> None:
    changes = {"zero": zero, "report_every": 2, "checkpoint_every": 1}
    whole = train(tmp_path / "whole", **changes)
    for stop in range(1, 8):
        directory = tmp_path / f"stopped-{stop}"
        interrupt(directory, stop, **changes)
        assert_same(train(directory, **changes), whole)


@pytest.mark.parametrize("zero", [2, 3])
def test_resume_between_checkpoints_is_bit_equal_in_higher_stages(tmp_path: Path, zero: int) -> None:
    changes = {"zero": zero, "checkpoint_every": 2}
    whole = train(tmp_path / "whole", **changes)
    interrupt(tmp_path / "stopped", 5, **changes)
    assert_same(train(tmp_path / "stopped", **changes), whole)


def interrupt(directory: Path, step: int, **changes) -> None:
    """Train, and end as if killed when the batch after ``step`` steps is drawn."""

    class Interrupted(ByteTask):
        drawn = 0

        def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
            if self.drawn == 2 * step:
                raise Killed
            self.drawn += 1
            return super().batch(indices, generator)

        def evaluate(self, model: nn.Module) -> dict[str, float]:
            if step == CONFIG.steps and self.drawn == 2 * step:
                raise Killed
            return super().evaluate(model)

    with pytest.raises(Killed):
        train(directory, Interrupted(), **changes)


def test_resume_reads_the_checkpoint_instead_of_starting_again(tmp_path: Path) -> None:
    drawn = []

    class Counting(ByteTask):
        def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
            drawn.append(indices)
            return super().batch(indices, generator)

    interrupt(tmp_path, 5, checkpoint_every=2)
    train(tmp_path, Counting(), checkpoint_every=2)
    assert len(drawn) == 2 * (7 - 4)


def test_accumulated_micro_batches_equal_the_whole_batch(tmp_path: Path) -> None:
    # Dropout and masks are drawn per micro-batch, so the comparison is made without them.
    task = Unmasked(dropout=0.0)
    whole = train(tmp_path / "whole", task, micro_batch=8)
    parts = train(tmp_path / "parts", task, micro_batch=2)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


class Unmasked(ByteTask):
    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return super().batch(indices, torch.Generator().manual_seed(0))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]):
        return super().loss(model, {**batch, "tokens": torch.roll(batch["targets"], 1, dims=1)})


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_stages_agree(tmp_path: Path, zero: int) -> None:
    plain = train(tmp_path / "plain")
    staged = train(tmp_path / "staged", zero=zero)
    assert losses(staged) == pytest.approx(losses(plain), rel=1e-5)
    assert weights(staged.last).keys() == weights(plain.last).keys()
    for name, tensor in weights(plain.last).items():
        torch.testing.assert_close(weights(staged.last)[name], tensor, rtol=1e-4, atol=1e-5)


def test_bf16_trains_in_mixed_precision_and_keeps_fp32_weights(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain")
    mixed = train(tmp_path / "mixed", precision="bf16")
    assert losses(mixed) != losses(plain)
    assert losses(mixed) == pytest.approx(losses(plain), rel=2e-2)
    assert all(tensor.dtype == torch.float32 for tensor in weights(mixed.last).values())


def test_fp16_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.precision=fp16: .*use bf16 or fp32"):
        train(tmp_path / "run", precision="fp16")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 9, "workers": 2}, r"batch=9 does not divide among workers=2"),
        ({"micro_batch": 3}, r"micro_batch=3 does not divide a worker's share of the batch \(8\)"),
        ({"betas": [0.9]}, r"betas=\[0\.9\]: expected two numbers"),
        ({"warmup": 0.8}, r"warmup=0\.8 and decay=0\.3 together exceed"),
        ({"early_stop": 2, "monitor": ""}, r"early_stop needs monitor and eval_every"),
    ],
)
def test_contradictions_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(Path("/nonexistent"), **changes)


def test_best_weights_are_those_of_the_best_evaluation(tmp_path: Path) -> None:
    script = iter([0.9, 0.5, 0.2, 0.4])
    result = train(tmp_path, Scripted(script), steps=9)
    assert result.best == {"step": 6, "loss": 0.2}
    reference = train(tmp_path / "reference", steps=9, monitor="")
    assert result.last.read_bytes() == reference.weights.read_bytes()
    assert result.weights.read_bytes() != result.last.read_bytes()


def test_the_starting_weights_can_be_the_best(tmp_path: Path) -> None:
    result = train(tmp_path, Scripted(iter([0.1, 0.5, 0.2, 0.4])), steps=9)
    assert result.best == {"step": 0, "loss": 0.1}
    torch.manual_seed(3)
    expected = ByteTask().build().state_dict()
    assert torch.equal(weights(result.weights)["embed.weight"], expected["embed.weight"])


def test_a_task_can_stop_a_training_that_is_a_waste(tmp_path: Path) -> None:
    class Collapsing(ByteTask):
        def check(self, metrics: dict[str, float], step: int, steps: int) -> None:
            if step == 6:
                raise TrainingError(f"collapsed at step {step} of {steps}: {sorted(metrics)}")

    with pytest.raises(TrainingError, match=r"collapsed at step 6 of 7: \['loss'\]"):
        train(tmp_path, Collapsing())
    assert not (tmp_path / "result.json").exists()


def test_early_stop_ends_after_evaluations_without_a_better_metric(tmp_path: Path) -> None:
    result = train(tmp_path, Scripted(iter([0.9, 0.5, 0.6, 0.5, 0.1])), steps=12, early_stop=2)
    assert result.steps == 9
    assert result.examples == 72
    assert result.best["step"] == 3


def test_the_starting_weights_are_kept_if_training_makes_them_worse(tmp_path: Path) -> None:
    result = train(tmp_path, Scripted(iter([0.1, 0.5, 0.4, 0.3])), lr=1.0)
    assert result.best == {"step": 0, "loss": 0.1}
    torch.manual_seed(3)
    for name, tensor in ByteTask().build().state_dict().items():
        if name != "head.weight":  # tied, and stored once
            assert torch.equal(weights(result.weights)[name], tensor)


def test_without_a_checkpoint_the_first_evaluation_is_done_and_written_again(tmp_path: Path) -> None:
    interrupt(tmp_path / "run", 2)
    assert_same(train(tmp_path / "run"), train(tmp_path / "whole"))


def test_the_task_looks_at_every_evaluation_and_may_stop_the_run(tmp_path: Path) -> None:
    seen = []

    class Guarded(ByteTask):
        def check(self, metrics: dict[str, float], step: int, steps: int) -> None:
            seen.append((step, steps, list(metrics)))
            if step == 6:
                raise TrainingError("collapsed")

    with pytest.raises(TrainingError, match="collapsed"):
        train(tmp_path, Guarded())
    assert seen == [(step, 7, ["loss"]) for step in (0, 3, 6)]
    assert not (tmp_path / "result.json").exists()


class Scripted(ByteTask):
    """Evaluates to given values."""

    def __init__(self, script) -> None:
        super().__init__()
        self.script = script

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": next(self.script)}


def test_a_monitored_metric_that_is_not_measured_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"monitor=hit@10: .*it measures: loss"):
        train(tmp_path, monitor="hit@10")


@pytest.mark.parametrize("zero", [0, 1])
def test_a_parameter_without_dimensions_is_an_error_that_names_it(tmp_path: Path, zero: int) -> None:
    class Scalar(ByteTask):
        def build(self) -> nn.Module:
            model = super().build()
            model.temperature = nn.Parameter(torch.tensor(1.0))
            return model

    with pytest.raises(TrainingError, match=r"^temperature: DeepSpeed cannot train a parameter without dimensions"):
        train(tmp_path, Scalar(), zero=zero)


def test_a_network_that_cannot_run_its_layers_again_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="gradient_checkpointing=true: Network cannot run its layers again"):
        train(tmp_path, gradient_checkpointing=True)


class Exploding(ByteTask):
    """The loss becomes infinite with the ninth batch."""

    calls = 0

    def loss(self, model: nn.Module, batch: dict[str, Tensor]):
        loss, extras = super().loss(model, batch)
        self.calls += 1
        return (loss * math.inf if self.calls == 9 else loss), extras


def test_a_trial_that_diverges_ends_with_its_best_weights_and_says_so(tmp_path: Path) -> None:
    settings = dataclasses.replace(CONFIG, eval_every=2)
    made = Training(Exploding(), settings, tmp_path / "trial", 3, "trial", trial=True)
    (result,) = fit_all([made])
    assert result.diverged
    assert result.steps < settings.total_steps
    assert result.best["step"] <= 4
    assert result.last == result.weights
    assert all(torch.isfinite(value).all() for value in weights(result.weights).values())
    assert fit_all([made]) == [result]
    with pytest.raises(ConfigError, match="a trial needs a metric that judges it"):
        fit_all([dataclasses.replace(made, config=dataclasses.replace(settings, monitor=""))])


def test_f11_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss became inf at step 5"):
        train(tmp_path, Exploding(), report_every=10, checkpoint_every=6, eval_every=None)
    assert not (tmp_path / "result.json").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_a_finished_directory_is_returned_without_training(tmp_path: Path) -> None:
    class Untouchable(ByteTask):
        def build(self) -> nn.Module:
            raise AssertionError("trained again")

    first = train(tmp_path)
    assert train(tmp_path, Untouchable()) == first


def test_a_second_run_under_the_same_directory_never_returns_old_results_silently(tmp_path: Path) -> None:
    train(tmp_path)
    for changes, difference in [
        ({"lr": 2e-2}, r"training\.lr: 0\.01 -> 0\.02"),
        ({"zero": 1}, r"training\.zero: 0 -> 1"),
        ({"workers": 2}, r"training\.workers: 0 -> 2"),
    ]:
        with pytest.raises(RunConflict, match=difference):
            train(tmp_path, **changes)
    with pytest.raises(RunConflict, match="task: bytes-50"):
        train(tmp_path, ByteTask(examples=40))
    with pytest.raises(RunConflict, match="seed: 3 -> 4"):
        fit(ByteTask(), CONFIG, tmp_path, seed=4, name="test")


def test_keys_that_do_not_decide_the_result_may_change_between_attempts(tmp_path: Path) -> None:
    interrupt(tmp_path / "run", 5, checkpoint_every=2)
    assert_same(train(tmp_path / "run", checkpoint_every=3, keep=1, max_failures=0), train(tmp_path / "whole"))


def test_a_resume_on_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    interrupt(tmp_path, 5, checkpoint_every=2)
    manifest = tmp_path / "checkpoints" / "step-000000004" / "checkpoint.json"
    values = json.loads(manifest.read_text())
    values["facts"]["world"] = 2
    manifest.write_text(json.dumps(values))
    with pytest.raises(RunConflict, match=r"began on 2 ranks .* training\.workers=2"):
        train(tmp_path, checkpoint_every=2)


def test_two_trainings_do_not_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobula.training.loop.LOCK_WAIT_S", 0.0)

    class Nested(ByteTask):
        def evaluate(self, model: nn.Module) -> dict[str, float]:
            with pytest.raises(RunConflict, match="another process is training here"):
                train(tmp_path)
            return super().evaluate(model)

    train(tmp_path, Nested())


def test_every_example_is_seen_once_per_pass_also_across_batches() -> None:
    drawn = torch.cat([batch_indices(10, 4, step, seed=1) for step in range(5)])
    assert sorted(drawn[:10].tolist()) == list(range(10))
    assert sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()


def test_a_batch_larger_than_the_data_repeats_it() -> None:
    drawn = batch_indices(3, 7, 0, seed=1)
    assert sorted(torch.bincount(drawn).tolist()) == [2, 2, 3]


def test_learning_rate_rises_stays_and_falls() -> None:
    config = TrainingConfig(steps=20, lr=1.0, warmup=0.2, decay=0.25)
    rates = [learning_rate(config, step) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:15] == [1.0] * 11
    assert rates[15:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    result = train(tmp_path)
    assert "head.weight" not in weights(result.last)
    model = ByteTask().build()
    load_weights(model, result.last)
    assert torch.equal(model.head.weight, weights(result.last)["embed.weight"])


def test_progress_gets_every_row(tmp_path: Path) -> None:
    rows: list[dict] = []
    result = fit(ByteTask(), CONFIG, tmp_path, seed=3, name="test", progress=rows.append)
    assert rows == read_metrics(result.history)


def test_nothing_is_left_to_resume_from_after_the_end(tmp_path: Path) -> None:
    train(tmp_path / "run", checkpoint_every=2)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "fingerprint.json", "metrics.jsonl", "model.safetensors", "last.safetensors", "result.json", ".training.lock",
    }  # fmt: skip


def test_trainings_of_one_call_end_as_each_alone(tmp_path: Path) -> None:
    tasks = [ByteTask(), ByteTask(width=4)]
    alone = [train(tmp_path / f"alone-{i}", task) for i, task in enumerate(tasks)]
    trainings = [Training(task, CONFIG, tmp_path / f"together-{i}", 3, "test") for i, task in enumerate(tasks)]
    for ours, theirs in zip(fit_all(trainings), alone, strict=True):
        assert_same(ours, theirs)


def test_nothing_to_train_is_no_error() -> None:
    assert fit_all([]) == []

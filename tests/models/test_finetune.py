"""Fine-tuning on rows of tokens: batches, log-probabilities, references, and the model that comes of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobula.artifacts import write_jsonl
from mobula.models import finetune as finetuning
from mobula.models.causal import CausalModel, SmallShape, word_tokenizer
from mobula.models.finetune import MODEL, FinetuneTask, TokenRow, collate, finetune, row_log_probs, token_log_probs
from mobula.training import TrainingConfig
from mobula.training.loop import REFERENCE

ROWS = [TokenRow([3, 4, 5, 1], [0, 2, 1, 1], 0.5), TokenRow([3, 1], [0, 1])]


@dataclass
class MarginTask(FinetuneTask):
    """Learns rows, and logs by how much they have become likelier than the reference has them."""

    scale: float = 1.0

    def refer(self, references: dict[str, Tensor]) -> None:
        self.given = references["rows"]

    def reference(self, model: Any) -> dict[str, Tensor]:
        batch = {name: part.to(next(model.parameters()).device) for name, part in collate(self.items).items()}
        return {"rows": row_log_probs(model, batch)}

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {**super().batch(indices, generator), "reference": self.given[indices]}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        margin = row_log_probs(model, batch) - batch["reference"]
        return -self.scale * margin.mean(), {"margin": margin.mean().detach()}


@pytest.fixture(scope="module")
def model() -> CausalModel:
    return CausalModel.small(word_tokenizer(["a", "b", "c", "d"]), SmallShape(width=32, positions=16), seed=0)


@pytest.fixture
def task(model: CausalModel, tmp_path: Path) -> MarginTask:
    model.save(tmp_path / "start")
    write_jsonl(tmp_path / "rows.jsonl", map(asdict, ROWS))
    return MarginTask(tmp_path / "start", tmp_path / "rows.jsonl")


def test_rows_are_padded_on_the_right() -> None:
    batch = collate(ROWS)
    assert batch["ids"].tolist() == [[3, 4, 5, 1], [3, 1, 0, 0]]
    assert batch["attention"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["mask"].tolist() == [[0, 2, 1, 1], [0, 1, 0, 0]]
    assert batch["weights"].tolist() == [0.5, 1.0]


@pytest.mark.parametrize("known", [True, False], ids=["by states", "by logits"])
def test_log_probs_of_learned_tokens_are_those_of_every_row_alone(
    model: CausalModel, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the output layer sees the states of learned tokens alone or the network's logits are taken."""
    monkeypatch.setattr(finetuning, "ARCHITECTURES", {"gpt2": None} if known else {})
    rows = [TokenRow([3, 4, 5, 1, 2], [0, 2, 0, 1, 1]), TokenRow([3, 1, 4], [1, 1, 0])]
    batch = collate(rows)
    with torch.no_grad():
        log_probs = token_log_probs(model.network, batch)
        sums = row_log_probs(model.network, batch)
    wanted = model.log_probs([row.ids[:1] for row in rows], [row.ids[1:] for row in rows])
    for row, found, own in zip(rows, log_probs, wanted, strict=True):
        learned = torch.tensor([kind > 0 for kind in row.mask[1:]])
        torch.testing.assert_close(found[: len(own)], own * learned)
        assert (found[len(own) :] == 0).all()
    torch.testing.assert_close(sums, log_probs.sum(1))


def test_gradients_are_those_of_all_logits(model: CausalModel) -> None:
    batch = collate(ROWS)
    logits = model.network(input_ids=batch["ids"], attention_mask=batch["attention"]).logits[:, :-1]
    labels = batch["ids"].masked_fill(batch["mask"] == 0, -100)[:, 1:]
    weights = list(model.network.parameters())
    plain = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), weights)
    torch.testing.assert_close(torch.autograd.grad(-row_log_probs(model.network, batch).sum(), weights), plain)


def test_logits_of_many_tokens_never_stand_in_memory_at_once(
    model: CausalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts, values and gradients are those of the whole."""
    network: Any = model.network
    batch, weights = collate([*ROWS, TokenRow([4, 5, 3, 1, 2], [0, 1, 1, 1, 1])]), list(network.parameters())

    def found() -> tuple[Tensor, tuple[Tensor, ...]]:
        log_probs = token_log_probs(network, batch)
        return log_probs.detach(), torch.autograd.grad((log_probs**2).sum(), weights)

    whole, sizes = found(), []
    monkeypatch.setattr(finetuning, "LOGITS", 3 * network.config.vocab_size)
    hook = network.lm_head.register_forward_hook(lambda module, inputs, logits: sizes.append(len(logits)))
    parts = found()
    hook.remove()
    assert sizes == [3, 3, 2, 2, 3, 3]  # forward, and again from the last part for the gradients
    torch.testing.assert_close(parts, whole)


def test_every_field_enters_the_identity(task: MarginTask) -> None:
    other = MarginTask(task.start, task.data, 2.0)
    assert other.identity() != task.identity()
    before = task.identity()
    write_jsonl(task.data, [asdict(ROWS[1])])
    assert MarginTask(task.start, task.data).identity() != before


def test_rows_are_counted(task: MarginTask) -> None:
    assert (task.examples, task.target_tokens, [row.predicted for row in task.items]) == (2, 4, [3, 1])
    task.given = torch.zeros(2)
    assert task.batch(torch.arange(2), torch.Generator())["examples"].tolist() == [2]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reference_is_the_model_before_its_first_step(task: MarginTask, tmp_path: Path, precision: str) -> None:
    config = TrainingConfig(steps=1, batch=2, lr=0.1, workers=0, precision=precision, report_every=1)
    finetune(task, config, tmp_path / "run", seed=1, name="margin", cluster=None)
    row = (tmp_path / "run/fit/metrics.jsonl").read_text().splitlines()[0]
    assert '"margin": 0.0' in row
    assert (tmp_path / "run/fit" / REFERENCE).is_file()


def test_a_resumed_training_reads_its_reference_again(task: MarginTask, tmp_path: Path) -> None:
    config = TrainingConfig(steps=4, batch=2, lr=0.1, workers=0, checkpoint_every=2)
    whole = finetune(task, config, tmp_path / "whole", seed=1, name="margin", cluster=None)
    stored = task.given.clone()

    class Cut(Exception):
        pass

    cut = MarginTask(task.start, task.data)
    steps = iter(range(3))
    original = cut.loss

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        if next(steps, None) is None:
            raise Cut
        return original(model, batch)

    cut.loss = loss  # type: ignore[method-assign]
    with pytest.raises(Cut):
        finetune(cut, config, tmp_path / "cut", seed=1, name="margin", cluster=None)
    resumed = MarginTask(task.start, task.data)
    resumed.reference = lambda model: pytest.fail("computed again")  # type: ignore[method-assign]
    result = finetune(resumed, config, tmp_path / "cut", seed=1, name="margin", cluster=None)
    assert torch.equal(resumed.given, stored)
    assert result.weights.read_bytes() == whole.weights.read_bytes()


def test_the_tuned_model_is_saved_once(task: MarginTask, tmp_path: Path) -> None:
    config = TrainingConfig(steps=2, batch=2, lr=0.1, workers=0)
    finetune(task, config, tmp_path, seed=1, name="margin", cluster=None)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / MODEL).iterdir()}
    finetune(task, config, tmp_path, seed=1, name="margin", cluster=None)
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / MODEL).iterdir()}
    tuned, start = CausalModel.open(str(tmp_path / MODEL)), CausalModel.open(str(task.start))
    before, after = (m.log_probs([ROWS[0].ids[:1]], [ROWS[0].ids[1:]])[0].sum() for m in (start, tuned))
    assert after > before

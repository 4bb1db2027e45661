"""Pretrained models under adapters: what is trained, written and read again, by us and by PEFT."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open

from mobula.artifacts import ALLOWED, read_jsonl
from mobula.config import build
from mobula.errors import ConfigError, ModelError
from mobula.models import finetune, pretrained
from mobula.models.adapters import BASE, CONFIG, FORMER, WEIGHTS, LoraConfig, add_lora
from mobula.models.causal import CausalModel, SmallShape, word_tokenizer
from mobula.models.finetune import BaseModelConfig
from mobula.models.language_model import Sampling
from mobula.models.sft import SftTask, write_pairs
from mobula.training import TrainingConfig, fit, load_weights
from tests.models.tiny_llama import save_llama

WORDS = ["say", "red", "blue", "one", "two"]
LORA = LoraConfig(4, 8.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = word_tokenizer(WORDS)
    return save_llama(folder, tokenizer)


def scores(model: CausalModel) -> torch.Tensor:
    (found,) = model.log_probs([model.encode("say red")], [model.encode("one two")])
    return found


def low_rank_parts(model: CausalModel) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.network.named_parameters() if ".lora_" in name}


def with_effect(base: Path, lora: LoraConfig = LORA) -> CausalModel:
    """A model whose adapters do something."""
    model = CausalModel.adapted(str(base), lora, seed=0)
    for part in low_rank_parts(model).values():
        torch.nn.init.normal_(part, std=0.3)
    assert (scores(model) - scores(CausalModel.open(str(base)))).abs().max() > 1e-3
    return model


def test_a_fresh_adapter_changes_nothing(base: Path) -> None:
    plain, adapted = CausalModel.open(str(base)), CausalModel.adapted(str(base), LORA, seed=0)
    torch.testing.assert_close(scores(adapted), scores(plain))
    parts = low_rank_parts(adapted)
    assert all(torch.equal(p, parts[n]) for n, p in low_rank_parts(CausalModel.adapted(str(base), LORA, 0)).items())
    assert not all(torch.equal(p, parts[n]) for n, p in low_rank_parts(CausalModel.adapted(str(base), LORA, 1)).items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_low_rank_parts_are_trained_and_saved(base: Path, tmp_path: Path, precision: str) -> None:
    CausalModel.adapted(str(base), LORA, seed=0).save(tmp_path / "start")
    model = CausalModel.open(str(tmp_path / "start"))
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    pairs = [(model.encode("say red"), [*model.encode("one"), model.eos])] * 8
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    task = SftTask(tmp_path / "start", tmp_path / "pairs.jsonl")
    training = TrainingConfig(steps=20, batch=8, lr=0.05, workers=0, precision=precision)
    result = fit(task, training, tmp_path / "fit", seed=0, name="adapter")
    load_weights(model.network, result.weights)
    changed = {name for name, p in model.network.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert changed <= low_rank_parts(model).keys()
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}
    model.save(tmp_path / "trained")
    assert {path.name for path in (tmp_path / "trained").iterdir()} == {CONFIG, WEIGHTS, BASE}
    again = CausalModel.open(str(tmp_path / "trained"))
    torch.testing.assert_close(scores(again), scores(model))
    (continuation,) = again.sample([again.encode("say red")], Sampling(4, 0.0), [0])
    assert again.decode(continuation.ids) == "one"


@dataclass
class Watched(SftTask):
    """Remembers the precision of weights in training, and how often the first layer ran."""

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> Any:
        self.dtypes = {name: p.dtype for name, p in model.named_parameters()}
        self.runs = getattr(self, "runs", 0)
        if self.runs == 0:
            model.model.layers[0].mlp.register_forward_pre_hook(self.count)
        return super().loss(model, batch)

    def count(self, *_: Any) -> None:
        self.runs += 1


def watched(base: Path, folder: Path, **changes: Any) -> tuple[Watched, list[float]]:
    """Two steps of training, and their losses."""
    model = CausalModel.adapted(str(base), LORA, seed=0)
    model.save(folder / "start")
    write_pairs(folder / "pairs.jsonl", [(model.encode("say red"), [*model.encode("one"), model.eos])] * 8)
    task = Watched(folder / "start", folder / "pairs.jsonl")
    training = TrainingConfig(steps=2, batch=8, lr=0.05, workers=0, report_every=1, **changes)
    history = fit(task, training, folder / "fit", seed=0, name="watched").history
    return task, [row["loss"] for row in read_jsonl(history) if "loss" in row]


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_frozen_base_is_held_in_the_precision_of_the_training(base: Path, tmp_path: Path, zero: int) -> None:
    whole, exact = watched(base, tmp_path / "fp32", zero=zero)
    assert set(whole.dtypes.values()) == {torch.float32}
    task, losses = watched(base, tmp_path / "bf16", zero=zero, precision="bf16")
    held = {name for name, dtype in task.dtypes.items() if dtype == torch.bfloat16}
    assert held == {name for name in task.dtypes if ".lora_" not in name and "norm" not in name}
    assert losses == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("zero", [0, 3])
def test_gradient_checkpointing_changes_no_loss(
    base: Path, tmp_path: Path, zero: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the layers, and of logits that are computed in parts."""
    plain, expected = watched(base, tmp_path / "plain", zero=zero)
    monkeypatch.setattr(finetune, "LOGITS", 1)
    task, losses = watched(base, tmp_path / "again", zero=zero, gradient_checkpointing=True)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert (plain.runs, task.runs) == (2, 4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", ["all-linear", ["mlp.down_proj", "v_proj"]], ids=["all", "two"])
def test_peft_opens_what_is_saved(kind: str, targets: Any, base: Path, tmp_path: Path) -> None:
    if kind == "gpt2":
        base, targets = tmp_path / "gpt2", targets if targets == "all-linear" else ["mlp.c_proj", "c_attn"]
        CausalModel.small(word_tokenizer(WORDS), SmallShape(width=32), seed=0).save(base)
    model = with_effect(base, LoraConfig(4, 8.0, targets))
    model.save(tmp_path / "adapter")
    under = transformers.AutoModelForCausalLM.from_pretrained(base)
    opened = peft.PeftModel.from_pretrained(under, tmp_path / "adapter")
    expected = {"gpt2": 4, "llama": 7}[kind] if targets == "all-linear" else 2
    assert len(low_rank_parts(model)) == 2 * 2 * expected
    assert opened.peft_config["default"].base_model_name_or_path == str(base)
    for other in (CausalModel(opened, model.tokenizer, "PEFT"), CausalModel.open(str(tmp_path / "adapter"))):
        torch.testing.assert_close(scores(other), scores(model), atol=1e-4, rtol=0)
    merged = CausalModel(opened.merge_and_unload(), model.tokenizer, "merged")
    torch.testing.assert_close(scores(merged), scores(model), atol=1e-4, rtol=0)


def test_an_adapter_is_saved_in_the_same_bytes(base: Path, tmp_path: Path) -> None:
    """The order of a set differs from process to process, and a training is known by what its start is made of."""
    with_effect(base).save(tmp_path / "one")
    CausalModel.open(str(tmp_path / "one")).save(tmp_path / "two")
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in (CONFIG, WEIGHTS))
    targets = json.loads((tmp_path / "one" / CONFIG).read_text())["target_modules"]
    assert targets == sorted(targets)


def test_an_adapter_knows_its_model(base: Path, tmp_path: Path) -> None:
    CausalModel.adapted(str(base), LORA, seed=0).save(tmp_path)
    facts = json.loads((tmp_path / BASE).read_text())
    assert facts == {"name": str(base), "hash": pretrained.Pretrained.find(str(base)).hash}
    (tmp_path / BASE).write_text(json.dumps({**facts, "hash": "other"}))
    with pytest.raises(ModelError, match="was trained on other files of"):
        CausalModel.open(str(tmp_path))
    (tmp_path / BASE).unlink()
    with pytest.raises(ModelError, match=r"has no base\.json, which names the model under it"):
        CausalModel.open(str(tmp_path))


def test_an_adapter_without_all_of_its_weights_is_refused(base: Path, tmp_path: Path) -> None:
    CausalModel.adapted(str(base), LORA, seed=0).save(tmp_path)
    facts = json.loads((tmp_path / CONFIG).read_text())
    for targets, reason in ((["q_proj"], "has not the weights of the layers"), (["qkv"], "does not fit")):
        (tmp_path / CONFIG).write_text(json.dumps({**facts, "target_modules": targets}))
        with pytest.raises(ModelError, match=reason):
            CausalModel.open(str(tmp_path))


def test_an_adapter_of_the_former_form_says_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / FORMER).write_text("{}")
    with pytest.raises(ModelError, match=f"convert it: `mobula artifact convert {tmp_path} OUT`"):
        CausalModel.open(str(tmp_path))


def test_targets_that_are_not_there_are_named(base: Path) -> None:
    with pytest.raises(ModelError, match="Embedding has no linear layer for LoRA"):
        add_lora(torch.nn.Embedding(4, 4), lora=LORA)
    message = (
        r"model\.lora\.targets: LlamaForCausalLM has no linear layer qkv, embed_tokens; it has down_proj, .*v_proj"
    )
    with pytest.raises(ModelError, match=message):
        CausalModel.adapted(str(base), LoraConfig(4, 8.0, ["q_proj", "qkv", "embed_tokens"]), seed=0)


@pytest.mark.parametrize("targets", ["q_proj", [], [1], None])
def test_targets_are_all_linear_or_names(targets: Any) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets=.*: expected all-linear or a list of names"):
        build(BaseModelConfig, {"base": "x", "lora": {"targets": targets}})
    assert build(BaseModelConfig, {}, ["lora.targets=[q_proj]", "base=x"]).lora.targets == ["q_proj"]


def test_all_weights_are_trained_where_the_config_says_so(base: Path, tmp_path: Path) -> None:
    whole = build(BaseModelConfig, {"base": str(base), "finetune": True}).start(0)
    assert all(p.requires_grad for p in whole.network.parameters())
    whole.tokenizer.chat_template = "{{ messages[0].content }}"
    whole.save(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    assert {path.suffix for path in (tmp_path / "whole").iterdir()} <= ALLOWED  # it may go into an artifact
    again = CausalModel.open(str(tmp_path / "whole"))
    assert again.tokenizer.chat_template == whole.tokenizer.chat_template
    torch.testing.assert_close(scores(again), scores(whole))
    adapted = build(BaseModelConfig, {"base": str(base), "lora": {"rank": 2}}).start(0)
    assert {min(p.shape) for p in adapted.network.parameters() if p.requires_grad} == {2}
    with pytest.raises(ConfigError, match="finetune=true needs base"):
        build(BaseModelConfig, {"finetune": True})


def test_the_weights_file_has_the_names_of_peft(base: Path, tmp_path: Path) -> None:
    CausalModel.adapted(str(base), LoraConfig(4, 8.0, ["q_proj"]), seed=0).save(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as stream:
        names = sorted(stream.keys())
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    assert names[:2] == [f"{path}.lora_A.weight", f"{path}.lora_B.weight"]


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pretrained.PACKAGES, "llm-nothing", ("llm_nothing", "nothing.gguf"))
    with pytest.raises(ModelError, match="package llm_nothing is not installed"):
        CausalModel.open("llm-nothing")

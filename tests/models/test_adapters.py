"""Pretrained models under adapters: what is trained, written and read again, and the model of a package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mobula.errors import ModelError
from mobula.models import pretrained
from mobula.models.causal import ADAPTER, ADAPTER_WEIGHTS, CausalModel, Sampling, SmallShape, word_tokenizer
from mobula.models.lora import add_lora, merge_lora
from mobula.models.sft import SftTask, write_pairs
from mobula.training import TrainingConfig, fit, load_weights
from tests.models.tiny_llama import save_llama

WORDS = ["say", "red", "blue", "one", "two"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = word_tokenizer(WORDS)
    return save_llama(folder, tokenizer)


def scores(model: CausalModel) -> torch.Tensor:
    (found,) = model.log_probs([model.encode("say red")], [model.encode("one two")])
    return found


def test_a_fresh_adapter_changes_nothing(base: Path) -> None:
    plain, adapted = CausalModel.open(str(base)), CausalModel.adapted(str(base), 4, 8.0, seed=0)
    torch.testing.assert_close(scores(adapted), scores(plain))


def test_only_low_rank_parts_are_trained_and_saved(base: Path, tmp_path: Path) -> None:
    CausalModel.adapted(str(base), 4, 8.0, seed=0).save(tmp_path / "start")
    model = CausalModel.open(str(tmp_path / "start"))
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    pairs = [(model.encode("say red"), [*model.encode("one"), model.eos])] * 8
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    task = SftTask(tmp_path / "start", tmp_path / "pairs.jsonl")
    result = fit(task, TrainingConfig(steps=20, batch=8, lr=0.05, workers=0), tmp_path / "fit", seed=0, name="adapter")
    load_weights(model.network, result.weights)
    changed = {name for name, p in model.network.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora" in name for name in changed)
    model.save(tmp_path / "trained")
    assert {path.name for path in (tmp_path / "trained").iterdir()} == {ADAPTER, ADAPTER_WEIGHTS}
    again = CausalModel.open(str(tmp_path / "trained"))
    torch.testing.assert_close(scores(again), scores(model))
    (said,) = again.sample([again.encode("say red")], Sampling(4, 0.0), [0])
    assert again.decode(said.ids) == "one"


def test_an_adapter_knows_its_model(base: Path, tmp_path: Path) -> None:
    CausalModel.adapted(str(base), 4, 8.0, seed=0).save(tmp_path)
    facts = json.loads((tmp_path / ADAPTER).read_text())
    (tmp_path / ADAPTER).write_text(json.dumps({**facts, "base_hash": "other"}))
    with pytest.raises(ModelError, match="was trained on other files of"):
        CausalModel.open(str(tmp_path))


def test_a_network_without_linear_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="Embedding has no linear layer for LoRA"):
        add_lora(torch.nn.Embedding(4, 4), rank=4, alpha=8.0)


@pytest.fixture(params=["llama", "gpt2"])
def adapted(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> CausalModel:
    """A model whose adapters do something."""
    if request.param == "gpt2":
        base = tmp_path / "gpt2"
        CausalModel.small(word_tokenizer(WORDS), SmallShape(width=32), seed=0).save(base)
    model = CausalModel.adapted(str(base), 4, 8.0, seed=0)
    for name, parameter in model.network.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_every_linear_layer_of_a_block_is_adapted(adapted: CausalModel) -> None:
    layers = {name for name, _ in adapted.network.named_parameters() if "lora_a" in name}
    network: Any = adapted.network
    kinds = 4 if network.config.model_type == "gpt2" else 7
    assert len(layers) == 2 * kinds
    assert {name for name, p in adapted.network.named_parameters() if p.requires_grad} == {
        name for name, _ in adapted.network.named_parameters() if "lora" in name
    }


def test_merged_weights_say_what_adapters_say(adapted: CausalModel, tmp_path: Path) -> None:
    assert adapted.adapter is not None
    plain = CausalModel.open(adapted.adapter.base)
    before = scores(adapted)
    assert (before - scores(plain)).abs().max() > 1e-3
    merge_lora(adapted.network)
    torch.testing.assert_close(scores(adapted), before)
    kinds = {name: type(module) for name, module in adapted.network.named_modules()}
    assert kinds == {name: type(module) for name, module in plain.network.named_modules()}
    assert not any("lora" in name for name, _ in adapted.network.named_parameters())


def test_an_adapter_on_gpt2_is_saved_and_read_again(tmp_path: Path) -> None:
    CausalModel.small(word_tokenizer(WORDS), SmallShape(width=32), seed=0).save(tmp_path / "gpt2")
    model = CausalModel.adapted(str(tmp_path / "gpt2"), 4, 8.0, seed=0)
    for name, parameter in model.network.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save(tmp_path / "adapter")
    torch.testing.assert_close(scores(CausalModel.open(str(tmp_path / "adapter"))), scores(model))


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pretrained.PACKAGES, "llm-nothing", ("llm_nothing", "nothing.gguf"))
    with pytest.raises(ModelError, match="package llm_nothing is not installed"):
        CausalModel.open("llm-nothing")

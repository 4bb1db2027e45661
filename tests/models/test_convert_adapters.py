"""LoRA weights as they were written before PEFT's: refused, and converted without a change of any number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from mobula import artifacts
from mobula.cli import main
from mobula.errors import ArtifactError, MobulaError
from mobula.models.adapters import LoraConfig
from mobula.models.causal import CausalModel, word_tokenizer
from mobula.models.convert_adapters import convert
from mobula.models.pretrained import Pretrained
from mobula.training import load_weights
from tests.models.tiny_llama import save_llama

WORDS = ["say", "red", "blue", "one", "two"]
LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
RANK, ALPHA = 2, 6.0


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "base", word_tokenizer(WORDS))


def plant(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """An adapter as it was written: ``lora_a`` f32[r, in] and ``lora_b`` f32[out, r] by layer."""
    network: Any = CausalModel.open(str(base)).network
    weights = {}
    for layer in LAYERS:
        out, into = network.get_submodule(layer).weight.shape
        weights |= {f"{layer}.lora_a": torch.randn(RANK, into), f"{layer}.lora_b": torch.randn(out, RANK)}
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter.safetensors")
    facts = {"base": str(base), "base_hash": Pretrained.find(str(base)).hash, "rank": RANK, "alpha": ALPHA}
    (folder / "adapter.json").write_text(json.dumps(facts))
    return weights


def test_a_former_adapter_is_refused_then_converted_with_equal_scores(base: Path, tmp_path: Path) -> None:
    weights = plant(base, tmp_path / "old")
    with pytest.raises(MobulaError, match="mobula artifact convert"):
        CausalModel.open(str(tmp_path / "old"))
    done = CliRunner().invoke(main, ["artifact", "convert", str(tmp_path / "old"), str(tmp_path / "new")])
    assert done.output == f"{tmp_path / 'new'}: 1 files of LoRA weights converted\n"
    expected: Any = CausalModel.open(str(base))
    with torch.no_grad():
        for layer in LAYERS:
            low_rank = weights[f"{layer}.lora_b"] @ weights[f"{layer}.lora_a"]
            expected.network.get_submodule(layer).weight += ALPHA / RANK * low_rank
    converted = CausalModel.open(str(tmp_path / "new"))
    (ids,) = [converted.encode("say red one two")]
    (found,), (wanted,) = (model.log_probs([ids[:1]], [ids[1:]]) for model in (converted, expected))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert not list((tmp_path / "new").glob("adapter.*"))


def test_an_artifact_is_converted_with_its_manifest(base: Path, tmp_path: Path) -> None:
    network = CausalModel.adapted(str(base), LoraConfig(RANK, ALPHA), seed=0).network
    former = {
        n.replace(".lora_A.default.weight", ".lora_a").replace(".lora_B.default.weight", ".lora_b"): torch.randn_like(p)
        for n, p in network.state_dict().items()
    }

    def fill(folder: Path) -> None:
        plant(base, folder / "agent")
        save_file(former, folder / "selector.safetensors", metadata={"tied": "{}"})
        (folder / "examples.json").write_text("[]")

    old, new = tmp_path / "old", tmp_path / "new"
    artifacts.write(old, kind="rag", method="dro", meta={"hash": "x"}, fill=fill)
    with pytest.raises(ArtifactError, match="mobula artifact convert"):
        load_weights(network, old / "selector.safetensors")
    assert convert(old, new) == 2
    opened = artifacts.open_artifact(new, kind="rag")
    assert (opened.method, opened.meta, opened.path("examples.json").read_text()) == ("dro", {"hash": "x"}, "[]")
    load_weights(network, opened.path("selector.safetensors"))
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, former[name.replace("A.default.weight", "a").replace("B.default.weight", "b")])
    CausalModel.open(str(new / "agent"))
    artifacts.open_artifact(old)  # as it was


def test_what_cannot_be_converted_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(MobulaError, match="nothing to convert"):
        convert(base, tmp_path / "new")
    plant(base, tmp_path / "old")
    with pytest.raises(MobulaError, match="exists; name a folder that does not"):
        convert(tmp_path / "old", base)


def test_weights_of_other_names_stay(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    save_file({"a.lora_a": torch.ones(1, 2), "rows.weight": torch.ones(2)}, tmp_path / "old" / "model.safetensors")
    convert(tmp_path / "old", tmp_path / "new")
    assert sorted(load_file(tmp_path / "new" / "model.safetensors")) == ["a.lora_A.default.weight", "rows.weight"]

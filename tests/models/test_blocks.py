"""Blocks of every known architecture, on tiny random models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from mobula.errors import ModelError
from mobula.models.blocks import (
    ARCHITECTURES,
    add,
    attention_out,
    block,
    blocks,
    capture,
    mlp_out,
    only_above,
    projection_weight,
    replace,
)

LAYERS, WIDTH, POSITIONS = 3, 32, 7
GPT = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": 4, "n_positions": 16, "vocab_size": 40}
LLAMA = {
    "num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 16, "vocab_size": 40, "head_dim": 8,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 0, "eos_token_id": 0},
    "gptj": {**GPT, "rotary_dim": 4, "n_inner": 64, "bos_token_id": 0, "eos_token_id": 0},
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 4},
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}
ROWS, PLACES = torch.tensor([0, 1]), torch.tensor([3, 4])


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param, pad_token_id=0, **SIZES[request.param])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Two rows, the second padded on the left."""
    ids = torch.randint(1, 40, (2, POSITIONS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def logits(network: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return network(**inputs, use_cache=False).logits


def captured(network: nn.Module, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """All states of a layer f[B, n, d]."""
    rows, positions = torch.meshgrid(torch.arange(2), torch.arange(POSITIONS), indexing="ij")
    with capture(network, [layer], rows.flatten(), positions.flatten()) as states:
        logits(network, inputs)
    return states[layer].view(2, POSITIONS, WIDTH)


def hooks(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + ("forward" in vars(m)) for m in blocks(network))


def test_captured_states_are_the_hidden_states(network: nn.Module, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        hidden = network(**inputs, output_hidden_states=True).hidden_states
    with capture(network, [0, LAYERS - 2], ROWS, PLACES) as states:
        logits(network, inputs)
    for layer, found in states.items():
        assert torch.equal(found, hidden[layer + 1][ROWS, PLACES])
    assert sorted(states) == [0, LAYERS - 2]


def test_a_state_in_its_own_place_changes_nothing(network: nn.Module, inputs: dict[str, Tensor]) -> None:
    whole = logits(network, inputs)
    with capture(network, [1], ROWS, PLACES) as states:
        logits(network, inputs)
    with replace(network, 1, ROWS, PLACES, states[1]):
        assert torch.equal(logits(network, inputs), whole)
    with add(network, 1, ROWS, PLACES, torch.zeros(2, WIDTH)):
        assert torch.equal(logits(network, inputs), whole)


@pytest.mark.parametrize("layer", range(LAYERS - 1))
def test_a_changed_state_changes_its_own_row_from_its_position_on(
    network: nn.Module, inputs: dict[str, Tensor], layer: int
) -> None:
    whole, at = logits(network, inputs), 3
    with replace(network, layer, torch.tensor([0]), torch.tensor([at]), torch.ones(1, WIDTH)):
        changed = (logits(network, inputs) != whole).any(-1)
    assert not changed[1].any()
    assert changed[0].tolist() == [position >= at for position in range(POSITIONS)]
    assert torch.equal(logits(network, inputs), whole)


def test_added_states_add_up(network: nn.Module, inputs: dict[str, Tensor]) -> None:
    before = captured(network, inputs, 1)
    twice = torch.tensor([0, 0]), torch.tensor([2, 2])
    with add(network, 1, *twice, torch.ones(2, WIDTH)):
        after = captured(network, inputs, 1)
    before[0, 2] += 2
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_layers_above_give_the_logits_of_all(network: nn.Module, inputs: dict[str, Tensor], layer: int) -> None:
    whole, states = logits(network, inputs), captured(network, inputs, layer)
    with torch.no_grad():
        ran = []
        handles = [m.register_forward_pre_hook(lambda m, _: ran.append(m)) for m in map(mlp, blocks(network))]
        with only_above(network, layer, states):
            assert torch.equal(logits(network, inputs), whole)
            embedded = {**inputs, "inputs_embeds": states}
            del embedded["input_ids"]
            assert torch.equal(logits(network, embedded), whole)
        for handle in handles:
            handle.remove()
    assert len(ran) == 2 * (LAYERS - 1 - layer)
    assert torch.equal(logits(network, inputs), whole)


def mlp(module: nn.Module) -> nn.Module:
    return module.get_submodule("mlp")


def test_gradients_flow_to_replaced_states(network: nn.Module, inputs: dict[str, Tensor]) -> None:
    states = torch.zeros(2, WIDTH, requires_grad=True)
    with replace(network, 0, ROWS, PLACES, states):
        network(**inputs, use_cache=False).logits.sum().backward()
    assert states.grad is not None
    assert (states.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("part", [mlp_out, attention_out])
def test_projections_by_hand(network: nn.Module, inputs: dict[str, Tensor], part: Any) -> None:
    projection = part(network, 1)
    seen: list[Tensor] = []
    handle = projection.register_forward_hook(lambda m, args, output: seen.extend([args[0], output]))
    logits(network, inputs)
    handle.remove()
    weight = projection_weight(network, projection)
    assert weight.shape[0] == WIDTH
    bias = 0 if projection.bias is None else projection.bias
    torch.testing.assert_close(seen[0] @ weight.T + bias, seen[1])
    assert weight.data_ptr() == projection.weight.data_ptr()


def test_hooks_go_after_an_error(network: nn.Module, inputs: dict[str, Tensor]) -> None:
    one, before = torch.ones(1, dtype=torch.long), hooks(network)  # transformers may have left its own
    managers = [
        capture(network, [0, 1], one, one),
        replace(network, 0, one, one, torch.ones(1, WIDTH)),
        add(network, 0, one, one, torch.ones(1, WIDTH)),
        only_above(network, 1, torch.ones(2, POSITIONS, WIDTH)),
    ]
    for manager in managers:
        with pytest.raises(KeyError), manager:
            assert hooks(network) > before
            raise KeyError
        assert hooks(network) == before
    with pytest.raises(ModelError, match="layer 3: the model has layers 0 to 2"), capture(network, [0, 3], one, one):
        pass
    assert hooks(network) == before


def test_layers_are_counted_from_0(network: nn.Module) -> None:
    assert block(network, LAYERS - 1) is blocks(network)[-1]
    with pytest.raises(ModelError, match="layer -1"):
        block(network, -1)


def test_an_unknown_architecture_is_named() -> None:
    config = transformers.AutoConfig.for_model("gpt_neox", num_hidden_layers=1, hidden_size=16, vocab_size=9,
                                               num_attention_heads=2, intermediate_size=16)  # fmt: skip
    network = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=r"architecture 'gpt_neox' are not known .*; add it to .*ARCHITECTURES"):
        blocks(network)

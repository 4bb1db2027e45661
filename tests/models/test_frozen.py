"""States without the weights that a base gives back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mobula.models.frozen import leave_out_frozen


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    layers[0].requires_grad_(False)
    leave_out_frozen(layers)
    return layers


def test_frozen_weights_are_in_no_state_and_stay_when_one_is_loaded() -> None:
    one, other = network(), nn.Sequential(network())  # also as part of a larger module
    assert sorted(one.state_dict()) == ["1.bias", "1.weight"]
    assert sorted(other.state_dict()) == ["0.1.bias", "0.1.weight"]
    other.load_state_dict({"0.1.weight": torch.ones(2, 3), "0.1.bias": torch.ones(2)})
    assert torch.equal(other[0][0].weight, one[0].weight)
    assert torch.equal(other[0][1].weight, torch.ones(2, 3))


def test_a_trained_weight_may_not_be_missing() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.bias"):
        network().load_state_dict({"1.weight": torch.ones(2, 3)})

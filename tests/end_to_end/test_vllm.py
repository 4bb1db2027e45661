"""vLLM against PyTorch on the same pretrained model: equal scores, equal greedy texts, and draws of their own seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mobula.errors import ModelError
from mobula.models.causal import CausalModel
from mobula.models.engines import open_model
from mobula.models.language_model import EngineConfig, LanguageModel, Sampling, vllm_installed
from tests.models.changed_adapter import BASE, save_changed_adapter

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.language,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not vllm_installed(), reason="vLLM is not installed"),
]
ENGINE = EngineConfig(kind="vllm", context=256, cache_gb=0.25)
PROMPTS = ["The capital of France is the city of", "Once upon a time there was", "2 + 2 ="]
TARGETS = [" Paris, of course.", " a small house", " 4"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_changed_adapter(tmp_path_factory.mktemp("adapter") / "model")


@pytest.fixture(scope="module")
def pair(adapter: Path) -> tuple[CausalModel, LanguageModel]:
    """The adapted model, opened by both engines."""
    return CausalModel.open(str(adapter)), open_model(str(adapter), ENGINE)


def _scores(model: LanguageModel) -> torch.Tensor:
    return torch.cat(model.log_probs(*([model.encode(text) for text in texts] for texts in (PROMPTS, TARGETS))))


def test_scores_of_an_adapter_are_equal_and_not_those_of_its_base(pair: tuple[CausalModel, LanguageModel]) -> None:
    ours, theirs = map(_scores, pair)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    base = open_model(BASE, ENGINE)
    torch.testing.assert_close(_scores(base), _scores(CausalModel.open(BASE)), atol=1e-3, rtol=0)
    assert (_scores(base) - theirs).abs().max() > 0.1
    # The base is asked through the engine that the adapter has: one start for both.
    assert base._engine is pair[1]._engine  # type: ignore[attr-defined]


def test_greedy_texts_are_equal(pair: tuple[CausalModel, LanguageModel]) -> None:
    prompts, greedy = [pair[0].encode(text) for text in PROMPTS], Sampling(10, temperature=0)
    ours, theirs = (model.sample(prompts, greedy, [0] * 3) for model in pair)
    for one, other in zip(ours, theirs, strict=True):
        assert (other.ids, other.ended, other.log_q) == (one.ids, one.ended, one.log_q)
        assert other.log_probs == pytest.approx(one.log_probs, abs=1e-3)


@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, 0.7, 0.8)], ids=["plain", "nucleus"])
def test_a_draw_depends_on_its_seed_alone_and_knows_its_probabilities(
    pair: tuple[CausalModel, LanguageModel], sampling: Sampling
) -> None:
    torch_model, model = pair
    prompts = [model.encode(text) for text in PROMPTS]
    together = model.sample(prompts, sampling, [1, 2, 3])
    assert [
        model.sample([prompt], sampling, [seed])[0].ids for prompt, seed in zip(prompts, (1, 2, 3), strict=True)
    ] == [one.ids for one in together]
    assert model.sample(prompts[:1], sampling, [4])[0].ids != together[0].ids
    for prompt, one in zip(prompts, together, strict=True):
        drawn = [*one.ids, *([model.eos] if one.ended else [])]
        assert one.log_probs == pytest.approx(torch_model.log_probs([prompt], [drawn])[0].tolist(), abs=1e-3)
        if sampling.exact:
            assert one.log_q == one.log_probs
        else:
            assert sum(one.log_q) > sum(one.log_probs)  # the unlikely tail is cut


def test_what_does_not_fit_is_an_error(pair: tuple[CausalModel, LanguageModel]) -> None:
    with pytest.raises(ModelError, match=r"250 tokens and 10 more .* 256; raise engine\.context"):
        pair[1].sample([[5] * 250], Sampling(10), [0])
    with pytest.raises(ValueError, match="no token"):
        pair[1].log_probs([[]], [[5]])
    assert pair[1].sample([], Sampling(10), []) == []

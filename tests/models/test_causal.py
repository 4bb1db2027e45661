"""Causal language models: scores and samples that neither padding nor company changes."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from mobula.agents.language import parse, serialise
from mobula.errors import ModelError
from mobula.models.causal import SORTED, CausalModel, SmallShape, _draw, word_tokenizer
from mobula.models.language_model import Sampling

PROGRAM = "R1 = Calc(3 * (4 - 2))\nR2 = Calc(R1 + 5)\nAnswer(R2)"
TEXTS = [PROGRAM, "S1: look up e5 's mentor\nS2: find boss of R1", "how many coins are there now ?"]
# Sums of floats in another order differ in the last digits.
CLOSE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(scope="module")
def model() -> CausalModel:
    model = CausalModel.small(word_tokenizer(TEXTS), SmallShape(layers=2, width=32, heads=4, positions=64), seed=0)
    for parameter in model.network.parameters():  # fresh weights predict nearly uniformly
        parameter.data.mul_(4)
    return model


@pytest.fixture(scope="module")
def prompts(model: CausalModel) -> list[list[int]]:
    ids = [model.encode(text) for text in TEXTS]
    return [row[:n] for row in ids for n in (1, 4, 9) if n <= len(row)]


def test_words_marks_and_lines_survive_the_tokenizer(model: CausalModel) -> None:
    ids = model.encode(PROGRAM)
    assert len(ids) == 26
    assert serialise(parse(model.decode(ids))) == PROGRAM
    assert model.decode(model.encode(TEXTS[1])) == "S1 : look up e5 's mentor \n S2 : find boss of R1"
    assert model.encode("zebra") == [model.tokenizer.unk_token_id]


def test_scores_are_the_plain_ones(model: CausalModel, prompts: list[list[int]]) -> None:
    targets = [[5, 6, model.eos], [7], [8, 9, 10, 11, model.eos]] * 3
    found = model.log_probs(prompts[:8], targets[:8])
    for prompt, target, scores in zip(prompts, targets, found, strict=False):
        with torch.no_grad():
            logits = model.network(input_ids=torch.tensor([[*prompt, *target]])).logits[0]
        plain = [logits[len(prompt) + i - 1].log_softmax(-1)[token] for i, token in enumerate(target)]
        assert len(scores) == len(target)
        torch.testing.assert_close(scores, torch.stack(plain), **CLOSE)


def test_scores_do_not_depend_on_company(model: CausalModel, prompts: list[list[int]]) -> None:
    targets = [[5, 6, 7]] * len(prompts)
    together = model.log_probs(prompts, targets)
    alone = [model.log_probs([prompt], [target])[0] for prompt, target in zip(prompts, targets, strict=True)]
    few = model.log_probs(prompts, targets, batch_tokens=20)
    for one, other, third in zip(together, alone, few, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
        torch.testing.assert_close(one, third, **CLOSE)


def test_an_empty_prompt_is_refused(model: CausalModel) -> None:
    with pytest.raises(ValueError, match="no token"):
        model.log_probs([[]], [[3]])


@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, 0.7, 0.9), Sampling(12, 0.0)], ids=str)
def test_a_sample_depends_on_its_seed_alone(model: CausalModel, prompts: list[list[int]], sampling: Sampling) -> None:
    seeds = list(range(100, 100 + len(prompts)))
    together = model.sample(prompts, sampling, seeds)
    alone = [model.sample([prompt], sampling, [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    backwards = model.sample(prompts[::-1], sampling, seeds[::-1], batch=3)[::-1]
    assert [c.ids for c in together] == [c.ids for c in alone] == [c.ids for c in backwards]
    assert {c.ended for c in together} == {True, False} or sampling.temperature == 0


def test_sampled_log_probs_are_those_of_scoring(model: CausalModel, prompts: list[list[int]]) -> None:
    drawn = model.sample(prompts, Sampling(10, 0.8, 0.95), list(range(len(prompts))))
    targets = [[*c.ids, model.eos] if c.ended else list(c.ids) for c in drawn]
    for continuation, scores in zip(drawn, model.log_probs(prompts, targets), strict=True):
        torch.testing.assert_close(torch.tensor(continuation.log_probs), scores, **CLOSE)


def test_greedy_follows_the_most_probable_token_without_a_cache(model: CausalModel, prompts: list[list[int]]) -> None:
    for prompt, found in zip(prompts, model.sample(prompts, Sampling(8, 0.0), [0] * len(prompts)), strict=True):
        ids = list(prompt)
        for token in found.ids:
            with torch.no_grad():
                assert int(model.network(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_draws_have_the_distribution_of_the_model() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    uniform = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    for sampling in (Sampling(1), Sampling(1, 0.5)):
        wanted = torch.softmax(logits[0] / sampling.temperature, -1)
        counts = Counter(_draw(logits.expand(4000, -1), sampling, uniform)[0].tolist())
        assert [counts[i] / 4000 for i in range(4)] == pytest.approx(wanted.tolist(), abs=1e-3)


@pytest.mark.parametrize(
    ("sampling", "drawn"), [(Sampling(1), 5), (Sampling(1, 0.7), 5), (Sampling(1, 1.3, 0.8), 3)], ids=str
)
def test_a_token_is_drawn_as_often_as_its_proposal_says(sampling: Sampling, drawn: int) -> None:
    """The probability that is kept beside it is that of the draw, temperature and nucleus included."""
    logits, count = torch.tensor([[2.0, 0.0, 1.0, -1.0, 0.5]]), 4000
    tokens, log_q = _draw(logits.expand(count, -1), sampling, torch.arange(count, dtype=torch.float64) / count)
    share = torch.bincount(tokens, minlength=5).double() / count
    assert int((share > 0).sum()) == drawn
    torch.testing.assert_close(log_q.exp(), share[tokens], atol=1e-3, rtol=0)


def test_the_nucleus_is_the_smallest_set_of_that_mass() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    for top_p, size in ((0.4, 1), (0.5, 1), (0.6, 2), (0.8001, 3), (1.0, 4)):
        drawn = _draw(logits.expand(1000, -1), Sampling(1, 1.0, top_p - 1e-6), uniform)[0]
        assert len(set(drawn.tolist())) == size
    counts = Counter(_draw(logits.expand(1000, -1), Sampling(1, 1.0, 0.7), uniform)[0].tolist())
    assert counts[0] / 1000 == pytest.approx(0.5 / 0.8, abs=0.01)


@pytest.mark.parametrize(
    "sampling", [Sampling(1), Sampling(1, 0.7), Sampling(1, 1.0, 0.9), Sampling(1, 3.0, 0.99)], ids=str
)
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0], ids=["flat", "usual", "peaked"])
def test_a_large_vocabulary_is_drawn_from_without_sorting_it(sampling: Sampling, scale: float) -> None:
    """Frequencies of groups of tokens, the probability kept beside each draw, and the nucleus, against a plain sort."""
    size, count = 2 * SORTED, 4000
    logits = scale * torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    likely = torch.softmax(logits[0].double() / sampling.temperature, -1)
    ranked, order = likely.sort(descending=True, stable=True)
    inside = torch.zeros(size, dtype=torch.bool)
    inside[order] = ranked.cumsum(0) - ranked < sampling.top_p
    wanted = likely * inside / (likely * inside).sum()
    uniform = torch.arange(count, dtype=torch.float64) / count
    parts = [_draw(logits.expand(len(part), -1), sampling, part) for part in uniform.split(500)]
    tokens, log_q = (torch.cat(each) for each in zip(*parts, strict=True))
    assert bool(inside[tokens].all())
    torch.testing.assert_close(log_q.exp(), wanted[tokens])
    drawn = torch.bincount(tokens, minlength=size).double() / count
    parts = (values.reshape(-1, 16).sum(0) for values in (drawn, wanted))
    torch.testing.assert_close(*parts, atol=0.02, rtol=0)


def test_the_last_token_is_drawn_where_rounding_leads_behind_it() -> None:
    size = 2 * SORTED
    logits = torch.full((1, size), -math.inf)
    logits[0, [5, 9]] = 0.0
    for top_p in (1.0, 0.9):
        tokens, log_q = _draw(logits, Sampling(1, 1.0, top_p), torch.ones(1, dtype=torch.float64))
        assert tokens.item() in (5, 9) and log_q.exp().item() == pytest.approx(0.5)


def test_what_ends_and_what_is_cut(model: CausalModel, prompts: list[list[int]]) -> None:
    drawn = model.sample(prompts * 4, Sampling(6), list(range(4 * len(prompts))))
    for c in drawn:
        assert model.eos not in c.ids
        assert len(c.log_probs) == len(c.ids) + c.ended
        assert c.ended or len(c.ids) == 6
        assert all(score <= 0 and math.isfinite(score) for score in c.log_probs)


def test_a_saved_model_is_the_same_model(model: CausalModel, prompts: list[list[int]], tmp_path: Path) -> None:
    model.save(tmp_path)
    opened = CausalModel.open(str(tmp_path))
    assert opened.encode(PROGRAM) == model.encode(PROGRAM)
    assert (opened.eos, opened.pad) == (model.eos, model.pad)
    targets = [[5, 6, 7]] * len(prompts)
    for one, other in zip(model.log_probs(prompts, targets), opened.log_probs(prompts, targets), strict=True):
        assert torch.equal(one, other)


def test_the_same_seed_makes_the_same_small_model() -> None:
    tokenizer = word_tokenizer(TEXTS)
    one, same, other = (CausalModel.small(tokenizer, SmallShape(width=32), seed) for seed in (1, 1, 2))
    weights = [model.network.transformer.wte.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_tokenizer_without_an_end_is_refused(model: CausalModel) -> None:
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=model.tokenizer.backend_tokenizer, pad_token="<pad>")
    with pytest.raises(ModelError, match="no end-of-sequence"):
        CausalModel(model.network, endless, "endless")

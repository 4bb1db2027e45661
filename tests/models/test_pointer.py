"""The copying model: what it computes token by token is what it computes at once, and it opens what it saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mobula.models.causal import CausalModel, word_tokenizer
from mobula.models.language_model import Sampling
from mobula.models.pointer import PointerConfig, PointerLM, occurring

MARKERS = ("<QUERY>", "<turn>", "<SEARCH>", "<FACT>", "<FINAL>")
TEXT = "what is the home of ana lee ? <turn> <QUERY> home of ana lee <eos> [1] ana lee lives in rome . bo lee <turn>"
# Sums of floats in another order, in logits of size 10.
CLOSE = {"atol": 3e-4, "rtol": 0}


@pytest.fixture(scope="module")
def model() -> CausalModel:
    tokenizer = word_tokenizer([TEXT], MARKERS)
    config = PointerConfig(
        vocab_size=len(tokenizer),
        width=32,
        heads=2,
        query_id=3,
        turn_id=4,
        words_from=8,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = CausalModel.pointer(tokenizer, config, seed=0)
    for parameter in model.network.parameters():
        parameter.data.mul_(2)
    return model


@pytest.fixture(scope="module")
def ids(model: CausalModel) -> list[int]:
    return model.encode(TEXT)


def network(model: CausalModel) -> PointerLM:
    assert isinstance(model.network, PointerLM)
    return model.network


def test_markers_stand_first_in_the_vocabulary(model: CausalModel) -> None:
    assert [model.encode(marker) for marker in MARKERS] == [[3], [4], [5], [6], [7]]
    assert model.decode(model.encode(TEXT)) == TEXT.replace(" <eos>", "")


def test_token_by_token_is_as_at_once(model: CausalModel, ids: list[int]) -> None:
    """Cache, convolution and flags (exsearch 11.6) carry over; in chunks and behind padding, too."""
    row = torch.tensor([ids])
    with torch.inference_mode():
        whole = network(model)(input_ids=row).logits
        for sizes in ([1] * len(ids), [7, 1, 1, 12, len(ids) - 21]):
            cache, parts, start = network(model).new_cache(), [], 0
            for size in sizes:
                places = torch.arange(start, start + size)[None]
                mask = torch.ones(1, start + size, dtype=torch.long)
                part = network(model)(
                    input_ids=row[:, start : start + size],
                    attention_mask=mask,
                    position_ids=places,
                    past_key_values=cache,
                    use_cache=True,
                )
                parts.append(part.logits)
                start += size
            torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


def test_scores_and_samples_do_not_depend_on_company(model: CausalModel, ids: list[int]) -> None:
    prompts = [ids[:n] for n in (3, 9, 14, 20, len(ids))]
    targets = [[9, 10, 1]] * len(prompts)
    alone = [model.log_probs([prompt], [target])[0] for prompt, target in zip(prompts, targets, strict=True)]
    for one, other in zip(model.log_probs(prompts, targets), alone, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    drawn = model.sample(prompts, Sampling(8), range(len(prompts)))
    apart = [model.sample([prompt], Sampling(8), [seed])[0] for seed, prompt in enumerate(prompts)]
    assert [c.ids for c in drawn] == [c.ids for c in apart]
    scored = model.log_probs(prompts, [[*c.ids, model.eos] if c.ended else list(c.ids) for c in drawn])
    for c, scores in zip(drawn, scored, strict=True):
        torch.testing.assert_close(torch.tensor(c.log_probs), scores, **CLOSE)


def test_what_is_remembered_of_a_chat_changes_nothing(model: CausalModel, ids: list[int]) -> None:
    """Turns of different lengths in one batch, some shorter than the convolution, one without a past."""
    first = [ids[:n] for n in (3, 12, 20, 9)]
    later = [[*row, *ids[5 : 5 + more]] for row, more in zip(first, (2, 11, 1, 6), strict=True)] + [ids[:7]]
    seeds = range(len(later))
    memory: list[Any] = [None] * len(first)
    model.sample(first, Sampling(6), seeds[:4], memory=memory)
    assert [kept.ids.tolist() for kept in memory] == first
    memory.append(None)
    quick = model.sample(later, Sampling(6), seeds, batch=3, memory=memory)
    plain = model.sample(later, Sampling(6), seeds)
    assert [kept.ids.tolist() for kept in memory] == later
    for one, other in zip(quick, plain, strict=True):
        assert one.ids == other.ids
        torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(other.log_probs), **CLOSE)


def test_what_does_not_begin_a_prompt_is_not_used(model: CausalModel, ids: list[int]) -> None:
    memory: list[Any] = [None]
    model.sample([ids[:9]], Sampling(3), [0], memory=memory)
    for prompt in (ids[1:12], ids[:9], ids[:4]):
        again = model.sample([prompt], Sampling(5), [1], memory=list(memory))
        assert again[0].ids == model.sample([prompt], Sampling(5), [1])[0].ids


def test_logits_are_log_probabilities_that_never_vanish(model: CausalModel, ids: list[int]) -> None:
    with torch.inference_mode():
        logits = network(model)(input_ids=torch.tensor([ids])).logits
    torch.testing.assert_close(logits.logsumexp(-1), torch.zeros(1, len(ids)), atol=1e-5, rtol=0)
    assert float(logits.min()) >= torch.tensor(1e-4 / len(model.tokenizer)).log() - 1e-4


def test_learned_tokens_are_scored_as_by_all_logits(model: CausalModel, ids: list[int]) -> None:
    """Values and gradients, for rows of unequal length."""
    rows = torch.tensor([ids, [*ids[: len(ids) - 5], *[0] * 5]])
    mask = torch.ones_like(rows)
    mask[1, -5:] = 0
    learned = (torch.arange(len(ids) - 1) % 3 == 1).expand(2, -1) & (mask[:, 1:] > 0)
    scored = network(model)(input_ids=rows, attention_mask=mask, learned=learned).logits
    logits = network(model)(input_ids=rows, attention_mask=mask).logits[:, :-1]
    wanted = torch.log_softmax(logits, -1).gather(-1, rows[:, 1:, None]).squeeze(-1)[learned]
    torch.testing.assert_close(scored, wanted)
    weights = list(network(model).parameters())
    both = (torch.autograd.grad(each.sum(), weights) for each in (scored, wanted))
    torch.testing.assert_close(*both, atol=1e-4, rtol=1e-3)


def test_flags_look_back_only_and_at_words_only(model: CausalModel, ids: list[int]) -> None:
    config = network(model).config
    row = torch.tensor([ids])
    found = occurring(row, torch.ones_like(row), len(ids), config)[0]
    words = TEXT.split()
    in_query = [words[i] for i, flag in enumerate(found[:, 0].tolist()) if flag]
    in_question = [(i, words[i]) for i, flag in enumerate(found[:, 1].tolist()) if flag]
    assert in_query == ["ana", "lee", "lee"]  # of the passages; in the sub-query nothing stands twice
    assert [word for _, word in in_question] == ["home", "of", "ana", "lee", "ana", "lee", "lee"]
    for n in range(1, len(ids)):
        torch.testing.assert_close(occurring(row[:, :n], torch.ones(1, n), n, config)[0], found[:n])


def test_a_new_sub_query_replaces_the_one_before(model: CausalModel) -> None:
    ids = model.encode("what is ? <turn> <QUERY> ana <eos> <turn> ana <QUERY> bo <eos> <turn> ana bo")
    row = torch.tensor([ids])
    found = occurring(row, torch.ones_like(row), len(ids), network(model).config)[0, :, 0].tolist()
    assert found == [False] * 8 + [True] + [False] * 4 + [False, True]


def test_it_opens_what_it_saved(model: CausalModel, ids: list[int], tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    opened = CausalModel.open(str(tmp_path / "model"))
    row = torch.tensor([ids])
    with torch.inference_mode():
        torch.testing.assert_close(opened.network(input_ids=row).logits, model.network(input_ids=row).logits)
    assert opened.encode(TEXT) == ids


def test_the_copy_head_learns_to_copy(model: CausalModel) -> None:
    """What follows the flag-less marker is the token before it: solved within a few steps by copying alone."""
    generator = torch.Generator().manual_seed(0)
    copying = CausalModel.pointer(model.tokenizer, network(model).config, seed=1).network.train()
    optimizer = torch.optim.AdamW(copying.parameters(), lr=3e-3)
    for _ in range(150):
        rows = torch.randint(8, len(model.tokenizer), (32, 9), generator=generator)
        rows[:, 7] = 5
        rows[:, 8] = rows[:, 3]
        loss = -copying(input_ids=rows).logits[:, 7].gather(-1, rows[:, 8:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.3

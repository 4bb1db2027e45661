"""A chat template taken apart: the tokens of turns that are put together are those of the template's own text.

The templates here have the forms in which published models differ: who ends a turn, and with what around it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mobula.errors import ModelError
from mobula.models import causal
from mobula.models.causal import CausalModel, SmallShape, word_tokenizer
from mobula.models.chat_template import ChatTemplate
from mobula.models.language_model import Sampling
from mobula.models.turns import end_of_turn, render

ANSWER = "{% if add_generation_prompt %}assistant : {% endif %}"
PLAIN = "{% for m in messages %}{{ m.role }} : {{ m.content }}{{ eos_token }}{% endfor %}" + ANSWER
# A space before what the assistant says, and only an assistant's turn is ended, by the end of sequence.
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}<inst> {{ m.content }}</inst>"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Turns end with a token of their own and a line end; there is no system turn.
TURN_ENDS = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content | trim }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
DATED = "today : {{ strftime_now('%d %b %Y') }}\n" + PLAIN
TRIMMING = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
UNENDED = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}" + ANSWER
SPECIAL = ["<inst>", "</inst>", "<turn>", "</turn>"]
MESSAGES = [("user", "the home of ana"), ("assistant", "rome"), ("user", "more")]


def model(template: str) -> CausalModel:
    tokenizer = word_tokenizer(["user assistant today : what is the home of ana rome more be brief 01 Jan 2025\n"])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return CausalModel.small(tokenizer, SmallShape(1, 16, 2, 64), 0)


@pytest.mark.parametrize("template", [PLAIN, BRACKETS, TURN_ENDS, DATED], ids=["plain", "brackets", "turns", "dated"])
def test_turns_put_together_are_the_templates_own(template: str) -> None:
    made = model(template)
    parts = ChatTemplate(made)
    ids = [*parts.first("the home of ana"), *made.encode("rome"), made.eos, *parts.next("more")]
    assert ids == made.encode(render(made.tokenizer, MESSAGES))
    assert made.tokenizer.unk_token_id not in ids


@pytest.mark.parametrize(("template", "end"), [(PLAIN, "<eos>"), (BRACKETS, "<eos>"), (TURN_ENDS, "</turn>")])
def test_a_turn_ends_as_the_template_ends_it(template: str, end: str) -> None:
    """The end of sequence is another token in some models, and would never be drawn behind a turn."""
    made = model(template)
    assert made.eos == made.tokenizer.convert_tokens_to_ids(end)
    assert made.stops == {made.eos, made.tokenizer.eos_token_id}


def test_without_a_template_a_text_ends_with_the_end_of_sequence() -> None:
    tokenizer = word_tokenizer(["a b"])
    assert end_of_turn(tokenizer) is None
    assert CausalModel.small(tokenizer, SmallShape(1, 16, 2, 8), 0).eos == tokenizer.eos_token_id


def test_the_ends_of_a_generation_config_stop_sampling_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model may end with besides a turn's end is neither part of the text nor an end of the turn."""
    made = model(TURN_ENDS)
    network: Any = made.network
    network.generation_config.eos_token_id = [made.eos, made.tokenizer.convert_tokens_to_ids("</inst>")]
    again = CausalModel(network, made.tokenizer, "again")
    other = again.tokenizer.convert_tokens_to_ids("</inst>")
    word = again.encode("rome")[0]
    for tokens, ids, scores, ended in (
        ([word, again.eos], 1, 2, True),
        ([word, other], 1, 1, False),
        ([other], 0, 0, False),
    ):
        draws = iter(tokens)

        def draw(logits: torch.Tensor, *rest: Any) -> Any:
            return torch.tensor([next(draws)]), torch.zeros(1, dtype=torch.float64)  # noqa: B023

        monkeypatch.setattr(causal, "_draw", draw)
        (found,) = again.sample([again.encode("the home")], Sampling(4), [0])
        assert (len(found.ids), len(found.log_probs), len(found.log_q), found.ended) == (ids, scores, scores, ended)


def test_a_system_turn_that_a_template_refuses_stands_before_the_first_user_turn() -> None:
    made = model(TURN_ENDS)
    asked = render(made.tokenizer, [("system", "be brief"), ("user", "the home of ana")])
    assert asked == "<turn>user\nbe brief\n\nthe home of ana</turn>\n<turn>assistant\n"
    made.tokenizer.chat_template = "{{ raise_exception('nothing at all') }}"
    with pytest.raises(ModelError, match=r"refuses \['user'\]: nothing at all"):
        render(made.tokenizer, [("user", "the home of ana")])


def test_a_prompt_is_the_same_on_another_day() -> None:
    tokenizer = model(DATED).tokenizer
    assert render(tokenizer, MESSAGES).startswith("today : 01 Jan 2025\n")
    tokenizer.chat_template = "{% set day = strftime_now('%A, %Y-%m-%d') if strftime_now is defined %}{{ day }}"
    assert render(tokenizer, MESSAGES) == "Wednesday, 2025-01-01"


@pytest.mark.parametrize("template", [TRIMMING, UNENDED], ids=["drops", "does not end"])
def test_templates_that_do_not_keep_an_assistants_turn_are_refused(template: str) -> None:
    with pytest.raises(ModelError, match="does not keep an assistant's turn"):
        ChatTemplate(model(template)).first("the home of ana")

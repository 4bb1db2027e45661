"""A chat template taken apart: the tokens of turns that are put together are those of the template's own text."""

from __future__ import annotations

import pytest

from mobula.errors import ModelError
from mobula.models.causal import CausalModel, SmallShape, word_tokenizer
from mobula.models.chat_template import ChatTemplate

PLAIN = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
TRIMMING = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
UNENDED = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def model(template: str) -> CausalModel:
    tokenizer = word_tokenizer(["user assistant : what is the home of ana rome more"])
    tokenizer.chat_template = template
    return CausalModel.small(tokenizer, SmallShape(1, 16, 2, 64), 0)


def test_turns_put_together_are_the_templates_own() -> None:
    made = model(PLAIN)
    template = ChatTemplate(made)
    ids = [*template.first("the home of ana"), *made.encode("rome"), made.eos, *template.next("more")]
    messages = [
        {"role": "user", "content": "the home of ana"},
        {"role": "assistant", "content": "rome"},
        {"role": "user", "content": "more"},
    ]
    whole = made.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ids == made.encode(whole)


@pytest.mark.parametrize("template", [TRIMMING, UNENDED], ids=["drops", "does not end"])
def test_templates_that_do_not_keep_an_assistants_turn_are_refused(template: str) -> None:
    with pytest.raises(ModelError, match="does not keep an assistant's turn"):
        ChatTemplate(model(template)).first("the home of ana")

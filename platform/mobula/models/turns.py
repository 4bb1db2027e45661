"""Turns of a chat as a tokenizer's chat template writes them: prompts, and the token that ends a turn.

A template may write the day's date; here it is always :data:`DATE`, so that a prompt is the same tomorrow.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from mobula.errors import ModelError

DATE = datetime.datetime(2025, 1, 1)
# Takes the place of the function that templates ask for the date: transformers passes no function of ours on to them.
PINNED = "".join(
    [
        "{%- macro strftime_now(format) -%}{{- format",
        *(f"|replace('%{code}', '{DATE.strftime(f'%{code}')}')" for code in "aAbBdmyYHIMSpjF"),
        " -}}{%- endmacro -%}",
    ]
)
USER, AGENT, LATER = "USER-SAYS", "AGENT-SAYS", "USER-ADDS"  # what stands for a turn where a template is looked at
Turns = Sequence[tuple[str, str]]


def render(tokenizer: Any, turns: Turns, *, answer: bool = True) -> str:
    """The text of turns (role, text); ``answer``: up to where the assistant's next turn begins.

    Where the template knows no system turn, its text stands before that of the first user turn.

    Raises:
        ModelError: if the template refuses the turns.
    """
    from jinja2 import TemplateError

    try:
        return _render(tokenizer, turns, answer)
    except TemplateError as error:
        (role, system), *others = turns
        if role != "system" or not others:
            raise ModelError(f"the tokenizer's chat template refuses {[role for role, _ in turns]}: {error}") from error
        (first, text), *rest = others
        return render(tokenizer, [(first, f"{system}\n\n{text}"), *rest], answer=answer)


def _render(tokenizer: Any, turns: Turns, answer: bool) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    template = PINNED + tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=answer)


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the template writes behind an assistant's turn; None if there is no such token.

    It need not be the tokenizer's end of sequence: a base model's is what ends a document.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    behind = render(tokenizer, [("user", USER), ("assistant", AGENT)], answer=False).rpartition(AGENT)[2].lstrip()
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = [token for token in {*special, tokenizer.eos_token} if token and behind.startswith(token)]
    return tokenizer.convert_tokens_to_ids(max(found, key=len)) if found else None

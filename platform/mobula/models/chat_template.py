"""A tokenizer's chat template taken apart, so that turns can be put together as tokens and never encoded anew."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from mobula.errors import ModelError
from mobula.models.causal import CausalModel


class ChatTemplate:
    """The template that comes with a pretrained model.

    Raises:
        ModelError: if the template does not give an assistant's turn back as it is, ended by the end-of-sequence token.
    """

    def __init__(self, model: CausalModel) -> None:
        self.model = model

    def first(self, text: str) -> list[int]:
        """The tokens of the first user turn, up to where the assistant's turn begins."""
        head, start, _, _ = self._frame
        return self.model.encode(f"{head}{text}{start}")

    def next(self, text: str) -> list[int]:
        """The tokens of a later user turn, from behind an assistant's turn and its end to where the next one begins."""
        _, _, between, start = self._frame
        return self.model.encode(f"{between}{text}{start}")

    @cached_property
    def _frame(self) -> tuple[str, str, str, str]:
        """What stands before the first user turn, behind it, between an assistant's end and a user turn, and behind."""
        user, assistant, later = "USER-SAYS", "AGENT-SAYS", "USER-ADDS"
        first = self._render([("user", user)])
        whole = self._render([("user", user), ("assistant", assistant), ("user", later)])
        opening, end = f"{first}{assistant}", self.model.tokenizer.eos_token
        rest = whole[len(opening) :]
        if user not in first or not whole.startswith(opening) or not rest.startswith(end) or later not in rest:
            raise ModelError(
                f"model {self.model.name!r}: its chat template does not keep an assistant's turn as it is, ended by "
                f"{end!r}; use an instruction-tuned model whose template does"
            )
        head, start = first.split(user)
        between, after = rest[len(end) :].split(later)
        return head, start, between, after

    def _render(self, turns: Sequence[tuple[str, str]]) -> str:
        messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
        return self.model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

"""A tokenizer's chat template taken apart, so that turns can be put together as tokens and never encoded anew."""

from __future__ import annotations

import re
from functools import cached_property

from mobula.errors import ModelError
from mobula.models.language_model import LanguageModel
from mobula.models.turns import AGENT, LATER, USER, render


class ChatTemplate:
    """The template that comes with a pretrained model.

    Raises:
        ModelError: if the template does not give an assistant's turn back as it is, ended by the model's end token.
    """

    def __init__(self, model: LanguageModel) -> None:
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
        """What stands before the first user turn, behind it, between an assistant's end and a user turn, and behind.

        White space around the assistant's text is none of the frame: some templates write it, and the model writes its
        own.
        """
        tokenizer = self.model.tokenizer
        first = render(tokenizer, [("user", USER)])
        whole = render(tokenizer, [("user", USER), ("assistant", AGENT), ("user", LATER)])
        end = str(tokenizer.convert_ids_to_tokens(self.model.eos))
        turn = re.compile(rf"\s*{AGENT}\s*{re.escape(end)}")
        said = turn.match(whole, len(first)) if whole.startswith(first) else None
        if USER not in first or said is None or LATER not in whole[said.end() :]:
            raise ModelError(
                f"model {self.model.name!r}: its chat template does not keep an assistant's turn as it is, ended by "
                f"{end!r}; use an instruction-tuned model whose template does"
            )
        head, start = first.split(USER)
        between, after = whole[said.end() :].split(LATER)
        return head, start, between, after

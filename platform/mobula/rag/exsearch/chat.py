"""The chat between an agent and its environment, as token ids.

An agent's turn is never encoded anew: the tokens that were sampled are those that are scored and trained on. What
the environment says is encoded apart and put behind them, so the boundary between both cannot move.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mobula.data.records import Document
from mobula.errors import ModelError
from mobula.models.causal import EOS, PAD, UNKNOWN
from mobula.models.chat_template import ChatTemplate
from mobula.models.language_model import LanguageModel

QUERY, SEARCH, FACT, FINAL = "<QUERY>", "<SEARCH>", "<FACT>", "<FINAL>"
NONE = "none"  # what an agent records if the passages settle nothing
# Words of small models alone: the end of the environment's turn, and what it asks for.
TURN, ANSWER, SELECT = "<turn>", "<ANSWER>", "<SELECT>"
MARKERS = (QUERY, TURN, SEARCH, FACT, FINAL, ANSWER, SELECT, ">", *(f"[{i}]" for i in range(1, 21)))
RESERVED = tuple(sorted((*MARKERS, PAD, EOS, UNKNOWN), key=len, reverse=True))

AGENT = (
    "Answer the question at the end by looking things up in a collection of Wikipedia passages. Work in rounds. In "
    f"each round write `{QUERY}` and one short thing to look up. The passages found are then given to you after "
    f"`{SEARCH}`; never write that part yourself. Next write `{FACT}` and the shortest span of those passages that "
    f"settles the look-up, or `{FACT} {NONE}` if they do not. Begin another `{QUERY}` while something is missing; "
    f"when the facts suffice, write `{FINAL}` instead. You will then be asked for the answer.\n\nQuestion: {{question}}"
)
CLOSING = f"`{SEARCH}` The search is closed. Give only the final answer, as briefly as possible, to: {{question}}"
CHOOSING = (
    'A search for "{query}" returned these {n} passages:\n{passages}\nName the passages that help to settle this '
    "search, most helpful first, by number, like [3] > [1]. Write nothing else."
)
NOTING = (
    'A search for "{query}" returned these {n} passages:\n{passages}\n'
    f"Write `{FACT}` and the shortest span of them that settles this search, or `{FACT} {NONE}` if they do not. Write "
    "nothing else."
)
DIRECT = "{passages}Give only the answer, as briefly as possible.\n\nQuestion: {question}"


@dataclass(frozen=True)
class Phrases:
    """Requests of the environment; ``{passages}`` are lines, each with its end."""

    begin: str
    close: str
    choose: str
    note: str
    direct: str


SENTENCES = Phrases(AGENT, CLOSING, CHOOSING, NOTING, DIRECT)
# Marker words alone, for models that know no others; a note is asked for as in the chat.
MARKED = Phrases(
    "{question}", ANSWER, f"{{query}} {{passages}} {SELECT}", "", f"{{question}} {TURN} {{passages}} {ANSWER}"
)


class Chat(ABC):
    """Turns of the environment as token ids, each up to the place where the agent goes on.

    ``separator`` stands between a recorded fact and what follows it, and between lines.
    """

    separator: str
    phrases: Phrases
    _reserved: Sequence[str]  # words that nobody but the environment may say
    _first: Callable[[str], list[int]]  # tokens of a first turn, and of a later one behind an agent's end
    _next: Callable[[str], list[int]]

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def begin(self, question: str) -> list[int]:
        """The first turn: the task and the question."""
        return self._first(self.phrases.begin.format(question=self._plain(question)))

    def results(self, passages: Sequence[Document]) -> list[int]:
        """The passages of a search, after an agent's turn and its end."""
        return self._next(self.separator.join([SEARCH, *self._lines(passages)]))

    def close(self, question: str) -> list[int]:
        """The request for the answer, after an agent's turn and its end."""
        return self._next(self.phrases.close.format(question=self._plain(question)))

    def choose(self, query: str, passages: Sequence[Document]) -> list[int]:
        """A prompt by itself: which of the passages help to settle the query?"""
        return self._about(self.phrases.choose, query, passages)

    def note(self, query: str, passages: Sequence[Document]) -> list[int]:
        """A prompt by itself: which fact of the passages settles the query?"""
        return self._about(self.phrases.note, query, passages)

    def direct(self, question: str, passages: Sequence[Document]) -> list[int]:
        """A prompt by itself: answer the question, from these passages if there are any."""
        lines = "".join(f"{line}{self.separator}" for line in self._lines(passages))
        return self._first(self.phrases.direct.format(passages=lines, question=self._plain(question)))

    def _about(self, request: str, query: str, passages: Sequence[Document]) -> list[int]:
        lines = self.separator.join(self._lines(passages))
        return self._first(request.format(query=self._plain(query), n=len(passages), passages=lines))

    def _lines(self, passages: Sequence[Document]) -> list[str]:
        return [f"[{i}] {self._passage(passage)}" for i, passage in enumerate(passages, 1)]

    def _plain(self, text: str) -> str:
        """The text without reserved words: a passage cannot end its turn."""
        for word in self._reserved:
            text = text.replace(word, " ")
        return text

    @abstractmethod
    def _passage(self, passage: Document) -> str: ...


class MarkedChat(Chat):
    """Marker words instead of sentences, for models that know no others. Of passages, texts alone: they have titles."""

    separator, phrases, _reserved = " ", MARKED, RESERVED

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model)
        self._first = self._next = lambda text: model.encode(f"{text} {TURN}")

    def note(self, query: str, passages: Sequence[Document]) -> list[int]:
        """A chat that begins with the sub-query."""
        turn = self.model.encode(f"{TURN} {QUERY} {self._plain(query)}")
        return [*turn, self.model.eos, *self.results(passages)]

    def _passage(self, passage: Document) -> str:
        return self._plain(passage.text)


class TemplatedChat(Chat):
    """Sentences in the chat template of a pretrained model. ``passage_tokens``: a passage is cut to so many tokens."""

    separator, phrases = "\n", SENTENCES

    def __init__(self, model: LanguageModel, passage_tokens: int) -> None:
        super().__init__(model)
        self.passage_tokens, template = passage_tokens, ChatTemplate(model)
        self._first, self._next, self._reserved = template.first, template.next, model.tokenizer.all_special_tokens

    def _passage(self, passage: Document) -> str:
        text = self._plain(passage.text)
        ids = self.model.encode(text)
        kept = text if len(ids) <= self.passage_tokens else self.model.decode(ids[: self.passage_tokens])
        return f"{self._plain(passage.title)}: {kept}"


def chat_of(model: LanguageModel, passage_tokens: int) -> Chat:
    """The chat that a model understands.

    Raises:
        ModelError: if it knows neither the markers nor a chat template.
    """
    if model.tokenizer.chat_template is not None:
        return TemplatedChat(model, passage_tokens)
    if TURN in model.tokenizer.get_vocab():
        return MarkedChat(model)
    raise ModelError(f"model {model.name!r} has no chat template; use an instruction-tuned model")

"""Prompts of a list-wise selector and of a generator; every passage of either stands in one line, made alike."""

from __future__ import annotations

from collections.abc import Sequence

from mobula.data.records import Document
from mobula.errors import MobulaError
from mobula.models.causal import CausalModel
from mobula.models.turns import render
from mobula.rag.permutations import labels

SELECT = (
    "Question: {question}\nThese {n} passages were retrieved for it, each with a label in brackets:\n{passages}\n"
    "Choose the {k} passages that are the most useful for answering, judging whether they are about what is asked and "
    "whether they contain facts that the answer needs. Write their labels from most to least useful in the form "
    "{form} and nothing else."
)
ANSWER = (
    "Use the numbered passages to answer the question. Some may be off topic. Reply with the answer only, as briefly "
    "as possible.\n{passages}\nQuestion: {question}"
)
CLOSED_BOOK = "Reply with the answer only, as briefly as possible.\nQuestion: {question}"


class RowTooLong(MobulaError):
    """A prompt that does not fit the model."""


class Prompts:
    """Prompts in the tokens of a model: one turn of a user, in the model's chat template if it has one."""

    def __init__(self, model: CausalModel, passage_tokens: int, most: int, kind: str) -> None:
        """Passages are cut to ``passage_tokens``, and a prompt has at most ``most``; ``kind`` of labels."""
        self.model, self.passage_tokens, self.most, self.kind = model, passage_tokens, most, kind

    def select(self, question: str, documents: Sequence[Document], k: int) -> list[int]:
        """What the selector is asked."""
        names = labels(self.kind, len(documents))
        form = " > ".join(f"[{name}]" for name in names[1::-1])
        passages = self._passages(names, documents)
        return self._turn(SELECT.format(question=question, n=len(documents), passages=passages, k=k, form=form))

    def answer(self, question: str, documents: Sequence[Document]) -> list[int]:
        """What the generator is asked, about passages in their order; without any, the question alone."""
        if not documents:
            return self._turn(CLOSED_BOOK.format(question=question))
        passages = self._passages(labels("numbers", len(documents)), documents)
        return self._turn(ANSWER.format(question=question, passages=passages))

    def _passages(self, names: Sequence[str], documents: Sequence[Document]) -> str:
        return "\n".join(line(name, self._cut(document)) for name, document in zip(names, documents, strict=True))

    def _cut(self, document: Document) -> Document:
        ids = self.model.encode(document.text)
        if len(ids) <= self.passage_tokens:
            return document
        return Document(document.id, document.title, self.model.decode(ids[: self.passage_tokens]))

    def _turn(self, text: str) -> list[int]:
        tokenizer = self.model.tokenizer
        if getattr(tokenizer, "chat_template", None):
            text = render(tokenizer, [("user", text)])
        else:
            text += "\n"
        ids = self.model.encode(text)
        if len(ids) > self.most:
            raise RowTooLong(
                f"a prompt has {len(ids)} tokens, more than model.positions={self.most}; make "
                "model.passage_tokens or retrieve.candidates smaller"
            )
        return ids


def line(label: str, document: Document) -> str:
    """A passage in a prompt."""
    return f"[{label}] {document.title}: {document.text}"

"""Record schemas: one per kind of data, whatever the source."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Document:
    """A document of a corpus. ``date`` is ISO 8601 or None; ``source`` names the part of a collection it comes from."""

    id: str
    title: str
    text: str
    date: str | None = None
    source: str | None = None

    @property
    def contents(self) -> str:
        """Title and text as search agents exchange them: the title in quotation marks, a line break, the text."""
        return f'"{" ".join(self.title.split())}"\n{self.text}'

    @classmethod
    def of_contents(cls, id: str, contents: str) -> Document:
        """A document from its contents: the first line is the title, with or without quotation marks.

        Of a single line, all is text.
        """
        title, line_break, text = contents.partition("\n")
        if not line_break:
            return cls(id, "", contents)
        title = title.strip()
        quoted = len(title) > 1 and title[0] == title[-1] == '"'
        return cls(id, title[1:-1] if quoted else title, text)


@dataclass(frozen=True)
class Query:
    """A query with the ids of its relevant documents; ``grades`` (if any) align with ``gold``.

    ``source_doc`` is the document it was taken from, if it was; that counts neither for nor against a ranking.
    """

    id: str
    text: str
    gold: tuple[str, ...]
    grades: tuple[int, ...] | None = None
    source_doc: str | None = None


@dataclass
class RetrievalData:
    """A corpus and its queries by split (``train``, ``dev``, ``test``, sometimes more).

    ``source`` says where it really came from, ``sha256`` fingerprints documents and queries, ``notes`` holds
    counts a reader should know (duplicates merged, ambiguous queries, records dropped and why).
    """

    name: str
    source: str
    sha256: str
    documents: list[Document]
    queries: dict[str, list[Query]]
    notes: dict[str, float | str] = field(default_factory=dict)

    @property
    def records(self) -> int:
        """Documents and queries together."""
        return len(self.documents) + sum(len(q) for q in self.queries.values())

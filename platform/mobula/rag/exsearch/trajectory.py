"""What an agent did about a question: its turns as tokens, and what they mean.

A trajectory is the latent variable of EXSEARCH: sub-queries, the passages that were shown, and the facts recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mobula.models.finetune import TokenRow
from mobula.rag.exsearch.chat import FACT, FINAL, NONE, QUERY, SEARCH
from mobula.rag.objective import ANSWER
from mobula.rag.search import Reply

GIVEN = 0  # mask of what nobody learns: the environment's words, and what was put into the agent's mouth


@dataclass
class Turn:
    """A turn as tokens: ``mask`` is 1 (``LATENT``) where the agent sampled the token.

    ``log_probs`` and ``log_q`` of each of those: log p under the model at temperature 1, and under the distribution
    that it was drawn from.
    """

    role: Literal["user", "assistant"]
    text: str
    ids: list[int]
    mask: list[int]
    log_probs: list[float]
    log_q: list[float]

    @classmethod
    def given(cls, role: Literal["user", "assistant"], text: str, ids: Sequence[int]) -> Turn:
        """A turn that nobody learns."""
        return cls(role, text, list(ids), [GIVEN] * len(ids), [], [])


@dataclass
class Aside:
    """A turn beside the chat: a prompt by itself, and what the agent wrote after it."""

    prompt: list[int]
    turn: Turn


@dataclass
class Selection(Aside):
    """A choice among candidates, and the passages it led to."""

    ids: list[str]


@dataclass
class Flags:
    """What went wrong, counted."""

    malformed: int = 0  # actions without the form that they must have
    repaired: int = 0  # of these, given a second chance
    forced_final: bool = False  # closed without having said so
    overflow: bool = False  # closed because nothing more would have fitted
    repeat_queries: int = 0
    empty_facts: int = 0
    retriever_errors: int = 0
    malformed_selections: int = 0


@dataclass
class Trajectory:
    """Turns, and what they mean: sub-queries, facts, hits (id, score, rank), the passages shown, and the answer.

    ``turns`` end with the request for the answer; what was answered is ``prediction`` and ``answer``. ``notes`` are the
    facts that were written beside the chat.
    """

    turns: list[Turn] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    hits: list[list[tuple[str, float, int]]] = field(default_factory=list)
    shown: list[list[str]] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)
    notes: list[Aside] = field(default_factory=list)
    prediction: str = ""
    answer: Turn | None = None
    flags: Flags = field(default_factory=Flags)

    @property
    def context(self) -> list[int]:
        """All tokens up to the answer."""
        return [token for turn in self.turns for token in turn.ids]

    @property
    def length(self) -> int:
        """Their number."""
        return sum(len(turn.ids) for turn in self.turns)

    @property
    def log_q(self) -> float:
        """The log-probability that the trajectory was drawn with, by who sampled it."""
        return sum(sum(turn.log_q) for turn in self._agent_turns)

    @property
    def sampled(self) -> list[float]:
        """log p of every token of the latent that was sampled."""
        return [p for turn in self._agent_turns for p in turn.log_probs]

    @property
    def _agent_turns(self) -> list[Turn]:
        return [*self.turns, *(aside.turn for aside in self.asides)]

    @property
    def asides(self) -> list[Aside]:
        """All turns beside the chat."""
        return [*self.selections, *self.notes]

    def keep(self, reply: Reply) -> None:
        """Keep what a search returned."""
        self.hits.append([(hit.id, hit.score, hit.rank) for hit in reply.hits])
        self.flags.retriever_errors += reply.failed

    def close(self, answer: Turn) -> None:
        """Keep the answer."""
        self.answer, self.prediction = answer, answer.text

    def transcript(self) -> dict[str, Any]:
        """For readers, without tokens."""
        completions = [turn.text for turn in self.turns if turn.role == "assistant"]
        return {"completions": completions, "queries": self.queries, "facts": self.facts, "shown": self.shown}

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Trajectory:
        """What :meth:`to_dict` made."""
        parts = {
            "turns": [Turn(**turn) for turn in row["turns"]],
            "hits": [[(id, score, rank) for id, score, rank in hits] for hits in row["hits"]],
            "selections": [Selection(s["prompt"], Turn(**s["turn"]), s["ids"]) for s in row["selections"]],
            "notes": [Aside(s["prompt"], Turn(**s["turn"])) for s in row["notes"]],
            "answer": None if row["answer"] is None else Turn(**row["answer"]),
            "flags": Flags(**row["flags"]),
        }
        return cls(**{**row, **parts})


@dataclass(frozen=True)
class Action:
    """An agent's turn, read: a fact, unless it is the first turn, and then a sub-query or the end."""

    kind: Literal["query", "final", "malformed"]
    fact: str = ""
    query: str = ""

    def written(self, separator: str, *, fact: bool) -> str:
        """The turn in its proper form, with or without the fact."""
        rest = f"{QUERY} {self.query}" if self.kind == "query" else FINAL
        return f"{FACT} {self.fact or NONE}{separator}{rest}" if fact else rest


MALFORMED = Action("malformed")


def parse(text: str, *, fact: bool, query: bool) -> Action:
    """Read an agent's turn. ``fact``: it must begin with one. ``query``: it must not end the search.

    The first occurrence of a marker counts. A turn without what must be there, or with an empty sub-query, is
    malformed; a fact may be empty.
    """
    text = text.split(SEARCH)[0]
    recorded = ""
    if fact:
        _, marker, text = text.partition(FACT)
        if not marker:
            return MALFORMED
    positions = {marker: text.find(marker) for marker in (QUERY, FINAL) if marker in text}
    if not positions:
        return MALFORMED
    first = min(positions, key=positions.__getitem__)
    if fact:
        recorded = " ".join(text[: positions[first]].split())
        recorded = "" if recorded.lower() == NONE else recorded
    if first == FINAL:
        return MALFORMED if query else Action("final", recorded)
    rest = text[positions[QUERY] + len(QUERY) :]
    for marker in (QUERY, FACT, FINAL):
        rest = rest.split(marker)[0]
    query_text = " ".join(rest.split("\n")[0].split())
    return Action("query", recorded, query_text) if query_text else MALFORMED


def parse_fact(text: str) -> tuple[str, bool]:
    """Read a fact that was written by itself, and whether it has its marker; without that, the whole text counts."""
    before, marker, rest = text.partition(FACT)
    fact = rest if marker else before
    for other in (SEARCH, QUERY, FACT, FINAL):
        fact = fact.split(other)[0]
    fact = " ".join(fact.split())
    return ("" if fact.lower() == NONE else fact), bool(marker)


def rows(trajectory: Trajectory, gold: Sequence[int], weight: float) -> list[TokenRow]:
    """The rows of a trajectory under EM: its own tokens and the GOLD answer, and each aside by itself."""
    return _with_asides(trajectory, [*gold], [ANSWER] * len(gold), weight)


def own_rows(trajectory: Trajectory, weight: float) -> list[TokenRow]:
    """The same with the answer that was sampled: what a policy gradient learns from."""
    answer = trajectory.answer
    assert answer is not None
    mask = [ANSWER if kind else GIVEN for kind in answer.mask]
    return _with_asides(trajectory, answer.ids, mask, weight)


def _with_asides(trajectory: Trajectory, answer: list[int], mask: list[int], weight: float) -> list[TokenRow]:
    kinds = [*(kind for turn in trajectory.turns for kind in turn.mask), *mask]
    result = [TokenRow([*trajectory.context, *answer], kinds, weight)]
    for aside in trajectory.asides:
        prompt, turn = aside.prompt, aside.turn
        result.append(TokenRow([*prompt, *turn.ids], [GIVEN] * len(prompt) + turn.mask, weight))
    return result

"""Questions over a small knowledge base: two hops along functional relations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from itertools import pairwise, product
from typing import Any

from mobula.agents.language import ANSWER, Argument, Execution, Program, Result, Statement, Tool, ToolError, show
from mobula.agents.worlds.world import Form, Generated, Task, matched, operand
from mobula.data.records import Document
from mobula.models.encoders import load_encoder
from mobula.retrieval.dense import Dense
from mobula.retrieval.search import SearchOptions

ENTITIES = tuple(f"e{i}" for i in range(24))
# A relation's name in the schema, and its two names in language.
ALIASES = {
    "r0": ("mentor", "teacher"),
    "r1": ("rival", "opponent"),
    "r2": ("neighbour", "friend"),
    "r3": ("boss", "chief"),
    "r4": ("heir", "successor"),
    "r5": ("guest", "visitor"),
}
RELATIONS = tuple(ALIASES)
HELD_OUT_PAIRS = {("r0", "r3"), ("r1", "r4"), ("r2", "r5"), ("r5", "r0")}
PAIRS = sorted(set(product(RELATIONS, repeat=2)) - HELD_OUT_PAIRS)
MOST_RETRIEVED = 10
_OF_ALIAS = {alias: relation for relation, aliases in ALIASES.items() for alias in aliases}
_WHO, _WHAT = r"(?P<who>R?e?\d+)", r"(?P<what>\w+)"
_PATTERNS = {
    "query": f"query {_WHO} {_WHAT}",
    "find": f"find {_WHAT} of {_WHO}",
    "look": f"look up {_WHO} 's {_WHAT}",
    "compare": r"compare (?P<a>R\d+) (?P<b>R\d+)",
    "check": r"check whether (?P<a>R\d+) and (?P<b>R\d+) agree",
    "see": r"see if (?P<b>R\d+) equals (?P<a>R\d+)",
}


class Kb(Generated):
    """Two hops over a knowledge base in which every relation leads from each of 24 entities to exactly one.

    Held out: four pairs of relations, three hops, and comparisons of two one-hop questions.
    """

    family = "kb"

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"kb {seed}")
        self.relations = {relation: {e: rng.choice(ENTITIES) for e in ENTITIES} for relation in RELATIONS}

    def facts(self) -> Any:
        """Every relation."""
        return self.relations

    @cached_property
    def sentences(self) -> Dense:
        """The facts as sentences in a flat index of static embeddings."""
        documents = [
            Document(f"{relation} {who}", "", f"the {ALIASES[relation][0]} of {who} is {whom}")
            for relation, pairs in self.relations.items()
            for who, whom in pairs.items()
        ]
        self._texts = {document.id: document.text for document in documents}
        return Dense(load_encoder("wordllama"), documents)

    def warm(self) -> None:
        """Embed the facts, and a text as a query."""
        self._retrieve("warm", Fraction(1))

    def tools(self) -> dict[str, Tool]:
        """Query, Compare and Retrieve."""
        return {
            tool.name: tool
            for tool in (
                Tool("Query", ("text", "text"), "follows a relation from an entity", self._query),
                Tool("Compare", ("any", "any"), "yes if both are the same, else no", lambda a, b: a == b),
                Tool("Retrieve", ("text", "number"), "the facts nearest to a text", self._retrieve),
            )
        }

    def constants(self) -> Sequence[str]:
        """Entities, and relations as the schema names them."""
        return [*ENTITIES, *RELATIONS]

    def draw(self, rng: random.Random, held_out: bool) -> Form:
        """Held-out forms are of the three kinds in equal shares."""
        kind = rng.choice(("pair", "hops", "comparison")) if held_out else "trained"
        if kind == "comparison":
            return Form("kb:compare", self._draw_comparison(rng))
        if kind == "pair":
            path: tuple[str, ...] = rng.choice(sorted(HELD_OUT_PAIRS))
        elif kind == "hops":
            path = _path(rng)
        else:
            path = rng.choice(PAIRS)
        return Form(f"kb:{'.'.join(path)}", _hops(rng.choice(ENTITIES), path))

    def render(self, form: Form, rng: random.Random) -> str:
        """A question, each relation by one of its two names."""
        calls = [statement for statement in form.program if statement.name == "Query"]
        names = [rng.choice(ALIASES[str(call.arguments[1])]) for call in calls]
        if form.composition == "kb:compare":
            first, second = (f"the {name} of {call.arguments[0]}" for name, call in zip(names, calls, strict=True))
            return f"are {first} and {second} the same ?"
        chain = " of ".join(f"the {name}" for name in reversed(names))
        return f"who is {chain} of {calls[0].arguments[0]} ?"

    def subgoal(self, statement: Statement, style: str, rng: random.Random) -> str:
        """One hop or one comparison in words; only the formal style knows the schema's names."""
        first, second = (_word(argument) for argument in statement.arguments)
        if statement.name == "Compare":
            return {
                "formal": f"compare {first} {second}",
                "paraphrase": f"check whether {first} and {second} agree",
                "swapped": f"see if {second} equals {first}",
            }[style]
        alias = rng.choice(ALIASES[second])
        return {
            "formal": f"query {first} {second}",
            "paraphrase": f"find {alias} of {first}",
            "swapped": f"look up {first} 's {alias}",
        }[style]

    def ground(self, subgoal: str, last: int) -> tuple[str, tuple[Any, ...]] | None:
        """The hop or comparison that the words mean."""
        match = matched(_PATTERNS, subgoal)
        if match is None:
            return None
        name, groups = match
        if name in ("compare", "check", "see"):
            return "Compare", (operand(groups["a"]), operand(groups["b"]))
        relation = groups["what"] if name == "query" else _OF_ALIAS.get(groups["what"])
        return ("Query", (operand(groups["who"]), relation)) if relation in RELATIONS else None

    def reward(self, task: Task, execution: Execution) -> float:
        """1 for the exact entity, or the right yes or no."""
        return float(execution.status == "ok" and show(execution.answer) == task.answer)

    def _draw_comparison(self, rng: random.Random) -> Program:
        """Half of them agree."""
        agree = rng.random() < 0.5
        while True:
            first, second = rng.sample(ENTITIES, 2)
            one, other = rng.choice(RELATIONS), rng.choice(RELATIONS)
            if (self.relations[one][first] == self.relations[other][second]) == agree:
                return _comparison(first, one, second, other)

    def _query(self, entity: str, relation: str) -> str:
        if relation not in self.relations:
            raise ToolError(f"no relation {relation!r}; there are {', '.join(RELATIONS)}")
        if entity not in self.relations[relation]:
            raise ToolError(f"no entity {entity!r}")
        return self.relations[relation][entity]

    def _retrieve(self, text: str, count: Any) -> list[str]:
        if count.denominator != 1 or not 1 <= count <= MOST_RETRIEVED:
            raise ToolError(f"the number of facts is from 1 to {MOST_RETRIEVED}")
        (results,) = self.sentences.search([text], [SearchOptions(k=int(count))])
        return [self._texts[hit.doc_id] for hit in results.hits]


def _path(rng: random.Random) -> tuple[str, ...]:
    """Three relations whose neighbours are trained pairs."""
    while True:
        path = tuple(rng.choice(RELATIONS) for _ in range(3))
        if HELD_OUT_PAIRS.isdisjoint(pairwise(path)):
            return path


def _hops(entity: str, path: tuple[str, ...]) -> Program:
    statements = []
    who: Argument = entity
    for number, relation in enumerate(path, 1):
        statements.append(Statement("Query", (who, relation), number))
        who = Result(number)
    return (*statements, Statement(ANSWER, (who,), None))


def _comparison(first: str, one: str, second: str, other: str) -> Program:
    return (
        Statement("Query", (first, one), 1),
        Statement("Query", (second, other), 2),
        Statement("Compare", (Result(1), Result(2)), 3),
        Statement(ANSWER, (Result(3),), None),
    )


def _word(argument: Argument) -> str:
    return f"R{argument.number}" if isinstance(argument, Result) else str(argument)

"""A world of people, firms and books, in words: passages that state facts, and questions that chain them.

Every seed makes another world from the same words, so nothing of one can be remembered in another. Names share their
parts, so that a search by name finds wrong passages too, and questions call a relation by words that no passage has.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from mobula.data.records import Document
from mobula.errors import DataError


@dataclass(frozen=True)
class Relation:
    """What links a subject of one kind to an object of another: as passages say it, and as questions name it."""

    subject: str
    object: str
    verbs: tuple[str, ...]
    nouns: tuple[str, ...]


RELATIONS = {
    "born_in": Relation("person", "town", ("was born in", "came into the world in"), ("birthplace", "origin")),
    "lives_in": Relation("person", "town", ("lives in", "settled in", "has a house in"), ("residence", "home")),
    "married_to": Relation("person", "person", ("is married to", "shares a life with"), ("spouse", "partner")),
    "taught_by": Relation("person", "person", ("was taught by", "learned from"), ("teacher", "mentor")),
    "works_for": Relation(
        "person", "firm", ("works for", "is on the staff of", "earns money at"), ("employer", "workplace")
    ),
    "based_in": Relation("firm", "town", ("is based in", "has offices in", "is run from"), ("headquarters", "seat")),
    "founded_by": Relation("firm", "person", ("was set up by", "was started by"), ("founder", "creator")),
    "written_by": Relation("book", "person", ("was written by", "came from the pen of"), ("author", "writer")),
    "published_by": Relation("book", "firm", ("was printed by", "was brought out by"), ("publisher", "imprint")),
}
HOPS = ((1, 0.25), (2, 0.65), (3, 0.10))
FACTS_OF_A_PERSON = 3
# Two-hop chains that only test questions have: every fifth one.
HELD_OUT_EVERY = 5
TRIES = 1000


def _syllables(onsets: str, vowels: str, codas: Sequence[str]) -> list[str]:
    return ["".join(parts) for parts in product(onsets, vowels, codas)]


def _pick(words: Sequence[str], count: int, name: str) -> list[str]:
    return random.Random(f"pool {name}").sample(list(words), count)


# Endings that no stemmer takes for a suffix.
FIRST_NAMES = _pick([f"{a}o" for a in _syllables("bdgklmprtv", "aeiu", ("b", "k", "m", "v"))], 60, "first")
LAST_NAMES = _pick([f"{a}um" for a in _syllables("bdfgjklmnprtvz", "aeio", ("rt", "nd", "sk", "lm"))], 60, "last")
TOWNS = _pick([f"{a}ford" for a in _syllables("bcdfghklmnprstw", "aeiou", ("l", "n", "r"))], 60, "towns")
FIRM_NAMES = _pick([f"{a}ix" for a in _syllables("bcdfglmnprtv", "aeiou", ("nt", "rk", "lb"))], 30, "firms")
FIRM_KINDS = ("mills", "bank", "airline", "press", "foods", "motors", "textile", "pharma")
BOOK_FIRST = ("silver", "broken", "silent", "crimson", "hidden", "golden", "distant", "bitter", "frozen", "wild")
BOOK_SECOND = ("garden", "river", "harvest", "lantern", "orchard", "mirror", "harbor", "winter", "falcon", "bridge")


@dataclass(frozen=True)
class Size:
    """How many of each kind a world has."""

    people: int = 300
    towns: int = 60
    firms: int = 40
    books: int = 60


@dataclass(frozen=True)
class Hop:
    """One look-up of a plan: the sub-query, the sentence that settles it, the object, and the passage that says so."""

    query: str
    sentence: str
    object: str
    passage: str


@dataclass(frozen=True)
class GeneratedQuestion:
    """A question: its chain of relations, its plan, its answer."""

    id: str
    text: str
    answer: str
    chain: tuple[str, ...]
    plan: tuple[Hop, ...]
    held_out: bool


@dataclass(frozen=True)
class Fact:
    """(subject, relation, object), and the sentence that states it."""

    relation: str
    object: str
    sentence: str


class World:
    """The facts and passages of a seed.

    Raises:
        DataError: for more of a kind than there are names.
    """

    def __init__(self, seed: int, size: Size) -> None:
        rng = random.Random(f"world {seed}")
        pools = {
            "person": _named(rng, FIRST_NAMES, LAST_NAMES, size.people, "people"),
            "town": _some(rng, TOWNS, size.towns, "towns"),
            "firm": _named(rng, FIRM_NAMES, FIRM_KINDS, size.firms, "firms"),
            "book": _named(rng, BOOK_FIRST, BOOK_SECOND, size.books, "books"),
        }
        self.seed = seed
        self.passage_of: dict[str, str] = {}
        self.facts: dict[str, dict[str, Fact]] = {}
        self.documents: list[Document] = []
        for kind in ("person", "firm", "book"):
            for number, name in enumerate(pools[kind]):
                self._add(rng, kind, f"{kind}-{number}", name, pools)

    def _add(self, rng: random.Random, kind: str, id: str, name: str, pools: dict[str, list[str]]) -> None:
        known = [key for key, relation in RELATIONS.items() if relation.subject == kind]
        facts = {}
        for key in rng.sample(known, min(FACTS_OF_A_PERSON, len(known))):
            relation = RELATIONS[key]
            object = rng.choice([other for other in pools[relation.object] if other != name])
            facts[key] = Fact(key, object, f"{name} {rng.choice(relation.verbs)} {object}")
        self.facts[name], self.passage_of[name] = facts, id
        text = " ".join(f"{fact.sentence} ." for fact in facts.values())
        self.documents.append(Document(id, name, text))

    def questions(
        self, count: int, name: str, *, held_out: bool, hops: Sequence[int] = (1, 2, 3)
    ) -> list[GeneratedQuestion]:
        """Questions, all different. ``held_out``: whether chains that are held out may occur.

        Raises:
            DataError: if the world has not so many.
        """
        rng = random.Random(f"questions {self.seed} {name}")
        lengths, shares = zip(*((length, share) for length, share in HOPS if length in hops), strict=True)
        questions: dict[str, GeneratedQuestion] = {}
        for number, length in enumerate(rng.choices(lengths, shares, k=count)):
            candidates = (self._ask(rng, length, f"{name}-{self.seed}-{number}") for _ in range(TRIES))
            fitting = (q for q in candidates if q and q.text not in questions and (held_out or not q.held_out))
            question = next(fitting, None)
            if question is None:
                raise DataError(
                    f"{name}: a world of {len(self.documents)} passages has no {count} questions of {hops} "
                    "hops; ask for fewer, or make the world larger"
                )
            questions[question.text] = question
        return list(questions.values())

    def _ask(self, rng: random.Random, hops: int, id: str) -> GeneratedQuestion | None:
        subject = rng.choice(list(self.facts))
        entity, words, plan = subject, subject, []
        chain: list[str] = []
        for _ in range(hops):
            facts = self.facts.get(entity)
            if facts is None:  # a town, of which nothing is said
                return None
            fact = rng.choice(list(facts.values()))
            noun = rng.choice(RELATIONS[fact.relation].nouns)
            plan.append(Hop(f"{noun} of {entity}", fact.sentence, fact.object, self.passage_of[entity]))
            words, entity = f"the {noun} of {words}", fact.object
            chain.append(fact.relation)
        if entity in (subject, *(hop.object for hop in plan[:-1])):
            return None  # a chain that comes back to where it was answers itself
        return GeneratedQuestion(id, f"what is {words} ?", entity, tuple(chain), tuple(plan), tuple(chain) in HELD_OUT)


def _chains() -> Iterator[tuple[str, str]]:
    for first, second in product(RELATIONS, RELATIONS):
        if RELATIONS[first].object == RELATIONS[second].subject:
            yield first, second


HELD_OUT = frozenset(sorted(_chains())[::HELD_OUT_EVERY])


@lru_cache(maxsize=16)
def world(seed: int, size: Size) -> World:
    """The world of a seed."""
    return World(seed, size)


def words() -> list[str]:
    """Every word of any world, its questions and plans, each once."""
    texts = [
        *FIRST_NAMES,
        *LAST_NAMES,
        *TOWNS,
        *FIRM_NAMES,
        *FIRM_KINDS,
        *BOOK_FIRST,
        *BOOK_SECOND,
        ". what is the of ?",
    ]
    texts += [text for relation in RELATIONS.values() for text in (*relation.verbs, *relation.nouns)]
    return sorted({word for text in texts for word in text.split()})


def _named(rng: random.Random, first: Sequence[str], second: Sequence[str], count: int, kind: str) -> list[str]:
    return [" ".join(pair) for pair in _some(rng, list(product(first, second)), count, kind)]


def _some(rng: random.Random, pool: Sequence, count: int, kind: str) -> list:
    if count > len(pool):
        raise DataError(f"world.{kind}={count}: there are names for {len(pool)}")
    return rng.sample(list(pool), count)

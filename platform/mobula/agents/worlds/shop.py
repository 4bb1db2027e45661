"""Errands in a small shop: search a type, narrow by attributes, buy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

from mobula.agents.language import Argument, Execution, Program, Result, Statement, Tool, ToolError
from mobula.agents.worlds.world import Form, Generated, Task, matched

TYPES = (
    "bag", "belt", "book", "bowl", "chair", "clock", "coat", "cup", "desk", "dress",
    "hat", "jacket", "knife", "lamp", "mug", "plate", "scarf", "shirt", "shoe", "vase",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "black", "white", "grey", "brown", "pink")
SIZES = ("tiny", "small", "medium", "large", "huge")
HELD_OUT_PAIRS = {("red", "tiny"), ("green", "large"), ("black", "medium")}
PAIRS = sorted(set(product(COLOURS, SIZES)) - HELD_OUT_PAIRS)
PRICES = (5, 10, 15, 20, 25, 30)
TWINS = 400  # items beyond one of each kind
_PATTERNS = {
    "search": r"search (?P<type>[a-z]+)",
    "look": r"look for every (?P<type>[a-z]+)",
    "every": r"of all things get each (?P<type>[a-z]+)",
    "cap": r"filter (?P<cap>\d+)",
    "cheaper": r"keep only up to (?P<cap>\d+)",
    "dearer": r"drop all above (?P<cap>\d+)",
    "filter": r"filter (?P<value>[a-z]+)",
    "keep": r"keep only (?P<value>[a-z]+)",
    "drop": r"drop all but (?P<value>[a-z]+)",
    "buy": r"buy it",
    "take": r"take what is left",
    "left": r"what is left is to be bought",
}


@dataclass(frozen=True)
class Item:
    """Something for sale."""

    id: int
    type: str
    colour: str
    size: str
    price: int

    def __str__(self) -> str:
        return f"item{self.id}"


class Shop(Generated):
    """Search a type, filter a colour and then a size, buy.

    Held out: three pairs of colour and size, the size before the colour, and a price cap as third filter. A type has
    one item of every kind or more, so what is asked for can be had unless a price cap rules it out.
    """

    family = "shop"

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"shop {seed}")
        kinds = list(product(TYPES, COLOURS, SIZES))
        kinds += [rng.choice(kinds) for _ in range(TWINS)]
        self.items = [Item(i, *kind, rng.choice(PRICES)) for i, kind in enumerate(kinds)]

    def facts(self) -> Any:
        """The catalogue."""
        return self.items

    def tools(self) -> dict[str, Tool]:
        """Search, Filter and Buy."""
        return {
            tool.name: tool
            for tool in (
                Tool("Search", ("text",), "all items of a type", self._search),
                Tool("Filter", ("any", "any"), "those of a colour or size, or up to a price", _filter),
                Tool("Buy", ("any",), "buys the cheapest of them", _buy),
            )
        }

    def constants(self) -> Sequence[str]:
        """Types, attributes and prices."""
        return [*TYPES, *COLOURS, *SIZES, *map(str, PRICES)]

    def draw(self, rng: random.Random, held_out: bool) -> Form:
        """Held-out forms are of the three kinds in equal shares."""
        kind = rng.choice(("pair", "layout", "cap")) if held_out else "trained"
        colour, size = rng.choice(sorted(HELD_OUT_PAIRS) if kind == "pair" else PAIRS)
        type = rng.choice(TYPES)
        wanted: list[Argument] = [size, colour] if kind == "layout" else [colour, size]
        composition = f"shop:{colour}.{size}"
        if kind == "layout":
            composition = f"shop:{size}.{colour}"
        elif kind == "cap":
            had = [i.price for i in self.items if (i.type, i.colour, i.size) == (type, colour, size)]
            wanted.append(Fraction(rng.choice([price for price in PRICES if price >= min(had)])))
            composition += ".cap"
        return Form(composition, _program(type, wanted), (type, tuple(wanted)))

    def render(self, form: Form, rng: random.Random) -> str:
        """What somebody wants, attributes in the order of the filters."""
        type, (first, second, *cap) = form.extra
        limit = f" for at most {cap[0]}" if cap else ""
        text = rng.choice(("i want a {}{} .", "get me a {}{} .", "a {}{} , please ."))
        return text.format(f"{first} {second} {type}", limit)

    def subgoal(self, statement: Statement, style: str, rng: random.Random) -> str:
        """One step through the shop in words."""
        if statement.name == "Buy":
            texts = ("buy it", "take what is left", "what is left is to be bought")
        elif statement.name == "Search":
            type = statement.arguments[0]
            texts = (f"search {type}", f"look for every {type}", f"of all things get each {type}")
        else:
            value = statement.arguments[1]
            capped = isinstance(value, Fraction)
            keep, drop = ("up to ", "above") if capped else ("", "but")
            texts = (f"filter {value}", f"keep only {keep}{value}", f"drop all {drop} {value}")
        return dict(zip(("formal", "paraphrase", "swapped"), texts, strict=True))[style]

    def ground(self, subgoal: str, last: int) -> tuple[str, tuple[Any, ...]] | None:
        """The step that the words mean; filters and purchases concern the last result."""
        match = matched(_PATTERNS, subgoal)
        if match is None:
            return None
        _, groups = match
        if "type" in groups:
            return "Search", (groups["type"],)
        if last == 0:
            return None
        if "cap" in groups:
            return "Filter", (Result(last), Fraction(groups["cap"]))
        return ("Filter", (Result(last), groups["value"])) if "value" in groups else ("Buy", (Result(last),))

    def reward(self, task: Task, execution: Execution) -> float:
        """The share of what was wanted that the bought item has; nothing for a search that bought nothing."""
        if execution.status != "ok" or not isinstance(execution.answer, Item):
            return 0.0
        wanted, item = task.meta["wanted"], execution.answer
        has = [value in (item.type, item.colour, item.size) for value in wanted if isinstance(value, str)]
        has += [item.price <= value for value in wanted if not isinstance(value, str)]
        return sum(has) / len(has)

    def _search(self, type: str) -> list[Item]:
        if type not in TYPES:
            raise ToolError(f"nothing of type {type!r}")
        return [item for item in self.items if item.type == type]


def _filter(items: Any, value: Any) -> list[Item]:
    if not _are_items(items):
        raise ToolError("there are no items to filter")
    if isinstance(value, Fraction):
        return [item for item in items if item.price <= value]
    if value not in (*COLOURS, *SIZES):
        raise ToolError(f"no attribute {value!r}")
    return [item for item in items if value in (item.colour, item.size)]


def _buy(items: Any) -> Item:
    if not _are_items(items) or not items:
        raise ToolError("there is nothing to buy")
    return min(items, key=lambda item: (item.price, item.id))


def _are_items(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, Item) for part in value)


def _program(type: str, wanted: list[Argument]) -> Program:
    statements = [Statement("Search", (type,), 1)]
    statements += [Statement("Filter", (Result(i), value), i + 1) for i, value in enumerate(wanted, 1)]
    return (*statements, Statement("Buy", (Result(len(statements)),), None))

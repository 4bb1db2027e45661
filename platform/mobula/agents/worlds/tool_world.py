"""The executable tool world: three families of generated tasks, divided by composition."""

from __future__ import annotations

import random
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from mobula.agents.language import execute, serialise, show
from mobula.agents.worlds.arith import Arith
from mobula.agents.worlds.kb import Kb
from mobula.agents.worlds.shop import Shop
from mobula.agents.worlds.world import PLANNER_STYLES, Form, Generated, Task
from mobula.errors import DataError

HELD_OUT = "test_out"
UNPLANNED = ("align",)  # tasks whose plans nobody annotated
MOST_DRAWS = 2000  # in a row without a new form


def build(seed: int, path: str = "") -> dict[str, Generated]:
    """The three worlds, their facts drawn from the seed.

    Raises:
        DataError: for a path, as there is nothing to read.
    """
    if path:
        raise DataError(f"tasks.path={path}: the tool world makes its tasks itself; set tasks.source or leave it empty")
    return {world.family: world for world in (Arith(), Kb(seed), Shop(seed))}


def generate(worlds: Mapping[str, Generated], sizes: Mapping[str, int], seed: int) -> dict[str, list[Task]]:
    """Tasks of every split, the families in turn; ``test_out`` has compositions that no other split has.

    No two tasks have the same gold program, in one split or in several.

    Raises:
        DataError: if a family has fewer different tasks than are asked for.
    """
    used: set[str] = set()
    tasks: dict[str, list[Task]] = {}
    for split, size in sizes.items():
        rng = random.Random(f"{seed} {split}")
        families = list(worlds)
        tasks[split] = [_task(worlds[families[i % len(families)]], split, i, rng, used) for i in range(size)]
    return tasks


def _task(world: Generated, split: str, number: int, rng: random.Random, used: set[str]) -> Task:
    form = _new_form(world, split == HELD_OUT, rng, used)
    program = form.program
    done = execute(program, world.tools())
    wanted = [_plain(value) for value in _wanted(form)] if world.family == "shop" else []
    return Task(
        id=f"{world.family}-{split}-{number:05}",
        family=world.family,
        split=split,
        text=world.render(form, rng),
        state=None,
        tools=tuple(world.tools()),
        gold_plan=None if split in UNPLANNED else world.plan(program, PLANNER_STYLES, rng),
        gold_actions=serialise(program),
        answer=show(done.answer),
        meta={
            "composition": form.composition,
            "n_steps": len(program),
            "distractor": world.family == "arith" and form.extra[2] is not None,
            "world_digest": world.digest,
            "key": form.key,
            "wanted": wanted,
        },
    )


def _new_form(world: Generated, held_out: bool, rng: random.Random, used: set[str]) -> Form:
    for _ in range(MOST_DRAWS):
        form = world.draw(rng, held_out)
        if form.key not in used and execute(form.program, world.tools()).status == "ok":
            used.add(form.key)
            return form
    kind = "held-out" if held_out else "held-in"
    raise DataError(f"{world.family}: no further different {kind} task; ask for fewer (moat.tasks)")


def _wanted(form: Form) -> list[Any]:
    type, attributes = form.extra
    return [type, *attributes]


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, Fraction) else value

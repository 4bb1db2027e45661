"""Oracle trajectories: what an agent would do that knows the plan, with what the retriever really finds.

They teach the form of turns (the warm-up), and reading (the skill stage of small models). The place of the gold passage
must not give it away: it keeps its real rank where it is found, and a random one of the shown places otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mobula.data.records import Document
from mobula.models.causal import CausalModel
from mobula.rag.exsearch.chat import FACT, NONE, Chat
from mobula.rag.exsearch.config import Mode
from mobula.rag.exsearch.sources import Lookup, Problem
from mobula.rag.exsearch.training import QueryRows
from mobula.rag.exsearch.trajectory import GIVEN, Action, Aside, Selection, Trajectory, Turn, rows
from mobula.rag.objective import LATENT
from mobula.rag.permutations import written
from mobula.rag.search import Searcher

DEPTH = 20  # a gold passage beyond this rank could not have been found


@dataclass(frozen=True)
class Oracle:
    """Writes trajectories in a model's tokens. ``shuffle``: shown passages stand in random order (skill stage)."""

    model: CausalModel
    chat: Chat
    searcher: Searcher
    mode: Mode
    k_show: int
    k_candidates: int
    shuffle: bool = False

    def rows(self, problems: Sequence[Problem], seed: int) -> list[QueryRows]:
        """What is learned from each problem; those whose gold passages cannot be found are left out."""
        found = []
        for problem in problems:
            trajectory = self.trajectory(problem, random.Random(f"oracle {seed} {problem.id}"))
            if trajectory is not None:
                gold = [*self.model.encode(problem.answers[0]), self.model.eos]
                found.append(QueryRows(rows(trajectory, gold, 1.0)))
        return found

    def trajectory(self, problem: Problem, chance: random.Random) -> Trajectory | None:
        """The trajectory of a problem's plan, or None."""
        found = Trajectory(turns=[Turn.given("user", problem.question, self.chat.begin(problem.question))])
        fact = ""
        for number, step in enumerate(problem.plan):
            query = step.query if self.mode.think else problem.question
            self._say(found, Action("query", fact, query), first=number == 0)
            passages = self._passages(found, query, step, chance)
            if passages is None:
                return None
            found.queries.append(query)
            found.shown.append([passage.id for passage in passages])
            found.turns.append(Turn.given("user", "", self.chat.found(passages)))
            settled = step.passage in found.shown[-1]
            fact = step.fact if settled else ""
            found.facts.append(fact)
            if self.mode.apart:
                found.notes.append(Aside(self.chat.note(query, passages), self._turn(f"{FACT} {fact or NONE}")))
        self._say(found, Action("final", fact), first=False)
        found.turns.append(Turn.given("user", "", self.chat.close(problem.question)))
        return found

    def _say(self, found: Trajectory, action: Action, *, first: bool) -> None:
        written = not first and self.mode.record
        apart = f"{FACT} {action.fact or NONE}{self.chat.gap}" if written and self.mode.apart else ""
        found.turns.append(self._turn(action.written(self.chat.gap, fact=written), apart))

    def _turn(self, text: str, given: str = "") -> Turn:
        """A turn that is learned, but for the part ``given`` that it begins with."""
        start, rest = self.model.encode(given), [*self.model.encode(text.removeprefix(given)), self.model.eos]
        mask, zeros = [GIVEN] * len(start) + [LATENT] * len(rest), [0.0] * len(rest)
        return Turn("assistant", text, [*start, *rest], mask, zeros, list(zeros))

    def _passages(self, found: Trajectory, query: str, step: Lookup, chance: random.Random) -> list[Document] | None:
        """What is shown for a step; None if its gold passage cannot be found."""
        if not self.mode.search:
            return []
        ids = [hit.id for hit in self.searcher.search([query], DEPTH)[0]]
        if not self.mode.think:
            return [self.searcher.document(id) for id in ids[: self.k_show]]
        if step.passage not in ids:
            return None
        if self.mode.select:
            return self._chosen(found, query, step, ids[: self.k_candidates], chance)
        shown = _with_gold(ids[: self.k_show], step.passage, chance)
        if self.shuffle:
            shown = [
                step.passage,
                *chance.sample([id for id in ids if id != step.passage], chance.randrange(self.k_show)),
            ]
            chance.shuffle(shown)
        return [self.searcher.document(id) for id in shown]

    def _chosen(
        self, found: Trajectory, query: str, step: Lookup, candidates: list[str], chance: random.Random
    ) -> list[Document]:
        """The candidates as an oracle selects them: the gold passage first, then in the retriever's order."""
        candidates = _with_gold(candidates, step.passage, chance)
        order = sorted(candidates, key=lambda id: id != step.passage)[: self.k_show]
        text = written([candidates.index(id) + 1 for id in order])
        prompt = self.chat.choose(query, [self.searcher.document(id) for id in candidates])
        found.selections.append(Selection(prompt, self._turn(text), order))
        return [self.searcher.document(id) for id in order]


def _with_gold(ids: Sequence[str], gold: str, chance: random.Random) -> list[str]:
    """The ids, the gold one among them: in a random place, if it was not there."""
    found = list(ids)
    if gold not in found:
        found[chance.randrange(len(found))] = gold
    return found

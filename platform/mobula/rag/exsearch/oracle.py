"""Oracle trajectories: what an agent would do that knows the plan, with what the retriever really finds.

They teach the form of turns (the warm-up), and reading (the skill stage of small models). The position of the
gold passage must not give it away: it keeps its real rank where it is found, and has a random one otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mobula.data.records import Document
from mobula.errors import DataError
from mobula.models.causal import CausalModel
from mobula.rag.exsearch.chat import FACT, NONE, Chat
from mobula.rag.exsearch.config import Mode
from mobula.rag.exsearch.data import Lookup, Problem
from mobula.rag.exsearch.trajectory import GIVEN, Action, Aside, Selection, Trajectory, Turn, rows
from mobula.rag.objective import LATENT
from mobula.rag.permutations import written
from mobula.rag.search import Searcher
from mobula.rag.weighted_rows import QueryRows

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
        """The rows of each problem's trajectory; problems whose gold passages cannot be found are left out."""
        result = []
        for problem in problems:
            trajectory = self.trajectory(problem, random.Random(f"oracle {seed} {problem.id}"))
            if trajectory is not None:
                gold = [*self.model.encode(problem.answers[0]), self.model.eos]
                result.append(QueryRows(rows(trajectory, gold, 1.0)))
        return result

    def trajectory(self, problem: Problem, rng: random.Random) -> Trajectory | None:
        """The trajectory of a problem's plan, or None."""
        trajectory = Trajectory(turns=[Turn.given("user", problem.question, self.chat.begin(problem.question))])
        fact = ""
        for number, step in enumerate(problem.plan):
            query = self._query(step) if self.mode.think else problem.question
            self._act(trajectory, Action("query", fact, query), first=number == 0)
            passages = self._passages(trajectory, query, step, rng)
            if passages is None:
                return None
            trajectory.queries.append(query)
            trajectory.shown.append([passage.id for passage in passages])
            trajectory.turns.append(Turn.given("user", "", self.chat.results(passages)))
            fact = self._fact(step) if step.passage in trajectory.shown[-1] else ""
            trajectory.facts.append(fact)
            if self.mode.record_from_evidence:
                turn = self._turn(f"{FACT} {fact or NONE}")
                trajectory.notes.append(Aside(self.chat.note(query, passages), turn))
        self._act(trajectory, Action("final", fact), first=False)
        trajectory.turns.append(Turn.given("user", "", self.chat.close(problem.question)))
        return trajectory

    def _query(self, step: Lookup) -> str:
        """What an oracle looks up.

        Raises:
            DataError: for a passage without a title, where the question says no steps.
        """
        query = step.query or self.searcher.document(step.passage).title
        if not query:
            raise DataError(f"passage {step.passage!r} has no title to look up; give it one, or the question its steps")
        return query

    def _fact(self, step: Lookup) -> str:
        return step.fact or " ".join(self.searcher.document(step.passage).text.split())

    def _act(self, trajectory: Trajectory, action: Action, *, first: bool) -> None:
        written = not first and self.mode.record
        given = f"{FACT} {action.fact or NONE}{self.chat.separator}"
        text = action.written(self.chat.separator, fact=written)
        trajectory.turns.append(self._turn(text, given if written and self.mode.record_from_evidence else ""))

    def _turn(self, text: str, given: str = "") -> Turn:
        """A turn that is learned, but for the part ``given`` that it begins with."""
        start, rest = self.model.encode(given), [*self.model.encode(text.removeprefix(given)), self.model.eos]
        mask, zeros = [GIVEN] * len(start) + [LATENT] * len(rest), [0.0] * len(rest)
        return Turn("assistant", text, [*start, *rest], mask, zeros, list(zeros))

    def _passages(self, trajectory: Trajectory, query: str, step: Lookup, rng: random.Random) -> list[Document] | None:
        """What is shown for a step; None if its gold passage cannot be found."""
        if not self.mode.search:
            return []
        ids = [hit.id for hit in self.searcher.search([query], min(DEPTH, self.searcher.size or DEPTH))[0]]
        if not self.mode.think:
            return [self.searcher.document(id) for id in ids[: self.k_show]]
        if step.passage not in ids:
            return None
        if self.mode.select:
            return self._chosen(trajectory, query, step, ids[: self.k_candidates], rng)
        shown = _with_gold(ids[: self.k_show], step.passage, rng)
        if self.shuffle:
            others = [id for id in ids if id != step.passage]
            shown = [step.passage, *rng.sample(others, rng.randrange(self.k_show))]
            rng.shuffle(shown)
        return [self.searcher.document(id) for id in shown]

    def _chosen(
        self, trajectory: Trajectory, query: str, step: Lookup, candidates: list[str], rng: random.Random
    ) -> list[Document]:
        """The candidates as an oracle selects them: the gold passage first, then in the retriever's order."""
        candidates = _with_gold(candidates, step.passage, rng)
        permutation = sorted(candidates, key=lambda id: id != step.passage)[: self.k_show]
        text = written([candidates.index(id) + 1 for id in permutation])
        prompt = self.chat.choose(query, [self.searcher.document(id) for id in candidates])
        trajectory.selections.append(Selection(prompt, self._turn(text), permutation))
        return [self.searcher.document(id) for id in permutation]


def _with_gold(ids: Sequence[str], gold: str, rng: random.Random) -> list[str]:
    """The ids, the gold one among them: at a random position, if it was not there."""
    result = list(ids)
    if gold not in result:
        result[rng.randrange(len(result))] = gold
    return result

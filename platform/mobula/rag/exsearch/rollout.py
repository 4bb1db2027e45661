"""Rollouts: many questions in flight, one batched generation and one batched search a round.

Every token is drawn with a seed of its own (trajectory, round), so a trajectory does not depend on what else is in
flight. Sampling, evaluation and serving run the same code; only temperature and batch differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mobula.alternation import seed_of
from mobula.data.records import Document
from mobula.models.language_model import Continuation, LanguageModel, Sampling
from mobula.rag.exsearch.chat import FACT, NONE, QUERY, SEARCH, Chat, chat_of
from mobula.rag.exsearch.config import Mode, RolloutConfig
from mobula.rag.exsearch.trajectory import GIVEN, Action, Aside, Selection, Trajectory, Turn, parse, parse_fact
from mobula.rag.objective import LATENT
from mobula.rag.permutations import parse_permutation
from mobula.rag.search import Reply, Retrying

GREEDY = 0.0
SELECTION_TOKENS = 6  # most tokens for each number of a selection, with brackets and arrow


@dataclass
class Episode:
    """A question in flight. ``open``: the agent may go on searching. ``memory``: what the model keeps of its chat."""

    question: str
    seed: int
    trajectory: Trajectory = field(default_factory=Trajectory)
    open: bool = True
    memory: Any = field(default=None, repr=False, compare=False)

    @property
    def rounds(self) -> int:
        """How many turns the agent has had."""
        return sum(turn.role == "assistant" for turn in self.trajectory.turns)

    @property
    def query(self) -> str:
        """The last sub-query."""
        return self.trajectory.queries[-1]

    @property
    def candidates(self) -> list[str]:
        """The passages that it found."""
        return [id for id, _, _ in self.trajectory.hits[-1]]


class Rollouts:
    """An agent with its model, its searcher and its limits."""

    def __init__(
        self,
        model: LanguageModel,
        searcher: Retrying,
        config: RolloutConfig,
        mode: Mode | None = None,
        greedy: bool = False,
    ) -> None:
        self.model, self.searcher, self.config, self.mode = model, searcher, config, mode or Mode()
        self.chat: Chat = chat_of(model, config.max_passage_tokens)
        self.temperature = GREEDY if greedy else config.temperature

    def run(self, questions: Sequence[str], seeds: Sequence[int]) -> list[Trajectory]:
        """The trajectories of questions, each with its seed, answers included."""
        episodes = [self.begin(question, seed) for question, seed in zip(questions, seeds, strict=True)]
        for _ in range(self.config.max_turns):
            self.round(episodes)
        self.answer(episodes)
        return [episode.trajectory for episode in episodes]

    def begin(self, question: str, seed: int) -> Episode:
        """A question before the agent's first turn."""
        episode = Episode(question, seed)
        episode.trajectory.turns.append(Turn.given("user", question, self.chat.begin(question)))
        return episode

    def round(self, episodes: Sequence[Episode]) -> None:
        """One turn of the agent in every open episode, and the searches that follow from it."""
        going = [episode for episode in episodes if episode.open]
        if not going:
            return
        starts = self._prefixes(going)
        continuations = self._draw(going, starts, self.config.max_action_tokens, "act")
        broken = []
        for episode, start, continuation in zip(going, starts, continuations, strict=True):
            action = self._parse(episode, self._text(start, continuation))
            if action.kind != "malformed" or self.config.on_malformed == "terminate":
                self._say(episode, action, start, continuation)
            if action.kind == "malformed":
                broken.append((episode, start, continuation))
        self._repair(broken)
        self._search([episode for episode in going if episode.open])

    def answer(self, episodes: Sequence[Episode]) -> None:
        """Close the episodes: ask for the answers and keep them."""
        if not episodes:
            return
        for episode in episodes:
            if episode.open:
                episode.open, episode.trajectory.flags.forced_final = False, True
            turn = Turn.given("user", "", self.chat.close(episode.question))
            episode.trajectory.turns.append(turn)
        continuations = self._draw(episodes, [[] for _ in episodes], self.config.max_answer_tokens, "answer")
        for episode, continuation in zip(episodes, continuations, strict=True):
            episode.trajectory.close(self._turn([], continuation))

    def direct(self, questions: Sequence[str], seeds: Sequence[int]) -> list[Trajectory]:
        """Answers without an agent's turns, from nothing or from what the question itself finds."""
        trajectories = self.prompts(questions)
        contexts = [trajectory.context for trajectory in trajectories]
        continuations = self._sample(contexts, self.config.max_answer_tokens, seeds)
        for trajectory, continuation in zip(trajectories, continuations, strict=True):
            trajectory.close(self._turn([], continuation))
        return trajectories

    def prompts(self, questions: Sequence[str]) -> list[Trajectory]:
        """What :meth:`direct` answers: questions, with what they find if the mode searches."""
        trajectories = [Trajectory() for _ in questions]
        if self.mode.search:
            replies = self.searcher.ask(questions, self.config.k_show)
            for trajectory, question, reply in zip(trajectories, questions, replies, strict=True):
                trajectory.queries.append(question)
                trajectory.keep(reply)
                trajectory.shown.append([hit.id for hit in reply.hits])
        for trajectory, question in zip(trajectories, questions, strict=True):
            passages = self._documents(trajectory.shown[0]) if trajectory.shown else []
            trajectory.turns.append(Turn.given("user", question, self.chat.direct(question, passages)))
        return trajectories

    def _parse(self, episode: Episode, text: str) -> Action:
        first = episode.rounds == 0
        return parse(text, fact=not first and self.mode.record, query=first)

    def _prefixes(self, episodes: Sequence[Episode]) -> list[list[int]]:
        """How each turn begins: with the fact, where it is written beside the chat; with nothing otherwise."""
        prefixes: list[list[int]] = [[] for _ in episodes]
        rows = [row for row, episode in enumerate(episodes) if self.mode.record_from_evidence and episode.rounds]
        writing = [episodes[row] for row in rows]
        prompts = [self.chat.note(episode.query, self._documents(episode.trajectory.shown[-1])) for episode in writing]
        for row, aside in zip(rows, self._asides(writing, prompts, self.config.max_action_tokens, "note"), strict=True):
            fact, marked = parse_fact(aside.turn.text)
            episodes[row].trajectory.notes.append(aside)
            episodes[row].trajectory.flags.malformed += not marked
            prefixes[row] = self.model.encode(f"{FACT} {fact or NONE}{self.chat.separator}")
        return prefixes

    def _repair(self, broken: Sequence[tuple[Episode, Sequence[int], Continuation]]) -> None:
        """A second chance: the turn begins as it must, and the agent writes on."""
        for episode, _, _ in broken:
            episode.trajectory.flags.malformed += 1
        if self.config.on_malformed == "terminate" or not broken:
            return
        episodes = [episode for episode, _, _ in broken]
        starts = [self._start(*parts) for parts in broken]
        continuations = self._draw(episodes, starts, self.config.max_action_tokens, "repair")
        for episode, start, continuation in zip(episodes, starts, continuations, strict=True):
            episode.trajectory.flags.repaired += 1
            self._say(episode, self._parse(episode, self._text(start, continuation)), start, continuation)

    def _start(self, episode: Episode, start: Sequence[int], continuation: Continuation) -> list[int]:
        if start or episode.rounds == 0 or not self.mode.record:
            return [*start, *self.model.encode(QUERY)]
        lines = [line.strip() for line in self._text([], continuation).replace(FACT, " ").split("\n") if line.strip()]
        return self.model.encode(f"{FACT} {lines[0] if lines else ''}{self.chat.separator}{QUERY}")

    def _say(self, episode: Episode, action: Action, start: Sequence[int], continuation: Continuation) -> None:
        """Put the agent's turn into the chat, with what it means; a turn that cannot be read ends the search."""
        trajectory, first = episode.trajectory, episode.rounds == 0
        turn = self._turn(start, continuation)
        own = action.kind != "query" or self.mode.think
        wanted = action if own else replace(action, query=episode.question)  # without thinking, the question itself
        unasked = FACT in turn.text and not self.mode.record
        if action.kind != "malformed" and (wanted != action or unasked):
            text = wanted.written(self.chat.separator, fact=not first and self.mode.record)
            turn = Turn.given("assistant", text, [*self.model.encode(text), self.model.eos])
        trajectory.turns.append(turn)
        if action.kind == "malformed":
            episode.open, trajectory.flags.forced_final = False, True
            return
        if not first and self.mode.record:
            trajectory.facts.append(action.fact)
            trajectory.flags.empty_facts += not action.fact
        if action.kind == "final":
            episode.open = False
        elif episode.rounds == self.config.max_turns:
            episode.open, trajectory.flags.forced_final = False, True
        else:
            trajectory.flags.repeat_queries += wanted.query in trajectory.queries
            trajectory.queries.append(wanted.query)

    def _search(self, episodes: Sequence[Episode]) -> None:
        if not episodes:
            return
        depth = self.config.k_candidates if self.mode.select else self.config.k_show
        replies = [Reply([])] * len(episodes)
        if self.mode.search:
            replies = self.searcher.ask([episode.query for episode in episodes], depth)
        for episode, reply in zip(episodes, replies, strict=True):
            episode.trajectory.keep(reply)
        self._choose(episodes)
        for episode in episodes:
            shown = self._documents(episode.trajectory.shown[-1])
            ids = self.chat.results(shown)
            turn = self.config.max_action_tokens * (2 if self.mode.record_from_evidence else 1)
            room = turn + 2 * len(self.chat.close(episode.question))
            if episode.trajectory.length + len(ids) + room + self.config.max_answer_tokens > self.config.seq_len:
                episode.open, episode.trajectory.flags.overflow = False, True
                episode.trajectory.shown[-1] = []
                continue
            text = "\n".join([SEARCH, *(f"[{i}] {p.title}: {p.text}" for i, p in enumerate(shown, 1))])
            episode.trajectory.turns.append(Turn.given("user", text, ids))

    def _choose(self, episodes: Sequence[Episode]) -> None:
        """Which of the candidates are shown: the first ones, or those that the agent selects."""
        for episode in episodes:
            episode.trajectory.shown.append(episode.candidates[: self.config.k_show])
        choosing = [episode for episode in episodes if self.mode.select and episode.candidates]
        prompts = [self.chat.choose(episode.query, self._documents(episode.candidates)) for episode in choosing]
        asides = self._asides(choosing, prompts, SELECTION_TOKENS * self.config.k_show, "select")
        for episode, aside in zip(choosing, asides, strict=True):
            ids, trajectory = episode.candidates, episode.trajectory
            permutation = parse_permutation(aside.turn.text, len(ids))
            chosen = [ids[number - 1] for number in permutation[: self.config.k_show]]
            trajectory.flags.malformed_selections += not chosen
            trajectory.shown[-1] = chosen or trajectory.shown[-1]
            trajectory.selections.append(Selection(aside.prompt, aside.turn, chosen))

    def _asides(
        self, episodes: Sequence[Episode], prompts: Sequence[list[int]], most: int, what: str
    ) -> Iterator[Aside]:
        """What agents write after prompts by themselves."""
        seeds = [seed_of(episode.seed, episode.rounds, what) for episode in episodes]
        for prompt, continuation in zip(prompts, self._sample(prompts, most, seeds), strict=True):
            yield Aside(prompt, self._turn([], self._cut(continuation)))

    def _documents(self, ids: Sequence[str]) -> list[Document]:
        return [self.searcher.searcher.document(id) for id in ids]

    def _draw(
        self, episodes: Sequence[Episode], starts: Sequence[Sequence[int]], most: int, what: str
    ) -> list[Continuation]:
        """What agents say next, after what is put into their mouths."""
        prompts = [[*e.trajectory.context, *start] for e, start in zip(episodes, starts, strict=True)]
        seeds = [seed_of(episode.seed, episode.rounds, what) for episode in episodes]
        memory = [episode.memory for episode in episodes]
        continuations = self._sample(prompts, most, seeds, memory)
        for episode, state in zip(episodes, memory, strict=True):
            episode.memory = state
        return [self._cut(continuation) for continuation in continuations]

    def _sample(
        self, prompts: Sequence[Sequence[int]], most: int, seeds: Sequence[int], memory: list[Any] | None = None
    ) -> list[Continuation]:
        sampling = Sampling(most, self.temperature, self.config.top_p)
        return self.model.sample(prompts, sampling, seeds, self.config.batch, memory) if prompts else []

    def _cut(self, continuation: Continuation) -> Continuation:
        """Without what an agent wrote in the environment's name: all from the environment's marker on."""
        ids, text = continuation.ids, self.model.decode(continuation.ids)
        if SEARCH not in text:
            return continuation
        # A token that has only a part of the marker goes as well.
        end = text.index(SEARCH)
        keep = max(n for n in range(len(ids)) if len(self.model.decode(ids[:n])) <= end)
        return Continuation(ids[:keep], continuation.log_probs[:keep], continuation.log_q[:keep], ended=False)

    def _text(self, start: Sequence[int], continuation: Continuation) -> str:
        return self.model.decode([*start, *continuation.ids]).strip()

    def _turn(self, start: Sequence[int], continuation: Continuation) -> Turn:
        """A turn with its end, which is not learned if it was not drawn."""
        log_probs, log_q = list(continuation.log_probs), list(continuation.log_q)
        mask = [GIVEN] * len(start) + [LATENT] * len(log_probs) + [GIVEN] * (not continuation.ended)
        ids = [*start, *continuation.ids, self.model.eos]
        return Turn("assistant", self._text(start, continuation), ids, mask, log_probs, log_q)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("rollouts hold an open model; send the worker that opens it")

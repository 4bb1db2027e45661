"""How the `searcher` application answers: questions that wait take their turns together, and every turn is told."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import lru_cache
from typing import Any

from mobula import artifacts, methods
from mobula.rag.exsearch.artifact import KIND, Predictor
from mobula.rag.exsearch.rollout import Episode, Rollouts
from mobula.rag.exsearch.trajectory import GIVEN
from mobula.serving.application import DONE, Event
from mobula.serving.batching import Batcher
from mobula.serving.chat_completions import (
    Answer,
    Call,
    Chat,
    ChatRequest,
    Reasoning,
    Returned,
    Step,
    Usage,
    greedy,
)
from mobula.serving.metrics import Metrics
from mobula.threads import one_thread
from serve_apps.searcher_schema import SearcherArgs, SolveRequest

Limits = tuple[int, int]  # turns, tokens of a turn


class State:
    """The agent of an artifact with its passages."""

    def __init__(self, args: SearcherArgs) -> None:
        artifact = artifacts.open_artifact(args.artifact, kind=KIND)
        self.predictor: Predictor = methods.get(artifact.method).load(artifact)
        self.rollouts: Rollouts = self.predictor.rollouts
        self.version = artifact.identity


class Solving:
    """Answers questions with the agent of ``state``."""

    def __init__(self, state: State, args: SearcherArgs, metrics: Metrics) -> None:
        self.state, self.args, self.metrics = state, args, metrics
        self.batcher = Batcher(self._compute, args.max_batch_size, metrics.batch)
        self._limited = lru_cache(maxsize=64)(self._with_limits)

    def facts(self) -> dict[str, Any]:
        """What the agent searches, example questions by kind, and its limits."""
        config = self.state.rollouts.config
        limits = {"max_searches": config.max_turns - 1, "max_tokens": config.max_action_tokens}
        return {
            "version": self.state.version,
            "retriever": self.state.predictor.agent.retrieve.kind,
            "passages_shown": config.k_show,
            "examples": self.state.predictor.examples,
            "limits": limits,
        }

    def chat(self) -> Chat:
        """One model; searches are its tool calls, and the facts that it records its reasoning."""
        return Chat(["searcher"], self.state.version, self._steps)

    def _steps(self, asked: ChatRequest) -> AsyncGenerator[Step, None]:
        greedy(asked)
        return self._replied(SolveRequest(question=asked.question))

    async def _replied(self, request: SolveRequest) -> AsyncGenerator[Step, None]:
        async with aclosing(self.events(request)) as events:
            async for name, value in events:
                if name == "search":
                    yield Call("search", value)
                elif name == "evidence":
                    yield Returned(json.dumps(value["passages"], ensure_ascii=False))
                elif name == "fact":
                    yield Reasoning(f"{value['fact']}\n")
                elif name == DONE:
                    yield Answer(value["answer"], value["status"], Usage(value["prompt_tokens"], value["tokens"]))

    def check(self, request: SolveRequest) -> None:
        """Any question can be asked."""

    def close(self) -> None:
        """End the batches."""
        self.batcher.close()

    async def events(self, request: SolveRequest) -> AsyncGenerator[Event, None]:
        """`search`, `evidence` and `fact` in turn, then `answer`, and `done` with everything."""
        began, limits = time.perf_counter(), self._limits(request)
        episode: Episode = await self.batcher.submit(("begin", limits), Episode(request.question, 0))
        for _ in range(limits[0]):
            before = episode
            episode = await self.batcher.submit(("turn", limits), episode)
            for event in self._turn_events(before, episode):
                yield event
            if not episode.open:
                break
        episode = await self.batcher.submit(("answer", limits), episode)
        answer, status = episode.trajectory.prediction, _status(episode)
        yield "answer", {"answer": answer, "status": status}
        ms = round(1000 * (time.perf_counter() - began), 3)
        self.metrics.solved(status, ms)
        facts = {**self._tokens(episode), "ms": ms, "version": self.state.version}
        yield "done", {"answer": answer, "status": status, "searches": self._searches(episode), **facts}

    def _limits(self, request: SolveRequest) -> Limits:
        """What was asked for, within what the agent was trained with; in its last turn it does not search."""
        most = self.state.rollouts.config
        turns = min(most.max_turns, (request.max_searches or most.max_turns) + 1)
        return turns, min(most.max_action_tokens, request.max_tokens or most.max_action_tokens)

    def _turn_events(self, before: Episode, after: Episode) -> list[Event]:
        """What a turn has added: the fact of the last search, the next sub-query, and what it found."""
        old, new = before.trajectory, after.trajectory
        events: list[Event] = [("fact", {"fact": fact}) for fact in new.facts[len(old.facts) :]]
        for number in range(len(old.queries), len(new.queries)):
            events.append(("search", {"query": new.queries[number]}))
            events.append(("evidence", {"passages": self._passages(after, number)}))
        return events

    def _passages(self, episode: Episode, number: int) -> list[dict[str, Any]]:
        scores = {id: (score, rank) for id, score, rank in episode.trajectory.hits[number]}
        passages = []
        for id in episode.trajectory.shown[number]:
            document, (score, rank) = self.state.rollouts.searcher.searcher.document(id), scores[id]
            passages.append({"id": id, "title": document.title, "text": document.text, "rank": rank, "score": score})
        return passages

    def _searches(self, episode: Episode) -> list[dict[str, Any]]:
        trajectory = episode.trajectory
        facts = [*trajectory.facts, *(None for _ in trajectory.queries)]
        return [
            {"query": query, "evidence": self._passages(episode, number), "fact": facts[number]}
            for number, query in enumerate(trajectory.queries)
        ]

    @staticmethod
    def _tokens(episode: Episode) -> dict[str, int]:
        """What the agent wrote, and what it was given to read; each counts once, though later turns read it again."""
        trajectory = episode.trajectory
        written = len(trajectory.sampled) + (len(trajectory.answer.log_probs) if trajectory.answer else 0)
        given = sum(turn.mask.count(GIVEN) for turn in trajectory.turns)
        return {"tokens": written, "prompt_tokens": given + sum(len(aside.prompt) for aside in trajectory.asides)}

    def _compute(self, group: tuple[str, Limits], items: Sequence[Episode]) -> list[Episode]:
        """A step of a batch of questions. Their state is copied: a batch that fails leaves it as it was."""
        what, limits = group
        rollouts, episodes = self._limited(limits), copy.deepcopy(list(items))
        with one_thread():
            if what == "begin":
                return [rollouts.begin(episode.question, episode.seed) for episode in episodes]
            (rollouts.round if what == "turn" else rollouts.answer)(episodes)
        return episodes

    def _with_limits(self, limits: Limits) -> Rollouts:
        trained = self.state.rollouts
        config = replace(trained.config, max_turns=limits[0], max_action_tokens=limits[1])
        return Rollouts(trained.model, trained.searcher, config, trained.mode, greedy=True)


def _status(episode: Episode) -> str:
    flags = episode.trajectory.flags
    if flags.retriever_errors:
        return "no_retriever"
    return "limit" if flags.forced_final or flags.overflow else "ok"

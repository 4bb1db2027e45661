"""How the `rag` application answers: passages are found, some are chosen, and the answer is read from these."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from mobula import artifacts, methods
from mobula.rag.candidates import Request
from mobula.rag.dro.artifact import RETRIEVED, Pick, Predictor
from mobula.serving.application import DONE, Event
from mobula.serving.batching import Batcher
from mobula.serving.chat_completions import Answer, Call, Chat, ChatRequest, Returned, Step, greedy
from mobula.serving.metrics import Metrics
from mobula.threads import one_thread
from serve_apps.rag_schema import AnswerRequest, RagArgs

logger = logging.getLogger("mobula.serving")


@dataclass
class State:
    """What answers, and the artifact that it is from."""

    predictor: Predictor
    version: str

    @classmethod
    def load(cls, args: RagArgs) -> State:
        """Open the artifact, verify it and load its networks.

        Raises:
            ArtifactError: if it is missing, damaged or of another kind.
        """
        artifact = artifacts.open_artifact(args.artifact, kind=RETRIEVED)
        return cls(methods.get(artifact.method).load(artifact), artifact.identity)


class Answering:
    """Answers questions with the networks of ``state``."""

    def __init__(self, state: State, args: RagArgs, metrics: Metrics) -> None:
        self.state, self.args, self.metrics = state, args, metrics
        self.batcher = Batcher(_each, args.max_batch_size, metrics.batch)

    def facts(self) -> dict[str, Any]:
        """How many passages are found and chosen, and questions to try."""
        config = self.state.predictor.config
        counts = {"candidates": config.candidates, "choose": config.choose}
        examples = self.state.predictor.examples
        return {"version": self.state.version, "retriever": config.kind, **counts, "examples": examples}

    def chat(self) -> Chat:
        """One model; finding passages and choosing some are its tool calls."""
        return Chat(["rag"], self.state.version, self._steps)

    def _steps(self, asked: ChatRequest) -> AsyncGenerator[Step, None]:
        greedy(asked)
        return self._replied(AnswerRequest(question=asked.question))

    async def _replied(self, request: AnswerRequest) -> AsyncGenerator[Step, None]:
        async with aclosing(self.events(request)) as events:
            async for name, value in events:
                if name == "candidates":
                    candidates = value["candidates"]
                    yield Call("search", {"query": request.question})
                    yield Returned(_text(candidates))
                elif name == "selected":
                    yield Call("select", {"ids": [candidate["id"] for candidate in candidates]})
                    yield Returned(_text(value["passages"]))
                elif name == DONE:
                    # The networks may be readers of passages, which write no tokens: none are counted.
                    yield Answer(value["answer"] or None, _status(value["flags"]), None, "no passage has an answer")

    def check(self, request: AnswerRequest) -> None:
        """Any question can be asked."""

    def close(self) -> None:
        """End the batches."""
        self.batcher.close()

    async def events(self, request: AnswerRequest) -> AsyncGenerator[Event, None]:
        """`candidates`, `selected`, `answer`, and `done` with everything."""
        began, predictor = time.perf_counter(), self.state.predictor
        question, silent = await self._run(predictor.find, request.question)
        candidates = [self._candidate(question, position) for position in _ranked(question)]
        yield "candidates", {"candidates": candidates}
        picks, failed = await self._select(question) if question.candidates else ([], False)
        passages = [_chosen(pick) for pick in picks]
        flags = {"retriever_failed": silent, "selection_failed": failed}
        yield "selected", {"passages": passages, "flags": flags}
        answer = await self._run(predictor.answer, question, picks)
        yield "answer", {"answer": answer}
        ms = round(1000 * (time.perf_counter() - began), 3)
        self.metrics.solved("fallback" if silent or failed else "ok", ms)
        whole = {"answer": answer, "passages": passages, "candidates": candidates, "flags": flags}
        yield "done", {**whole, "ms": ms, "version": self.state.version}

    async def _select(self, question: Request) -> tuple[list[Pick], bool]:
        """What the selector chooses; what the retriever ranks first, and True, if it fails or is late."""
        try:
            async with asyncio.timeout(self.args.select_s):
                return await self._run(self.state.predictor.select, question), False
        except TimeoutError:
            logger.warning(
                "the selector was not finished within %g s; the retriever's order is taken", self.args.select_s
            )
        except Exception:
            logger.exception("the selector failed; the retriever's order is taken")
        return self.state.predictor.first(question), True

    def _candidate(self, question: Request, position: int) -> dict[str, Any]:
        id = question.candidates[position]
        title = self.state.predictor.searcher.searcher.document(id).title
        return {"id": id, "title": title, "rank": question.ranks[position]}

    async def _run(self, stage: Callable[..., Any], *arguments: Any) -> Any:
        return await self.batcher.submit(stage.__name__, (stage, arguments))


def _each(group: str, items: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """One stage of several questions, one after another."""
    with one_thread():
        return [stage(*arguments) for stage, arguments in items]


def _text(passages: Sequence[dict[str, Any]]) -> str:
    return json.dumps(passages, ensure_ascii=False)


def _status(flags: dict[str, bool]) -> str:
    """What was got over, in a word."""
    if flags["retriever_failed"]:
        return "no_retriever"
    return "no_selector" if flags["selection_failed"] else "ok"


def _ranked(question: Request) -> list[int]:
    return sorted(range(len(question.ranks)), key=question.ranks.__getitem__)


def _chosen(pick: Pick) -> dict[str, Any]:
    document = pick.document
    texts = {"id": document.id, "title": document.title, "text": document.text}
    return {**texts, "rank": pick.rank, "probability": pick.probability}

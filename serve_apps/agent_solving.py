"""How the `agent` application solves tasks: it writes in batches, acts in sandboxes, and tells what happens at once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any

from mobula import artifacts, methods
from mobula.agents.language import ProgramError, parse, serialise
from mobula.agents.mcp_tools import McpServer
from mobula.agents.moat.artifact import KIND, Predictor
from mobula.agents.sandbox import Limits, Workshop
from mobula.agents.worlds import Task, read_plan
from mobula.alternation import seed_of
from mobula.models.language_model import Sampling
from mobula.serving.application import DONE, Event
from mobula.serving.batching import Batcher
from mobula.serving.chat_completions import Answer, Chat, ChatRequest, Reasoning, Returned, Step, Usage
from mobula.serving.errors import RequestRefused
from mobula.serving.metrics import Metrics
from mobula.threads import one_thread
from serve_apps.agent_schema import MOST_STEPS, AgentArgs, SolveRequest
from serve_apps.agent_tools import Elsewhere, as_call, with_tools

MCP = "mcp"  # the family of an MCP server's tools
MODEL = "agent/"
TOOLS = "mobula.agents.worlds:tools"
Written = tuple[str, dict[str, int]]  # a text, and the numbers of tokens read and written
TOP_P = 0.95


class State:
    """Planner and grounder of an artifact, and tools by family with what opens them for a conversation.

    ``workshops`` are of the families that they were trained with; ``mcp`` has an MCP server's tools.
    """

    def __init__(self, args: AgentArgs) -> None:
        artifact = artifacts.open_artifact(args.artifact, kind=KIND)
        self.predictor: Predictor = methods.get(artifact.method).load(artifact)
        self.version = artifact.identity
        limits = Limits(seconds=args.tool_seconds, memory_mb=args.tool_memory_mb)
        worlds = asdict(self.predictor.agents.world_set)
        families = self.predictor.agents.worlds
        self.tools = {name: world.tools() for name, world in families.items()}
        self.openers: dict[str, Workshop | Elsewhere] = {}
        if args.mcp_url:
            server = McpServer(args.mcp_url, args.mcp_key, args.tool_seconds)
            self.tools[MCP] = server.tools(args.mcp_tools)
            self.openers[MCP] = Elsewhere(self.tools[MCP])
            self.predictor.agents = with_tools(self.predictor.agents, self.tools)
        self.workshops = {name: Workshop(TOOLS, {**worlds, "family": name}, limits) for name in families}
        self.openers |= self.workshops

    def close(self) -> None:
        """End the tools' processes."""
        for workshop in self.workshops.values():
            workshop.close()


@dataclass
class Conversation:
    """One try so far; ``status`` is empty while it goes on."""

    plan: list[str] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    observations: list[str] = field(default_factory=list)
    answer: str | None = None
    status: str = ""
    reason: str = ""


class Solving:
    """Solves tasks with the agents of ``state``."""

    def __init__(self, state: State, args: AgentArgs, metrics: Metrics) -> None:
        self.state, self.args, self.metrics = state, args, metrics
        self.batcher = Batcher(self._write, args.max_batch_size, metrics.batch)

    def facts(self) -> dict[str, Any]:
        """Their tools and example tasks by family, and their limits."""
        predictor = self.state.predictor
        families = {
            name: {
                "tools": [{"signature": tool.signature, "purpose": tool.purpose} for tool in tools.values()],
                "examples": predictor.examples.get(name, []),
            }
            for name, tools in self.state.tools.items()
        }
        limits = {"max_steps": MOST_STEPS, "max_tokens": max(predictor.most.plan, predictor.most.program)}
        return {"version": self.state.version, "families": families, "limits": limits}

    def chat(self) -> Chat:
        """A model for every family of tools; the plan is its reasoning."""
        return Chat([f"{MODEL}{family}" for family in self.state.tools], self.state.version, self._steps)

    def _steps(self, asked: ChatRequest) -> AsyncGenerator[Step, None]:
        drawn = {"temperature": asked.temperature or 0.0, "seed": asked.seed or 0}
        return self._replied(SolveRequest(task=asked.question, family=asked.model.removeprefix(MODEL), **drawn))

    async def _replied(self, request: SolveRequest) -> AsyncGenerator[Step, None]:
        async with aclosing(self.events(request)) as events:
            async for name, value in events:
                if name == "plan":
                    yield Reasoning("\n".join([*value["subgoals"], ""]))
                elif name == "call" and (call := as_call(value["call"])):
                    yield call
                elif name == "result" and as_call(value["call"]):
                    yield Returned(value["returned"])
                elif name == DONE:
                    usage = Usage(value["prompt_tokens"], value["tokens"])
                    yield Answer(value["answer"], value["status"], usage, value["conversations"][0]["reason"])

    def close(self) -> None:
        """End the batches."""
        self.batcher.close()

    def check(self, request: SolveRequest) -> None:
        """Refuse what these agents cannot do.

        Raises:
            RequestRefused: 422 for a family without tools here.
        """
        if request.family not in self.state.tools:
            known = ", ".join(self.state.tools)
            raise RequestRefused(422, "unknown_family", f"no tools for {request.family!r}; there are {known}")

    async def events(self, request: SolveRequest) -> AsyncGenerator[Event, None]:
        """`plan`, then `call` and `result` in turn, `answer` or `error`, for each conversation; `done` at the end."""
        began, read, written = time.perf_counter(), 0, 0
        talks: list[Conversation] = []
        for number in range(request.n):
            talks.append(Conversation())
            async for name, value in self._conversation(request, number, talks[-1]):
                read, written = read + value.pop("read", 0), written + value.pop("written", 0)
                yield name, {"conversation": number, **value}
        votes = Counter(talk.answer for talk in talks if talk.status == "ok")
        answer = votes.most_common(1)[0][0] if votes else None
        status = "ok" if votes else talks[0].status
        ms = round(1000 * (time.perf_counter() - began), 3)
        self.metrics.solved(status, ms)
        conversations = [vars(talk) for talk in talks]
        facts = {"tokens": written, "prompt_tokens": read, "ms": ms, "version": self.state.version}
        yield "done", {"answer": answer, "status": status, "conversations": conversations, **facts}

    async def _conversation(self, request: SolveRequest, number: int, talk: Conversation) -> AsyncIterator[Event]:
        tools = tuple(self.state.tools[request.family])
        task = Task("", request.family, "served", request.task, None, tools, None, None, "")
        plan, spent = await self._ask("plan", request, number, task, "")
        talk.plan = read_plan(plan) or [line for line in plan.splitlines() if line.strip()]
        yield "plan", {"subgoals": talk.plan, **spent}
        program, spent = await self._ask("program", request, number, task, plan)
        async for event in self._carry_out(request, program, talk):
            yield event
        facts = {"status": talk.status, **spent}
        if talk.status == "ok":
            yield "answer", {"answer": talk.answer, **facts}
        else:
            yield "error", {"error": {"code": talk.status, "message": talk.reason}, **facts}

    async def _carry_out(self, request: SolveRequest, program: str, talk: Conversation) -> AsyncIterator[Event]:
        """Every statement of a program in a sandbox of its own, until one fails."""
        try:
            statements = [serialise((statement,)) for statement in parse(program)]
        except ProgramError as error:
            talk.status, talk.reason = error.status, f"{error}, in {program!r}"
            return
        sandbox = await asyncio.to_thread(self.state.openers[request.family].open)
        try:
            for statement in statements[: request.max_steps]:
                talk.actions.append(statement)
                yield "call", {"call": statement}
                step = await asyncio.to_thread(sandbox.step, statement)
                talk.status, talk.reason = step.status, step.reason
                talk.observations.append(step.returned if step.status == "ok" else step.reason)
                yield "result", {"call": statement, "status": step.status, "returned": talk.observations[-1]}
                if step.status != "ok":
                    return
                talk.answer = step.returned
        finally:
            sandbox.close()
        if len(statements) > request.max_steps:
            talk.answer, talk.status, talk.reason = None, "limit", f"more than {request.max_steps} tool calls"

    async def _ask(self, what: str, request: SolveRequest, number: int, task: Task, plan: str) -> Written:
        """A plan or a program, and the tokens of it and its prompt."""
        most = self.state.predictor.most
        trained = most.plan if what == "plan" else most.program
        tokens = min(trained, request.max_tokens or trained)
        sampling = Sampling(tokens, request.temperature, TOP_P if request.temperature else 1.0)
        seed = seed_of(request.seed, number, what)
        return await self.batcher.submit((what, sampling), (task, plan, seed))

    def _write(self, group: tuple[str, Sampling], items: Sequence[tuple[Task, str, int]]) -> list[Written]:
        """Plans or programs of a batch."""
        what, sampling = group
        tasks, plans, seeds = zip(*items, strict=True)
        agents = self.state.predictor.agents
        with one_thread():
            if what == "plan":
                prompts, written = agents.plan_prompts(tasks), agents.plans(tasks, sampling, seeds)
            else:
                prompts, written = agents.program_prompts(tasks, plans), agents.programs(tasks, plans, sampling, seeds)
        return [
            (text, {"read": len(prompt), "written": len(continuation.log_probs)})
            for prompt, (text, continuation) in zip(prompts, written, strict=True)
        ]

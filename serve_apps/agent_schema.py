"""What the `agent` application takes and gives: its arguments, requests, events and answers."""

from __future__ import annotations

from pydantic import BaseModel, Field, model_validator

from mobula.serving.app import ModelArgs, Text
from mobula.serving.application import Request

MOST_STEPS = 8


class AgentArgs(ModelArgs):
    """Arguments of the application in cluster.yaml; its artifact is that of a finished moat run."""

    tool_seconds: float = Field(2.0, gt=0, le=60, description="time of one tool call")
    tool_memory_mb: int = Field(256, ge=16, le=65_536, description="memory that the tools of a conversation may take")
    mcp_url: str | None = Field(None, pattern="^https?://", description="MCP server whose tools are the family `mcp`")
    mcp_key: str = Field("", description="environment variable that holds that server's key; empty: none is sent")
    mcp_tools: list[str] = Field([], description="those of its tools that are wanted; empty: all")


class SolveRequest(Request):
    """A task for the agents. The task is all that they see of the request, beside the tools."""

    task: Text
    family: str = Field(max_length=64, description="whose tools the agents have, see /agents")
    max_steps: int = Field(MOST_STEPS, ge=1, le=MOST_STEPS, description="tool calls of a conversation at most")
    max_tokens: int | None = Field(None, ge=1, le=1024, description="tokens of a plan and of a program; null: trained")
    temperature: float = Field(0.0, ge=0, le=2, description="0: the likeliest plan and program")
    n: int = Field(1, ge=1, le=8, description="conversations; the answer that most of them reach is the answer")
    seed: int = Field(0, ge=0, le=2**31 - 1)
    stream: bool = Field(True, description="server-sent events as things happen; false: one JSON at the end")

    @model_validator(mode="after")
    def _different(self) -> SolveRequest:
        if self.n > 1 and self.temperature == 0:
            raise ValueError("n > 1 needs a temperature; without one every conversation is the same")
        return self


class Conversation(BaseModel):
    """One try: subgoals, tool calls and what they returned, and how it ended."""

    plan: list[str]
    actions: list[str]
    observations: list[str]
    answer: str | None
    status: str
    reason: str


class Solved(BaseModel):
    """The answer, every conversation, and what it took: tokens that were written, and those of the prompts.

    ``version`` names planner and grounder as one.
    """

    answer: str | None
    status: str
    conversations: list[Conversation]
    tokens: int
    prompt_tokens: int
    ms: float
    version: str

"""Tools of an MCP server (Model Context Protocol) as tools of the action language.

A tool's arguments are the required ones of its input schema, in the schema's order; optional ones are left out. They
are numbers and texts, as the language has no others.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import anyio
import httpx2
from anyio.from_thread import start_blocking_portal
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CallToolResult, TextContent
from mcp_types import Tool as Listed

from mobula import environment
from mobula.agents.language import Tool, ToolError
from mobula.agents.sandbox import Limits
from mobula.errors import MobulaError

KINDS = {"integer": "number", "number": "number", "string": "text"}
MOST_TOOLS = 512
_NAME = re.compile(r"(?!R\d+$|(?:Answer|Buy)$)[A-Za-z_]\w*")
_NUMBER = re.compile(r"-?\d+(?:\.\d+|/[1-9]\d*)?")
T = TypeVar("T")


class McpError(MobulaError):
    """An MCP server cannot be asked, or has a tool that the action language cannot call."""


@dataclass(frozen=True)
class McpServer:
    """A server: the address of its streamable HTTP, and the time that one call may take, in seconds.

    ``key`` is the name of the environment variable with the key that is sent as a bearer token; empty: none is sent.
    Nothing is kept between calls: each one connects anew, so a server may be restarted at any time.
    """

    url: str
    key: str = ""
    seconds: float = 10.0

    def tools(self, only: Sequence[str] = ()) -> dict[str, Tool]:
        """Its tools by name, or ``only`` some of them. What is no letter, digit or underscore of a name becomes one.

        Raises:
            McpError: if it cannot be asked, has no tool of a name, or one that the language cannot call.
        """
        listed = {tool.name: tool for tool in self._ask(_listed)}
        if missing := [name for name in only if name not in listed]:
            raise McpError(f"{self.url}: no tool {', '.join(missing)}; there are {', '.join(listed)}")
        chosen = [listed[name] for name in only or listed]
        if problems := [problem for tool in chosen if (problem := _problem(tool))]:
            raise McpError(f"{self.url}: {'; '.join(problems)}. Name the tools that are wanted")
        tools = {tool.name: tool for tool in map(self._tool, chosen)}
        if len(tools) < len(chosen):
            raise McpError(f"{self.url}: two tools have one name in the action language: {', '.join(listed)}")
        return tools

    def _tool(self, listed: Listed) -> Tool:
        properties = _required(listed.input_schema)
        described = "; ".join(f"{name}: {schema.get('description', '')}" for name, schema in properties.items())

        def call(*values: Any) -> Any:
            arguments = {name: _plain(value) for name, value in zip(properties, values, strict=True)}
            try:
                result = self._ask(lambda client: client.call_tool(listed.name, arguments))
            except McpError as error:
                raise ToolError(str(error)) from error
            return _value(result)

        kinds = tuple(_kind(schema) or "" for schema in properties.values())
        purpose = f"{listed.description or ''} ({described})" if described else listed.description or ""
        return Tool(_word(listed.name), kinds, purpose, call)

    def _ask(self, what: Callable[[Client], Awaitable[T]]) -> T:
        refusals: list[int] = []

        async def note(response: httpx2.Response) -> None:
            # The client says only that there was one.
            if response.is_error:
                refusals.append(response.status_code)

        async def ask() -> T:
            options: dict[str, Any] = {"headers": self._headers(), "event_hooks": {"response": [note]}}
            with anyio.fail_after(self.seconds):
                async with (
                    httpx2.AsyncClient(**options, timeout=self.seconds) as http,
                    Client(streamable_http_client(self.url, http_client=http)) as client,
                ):
                    return await what(client)

        try:
            # In a loop of its own: programs are carried out where none runs, and where one does.
            with start_blocking_portal() as portal:
                return portal.call(ask)
        except TimeoutError:
            raise McpError(f"{self.url}: no answer within {self.seconds:g} s") from None
        except (MCPError, httpx2.HTTPError, ValueError, BaseExceptionGroup) as error:
            status = f" (HTTP {refusals[-1]})" if refusals else ""
            wanted = "; name the environment variable with its key in `key`" if refusals[-1:] in ([401], [403]) else ""
            raise McpError(f"{self.url}: {_reason(error)}{status}{wanted}") from error

    def _headers(self) -> dict[str, str]:
        if not self.key:
            return {}
        secret = environment.secret(self.key)
        if not secret:
            raise McpError(f"{self.url}: the environment variable {self.key} of `key` is not set")
        return {"Authorization": f"Bearer {secret}"}


async def _listed(client: Client) -> list[Listed]:
    """All pages of its list."""
    tools: list[Listed] = []
    cursor = None
    while True:
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None:
            return tools
        if len(tools) > MOST_TOOLS:
            raise ValueError(f"more than {MOST_TOOLS} tools")


def _word(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _required(schema: Mapping[str, Any]) -> dict[str, Any]:
    required = set(schema.get("required") or ())
    return {name: value for name, value in (schema.get("properties") or {}).items() if name in required}


def _kind(schema: Mapping[str, Any]) -> str | None:
    """The kind of an argument: number, text or, where it may be both, any; None if it is of another type."""
    kinds = {KINDS.get(choice.get("type", "")) for choice in schema.get("anyOf", [schema])}
    return None if None in kinds else "any" if len(kinds) > 1 else kinds.pop()


def _problem(tool: Listed) -> str | None:
    """Why the language cannot call a tool."""
    if not _NAME.fullmatch(_word(tool.name)):
        return f"{tool.name} is no name in the action language"
    wrong = [name for name, schema in _required(tool.input_schema).items() if _kind(schema) is None]
    return f"{tool.name} needs {', '.join(wrong)}, neither number nor text" if wrong else None


def _plain(value: Any) -> Any:
    """A value as JSON has it; a fraction that does not end becomes the nearest float."""
    if not isinstance(value, Fraction):
        return value
    return value.numerator if value.denominator == 1 else float(value)


def _value(result: CallToolResult) -> Any:
    """What a call returned: a number where it reads as one, else text."""
    if any(not isinstance(part, TextContent) for part in result.content):
        raise ToolError("it returned something other than text")
    text = "\n".join(part.text for part in result.content if isinstance(part, TextContent))
    if len(text.encode()) > Limits.reply_bytes:
        raise ToolError(f"it returned more than {Limits.reply_bytes} bytes")
    if result.is_error:
        raise ToolError(text)
    return Fraction(text) if _NUMBER.fullmatch(text) else text


def _reason(error: BaseException) -> str:
    """The first cause of a failure: transports gather theirs in groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__

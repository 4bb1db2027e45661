"""Tools of an application as an MCP server (Model Context Protocol), by streamable HTTP below ``/mcp``.

Nothing is kept between requests, so any replica answers any of them: there are no sessions, and a client that wants a
stream from the server is told that there is none (405), as the protocol allows.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import mcp_types as types
from fastapi import FastAPI
from mcp import MCPError
from mcp.server import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from pydantic import BaseModel, ValidationError
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mobula.errors import MobulaError
from mobula.serving.app import time_limit
from mobula.serving.errors import incident, reasons, told

PATH = "/mcp"


class ToolFailed(MobulaError):
    """A tool cannot do what it is asked; the client is told why."""


@dataclass(frozen=True)
class ServedTool:
    """A tool: ``call`` gets checked ``arguments`` and gives text; it may raise a :class:`.MobulaError`."""

    name: str
    description: str
    arguments: type[BaseModel]
    call: Callable[[Any], Awaitable[str]]

    @property
    def listed(self) -> types.Tool:
        """As clients see it."""
        return types.Tool(name=self.name, description=self.description, input_schema=self.arguments.model_json_schema())


class McpServer:
    """Serves ``tools``; a call takes at most ``seconds``. ASGI; works within :meth:`running`, as an app's lifespan."""

    def __init__(self, name: str, tools: Sequence[ServedTool], seconds: float) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self.seconds = seconds
        self.server: Server[Any] = Server(name, on_list_tools=self._list, on_call_tool=self._call)
        self._manager: StreamableHTTPSessionManager | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Requests are answered within."""
        # Origins, hosts, keys and sizes are checked by the application's Guard.
        manager = StreamableHTTPSessionManager(self.server, json_response=True, stateless=True)
        async with manager.run():
            self._manager = manager
            yield

    def mount(self, app: FastAPI) -> None:
        """Add the route."""
        app.router.routes.append(Route(PATH, self, methods=["POST"]))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        assert self._manager is not None, "the application's lifespan has not begun"
        await self._manager.handle_request(scope, receive, send)

    async def _list(self, _: Any, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[tool.listed for tool in self.tools.values()])

    async def _call(self, _: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        tool = self.tools.get(params.name)
        if tool is None:
            there = ", ".join(self.tools)
            raise MCPError(types.INVALID_PARAMS, f"no tool {params.name!r}; there are {there}")
        try:
            arguments = tool.arguments.model_validate(params.arguments or {})
            async with time_limit(self.seconds):
                return _result(await tool.call(arguments))
        except ValidationError as error:
            return _result(told(reasons(error)), failed=True)
        except MobulaError as error:
            return _result(str(error), failed=True)
        except Exception:
            raise MCPError(types.INTERNAL_ERROR, incident(f"tool {tool.name}")) from None


def _result(text: str, failed: bool = False) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(type="text", text=text)], is_error=failed)

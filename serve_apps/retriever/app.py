"""The `retriever` application: search with a budget per request, watch the denoising, add and remove documents.

One deployment holds both the HTTP routes and the model: a second hop would cost more than a search does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, Query
from starlette.responses import Response

from mobula.retrieval.inputs import EmptyQuery
from mobula.retrieval.search import CONSTRAINTS, ORDERS, REMASK, BadSearch, Unsupported
from mobula.serving import pages
from mobula.serving.app import guarded, time_limit, to_json
from mobula.serving.application import Replica, deployment, frame
from mobula.serving.errors import RequestRefused
from mobula.serving.mcp_server import McpServer
from mobula.serving.metrics import Metrics
from serve_apps import CONSOLE
from serve_apps.retriever.budget import STEPWISE
from serve_apps.retriever.corpus import Corpus
from serve_apps.retriever.schema import (
    VERSIONS,
    Added,
    NewDocuments,
    Removal,
    Removed,
    RetrieverArgs,
    RetrieveRequest,
    RetrieveResponse,
    SearchRequest,
    SearchResponse,
    Versions,
)
from serve_apps.retriever.search import Searching, State

TITLE = "Mobula retriever"
STATUSES = {BadSearch: (422, "bad_search"), EmptyQuery: (422, "empty_query"), Unsupported: (409, "unsupported")}
ADDING = "/documents"
NOT_KEPT: dict[int | str, dict[str, Any]] = {507: {"model": pages.Error, "description": "the disk does not take it"}}


def create_app(state: State, args: RetrieverArgs, metrics: Metrics | None = None) -> FastAPI:
    """The HTTP application, the same under Serve and under plain uvicorn.

    Raises:
        ConfigError: if an API key is required and there is none.
    """
    searching = Searching(state, args, metrics or Metrics())
    mcp = McpServer(TITLE, [searching.tool()], args.time_limit_s)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with mcp.running():
            yield
        searching.batcher.close()

    app = guarded(TITLE, args, STATUSES, searching.metrics, lifespan, {ADDING: args.max_documents_bytes})
    frame(app, CONSOLE, "", args.reports, lambda: check_health(state))
    mcp.mount(app)
    _search_routes(app, searching)
    _corpus_routes(app, searching)
    return app


def _search_routes(app: FastAPI, searching: Searching) -> None:
    @app.post("/search", response_model=SearchResponse, responses=pages.REFUSALS)
    async def search(request: SearchRequest) -> Response:
        """Documents for a query, within the request's budget."""
        return await (searching.trace(request) if request.trace else searching.search(request))

    @app.post("/retrieve", response_model=RetrieveResponse, responses=pages.REFUSALS)
    async def retrieve(request: RetrieveRequest) -> Response:
        """Documents for several queries at once, as search agents ask for them (Search-R1's contract)."""
        return to_json({"result": await searching.retrieve(request)})

    @app.post("/trace", responses={**pages.REFUSALS, 200: pages.EVENT_STREAM}, response_class=Response)
    async def trace(request: SearchRequest) -> Response:
        """As /search, streaming one `step` event per denoising step and then a `result` event."""
        return await searching.trace(request)

    @app.get("/retrievers", response_model=dict[str, Any], responses=pages.REFUSALS)
    async def retrievers() -> Response:
        """Names, code length, decoders and measured budgets."""
        return to_json(_facts(searching.state.corpus))


def _corpus_routes(app: FastAPI, searching: Searching) -> None:
    @app.post(ADDING, response_model=Added, responses={**pages.REFUSALS, **NOT_KEPT})
    async def add(request: NewDocuments) -> Response:
        """Add documents to the corpus without training."""
        async with time_limit(searching.args.time_limit_s):
            snapshot = await searching.state.corpus.add(request.documents)
        assert snapshot.inserted is not None
        return to_json({"added": len(request.documents), "version": snapshot.version, **asdict(snapshot.inserted)})

    @app.post("/documents/remove", response_model=Removed, responses={**pages.REFUSALS, **NOT_KEPT})
    async def remove(request: Removal) -> Response:
        """Remove documents from the corpus; their ids may be added again."""
        async with time_limit(searching.args.time_limit_s):
            snapshot = await searching.state.corpus.remove(request.ids)
        return to_json({"removed": len(request.ids), "version": snapshot.version})

    @app.get("/versions", response_model=Versions, responses=pages.REFUSALS)
    async def versions(
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
        version: Annotated[int, Query(ge=0, le=VERSIONS, description="least version to tell of")] = 0,
    ) -> Response:
        """The version and size of the corpus and its last changes, newest first."""
        corpus = searching.state.corpus
        corpus.follow()
        async with time_limit(searching.args.time_limit_s):
            await corpus.reach(version)
        return to_json(corpus.versions(limit))


def check_health(state: State) -> None:
    """Raise if this replica can no longer serve.

    Raises:
        RequestRefused: 503, saying why.
    """
    # Called every few seconds, so a replica that nobody asks follows the others too.
    state.corpus.follow()
    journal = state.corpus.journal
    if journal is not None and journal.damage is not None:
        raise RequestRefused(503, "unhealthy", "the changes to this corpus cannot be read; see the log")


def _facts(corpus: Corpus) -> dict[str, Any]:
    searchable = corpus.searchable
    return {
        "retrievers": list(searchable.retrievers),
        "default": searchable.default,
        "artifact": corpus.identity,
        "levels": searchable.levels,
        "takes_documents": corpus.journal is not None,
        "decoders": {name: r.decoders for name, r in searchable.retrievers.items()},
        "stepwise": STEPWISE,
        "orders": ORDERS,
        "remask": REMASK,
        "constraints": CONSTRAINTS,
        "calibration": corpus.calibration.rows(),
    }


class Retriever(Replica):
    """A replica whose artifact can be swapped while it serves."""

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Swap in the artifact that ``user_config`` names, without losing a request.

        Raises:
            ArtifactError: if it cannot be loaded; the deployment is then unhealthy and the old one goes on.
        """
        artifact = user_config.get("artifact")
        args = RetrieverArgs.model_validate({**self.args.model_dump(), "artifact": artifact or self.args.artifact})
        if args.artifact == self.args.artifact:
            return
        self.state.corpus = await asyncio.to_thread(Corpus.load, args)
        self.args = args

    def check_health(self) -> None:
        """Called by Serve; a replica that fails is replaced."""
        check_health(self.state)


def load(args: RetrieverArgs) -> State:
    """Open the artifact with the changes to its documents."""
    return State(Corpus.load(args))


build = deployment("Retriever", RetrieverArgs, load, create_app, Retriever)

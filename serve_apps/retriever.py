"""The `retriever` application: search with a budget per request, watch the denoising, add documents.

One deployment holds both the HTTP routes and the model: a second hop would cost more than a search does.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator
from ray import serve
from ray.serve import Application
from starlette.responses import FileResponse, RedirectResponse, Response

from mobula import artifacts, methods
from mobula.config import digest, nearest
from mobula.data.records import Document
from mobula.retrieval.inputs import EmptyQuery
from mobula.retrieval.search import (
    ALL_DECODERS,
    CONSTRAINTS,
    ORDERS,
    REMASK,
    BadSearch,
    Searchable,
    SearchOptions,
    SearchResult,
    StepEvent,
    Unsupported,
)
from mobula.serving import calibration, errors, pages, reports
from mobula.serving.app import AppArgs, guarded
from mobula.serving.batching import Batcher
from mobula.serving.calibration import Calibration
from mobula.serving.errors import RequestRefused
from mobula.serving.journal import Journal, Rows
from mobula.serving.metrics import Metrics, ServeMetrics
from mobula.serving.paths import LocalPath
from mobula.serving.streaming import stream

CONSOLE = Path(__file__).parent / "console"
STATUSES = {BadSearch: (422, "bad_search"), EmptyQuery: (422, "empty_query"), Unsupported: (409, "unsupported")}
# Decoders whose cost grows with the steps; the others make a number of calls of their own.
STEPWISE = ("match", "match_rerank", "best_of_n")
SNIPPET_CHARACTERS = 240


class RetrieverArgs(AppArgs):
    """Arguments of the application in cluster.yaml."""

    artifact: LocalPath = Field(description="artifact of a finished retrieval run")
    reports: LocalPath | None = Field(None, description="directory whose runs the console shows")
    added: LocalPath | None = Field(
        None,
        description="directory that keeps added documents, shared by all replicas; null: none can be added",
    )
    max_batch_size: int = Field(16, ge=1, le=1024, description="requests computed together")
    calibration_s: float = Field(20.0, ge=0, le=600, description="time for measuring budgets at start; 0: no max_ms")


class Strict(BaseModel):
    """A request body: no unknown field, no silent conversion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SearchRequest(Strict):
    """A search. The budget is one of steps, threshold and max_ms; none means half the code length."""

    query: Annotated[str, StringConstraints(min_length=1, max_length=2000)]
    k: int = Field(10, ge=1, le=100, description="documents to return")
    retriever: str | None = Field(None, max_length=64, description="see /retrievers; null: the default one")
    decoder: Literal[ALL_DECODERS] | None = Field(None, description="null: the retriever's own")  # type: ignore[valid-type]
    steps: int | None = Field(None, ge=1, le=4096, description="denoising steps")
    threshold: float | None = Field(None, gt=0, lt=1, description="commit every position at least this confident")
    max_ms: int | None = Field(None, ge=1, le=60_000, description="largest measured budget whose p95 fits")
    order: Literal[ORDERS] = "confidence"  # type: ignore[valid-type]
    remask: Literal[REMASK] = "none"  # type: ignore[valid-type]
    constraint: Literal[CONSTRAINTS] = "bitset"  # type: ignore[valid-type]
    beam: int = Field(10, ge=1, le=256, description="width of the beam decoder")
    seed: int = Field(0, ge=0, le=2**31 - 1)
    trace: bool = Field(False, description="stream every denoising step (server-sent events), as /trace does")

    @field_validator("query")
    @classmethod
    def _not_blank(cls, query: str) -> str:
        if not query.strip():
            raise ValueError("the query is blank")
        return query

    @model_validator(mode="after")
    def _one_budget(self) -> SearchRequest:
        given = [name for name in ("steps", "threshold", "max_ms") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one budget")
        return self


class NewDocument(Strict):
    """A document to add."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    title: Annotated[str, StringConstraints(max_length=1000)] = ""
    text: Annotated[str, StringConstraints(min_length=1, max_length=20_000)]
    date: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None


class NewDocuments(Strict):
    """Documents to add; all are added, or none."""

    documents: list[NewDocument] = Field(min_length=1, max_length=64)


class FoundDocument(BaseModel):
    """A hit with enough to show it."""

    doc_id: str
    score: float | None
    title: str
    snippet: str
    code: list[int] | None = Field(description="its docid; null if the retrieval model has none for it")


class Budget(BaseModel):
    """The budget that was applied. ``over_budget``: nothing measured fits max_ms, so one_pass was run."""

    steps: int | None
    threshold: float | None
    max_ms: int | None
    over_budget: bool


class SearchResponse(BaseModel):
    """Hits, best first, with what they cost."""

    hits: list[FoundDocument]
    retriever: str
    decoder: str
    constraint: str
    scored_by: str
    nfe: int
    rows: int
    steps_used: int
    filled: int
    raw_code: list[int] | None
    raw_valid: bool | None
    ms: float
    budget: Budget


class Added(BaseModel):
    """What adding documents did."""

    added: int
    rows_version: int


class Corpus:
    """A loaded artifact with the documents that were added to it. Used from the model's thread."""

    def __init__(self, searchable: Searchable, identity: str, args: RetrieverArgs) -> None:
        self.searchable, self.identity = searchable, identity
        self.rows_version = 0
        # The file is named by the artifact, so another artifact never gets documents that it was not given.
        self.journal = Journal(args.added / f"{identity}.jsonl", self._insert) if args.added else None
        if self.journal:
            self.journal.catch_up()
        self.calibration = self._calibrate(args.calibration_s)

    @classmethod
    def load(cls, args: RetrieverArgs) -> Corpus:
        """Open the artifact, verify it and load its model.

        Raises:
            ArtifactError: if it is missing, damaged or foreign.
        """
        artifact = artifacts.open_artifact(args.artifact)
        searchable = methods.get(artifact.method).load(artifact)
        return cls(searchable, digest([artifact.method, artifact.files])[:16], args)

    def search(self, retriever: str, requests: list[tuple[str, SearchOptions]]) -> list[SearchResult]:
        """A batch, after the documents that other replicas have added."""
        self.catch_up()
        queries, options = zip(*requests, strict=True)
        return self.searchable.retrievers[retriever].search(queries, options)

    def trace(self, query: str, options: SearchOptions) -> Iterator[StepEvent | SearchResult]:
        """Denoising steps, then the result."""
        self.catch_up()
        return self.searchable.trace(query, options)

    def catch_up(self) -> None:
        """Insert the documents that other replicas have added."""
        if self.journal:
            self.journal.catch_up()

    def add(self, documents: list[NewDocument]) -> Added:
        """Add documents for all replicas.

        Raises:
            RequestRefused: 409 if the deployment takes none, or an id exists.
            Unsupported: if the retriever cannot take documents without training.
        """
        if self.journal is None:
            raise RequestRefused(409, "unsupported", "this deployment takes no documents (args.added is not set)")
        self.journal.append([d.model_dump() for d in documents], self._refuse_known)
        return Added(added=len(documents), rows_version=self.rows_version)

    def show(self, doc_id: str, score: float) -> dict[str, Any]:
        """A hit with title and the beginning of the text."""
        document = self.searchable.document(doc_id)
        # A document that the model gives no probability has score -inf, which JSON cannot hold.
        finite = score if math.isfinite(score) else None
        title, code = document["title"], document.get("code")
        return {"doc_id": doc_id, "score": finite, "title": title, "snippet": _snippet(document["text"]), "code": code}

    def _insert(self, rows: Rows) -> None:
        self.rows_version = self.searchable.insert([Document(**row) for row in rows])

    def _refuse_known(self, rows: Rows) -> None:
        ids = [row["id"] for row in rows]
        known = [i for i in ids if ids.count(i) > 1 or self._knows(i)]
        if known:
            raise RequestRefused(409, "duplicate", f"document {known[0]!r} exists already, or is given twice")

    def _knows(self, doc_id: str) -> bool:
        try:
            self.searchable.document(doc_id)
        except KeyError:
            return False
        return True

    def _calibrate(self, cap_s: float) -> Calibration:
        """Measure the default retriever on texts of its own corpus, at batch size 1."""
        if not cap_s:
            return Calibration({})
        retriever = self.searchable.retrievers[self.searchable.default]
        budgets = _powers(self.searchable.levels)
        arms = [(d, s) for d in retriever.decoders for s in (budgets if d in STEPWISE else [None])]
        seeds = retriever.search(["what"], [SearchOptions(k=calibration.REPEATS, decoder="one_pass")])[0].hits
        texts = [self.show(hit.doc_id, hit.score) for hit in seeds]
        queries = [" ".join((t["title"] or t["snippet"]).split()[:16]) or "what" for t in texts]

        def run(decoder: str, steps: int | None, repeat: int) -> None:
            retriever.search([queries[repeat % len(queries)]], [SearchOptions(decoder=decoder, steps=steps)])

        return calibration.measure(arms, run, cap_s)


@dataclass
class State:
    """What the routes share; ``corpus`` is replaced as a whole when another artifact is swapped in."""

    corpus: Corpus


def create_app(state: State, args: RetrieverArgs, metrics: Metrics | None = None) -> FastAPI:
    """The HTTP application, the same under Serve and under plain uvicorn.

    Raises:
        ConfigError: if an API key is required and there is none.
    """
    metrics = metrics or Metrics()

    def compute(group: tuple, requests: list[tuple[str, SearchOptions]]) -> list[SearchResult]:
        return state.corpus.search(group[0], requests)

    batcher = Batcher(compute, args.max_batch_size, metrics.batch)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        batcher.close()

    app = guarded("Mobula retriever", args, STATUSES, metrics, lifespan)
    pages.mount(app, CONSOLE)

    @app.get("/healthz", response_model=dict[str, str])
    async def healthz() -> Response:
        """Whether this replica can serve. Needs no key."""
        check_health(state)
        return _json({"status": "ok"})

    @app.post("/search", response_model=SearchResponse, responses=pages.REFUSALS)
    async def search(request: SearchRequest) -> Response:
        """Documents for a query, within the request's budget."""
        if request.trace:
            return _trace(request)
        start = time.perf_counter()
        corpus = state.corpus
        retriever, options, budget = _plan(request, corpus)
        group = (retriever, options.decoder, options.steps, options.threshold, options.remask)
        try:
            async with asyncio.timeout(args.time_limit_s):
                result = await batcher.submit(group, (request.query, options))
        except TimeoutError:
            raise RequestRefused(408, "timeout", f"not finished within {args.time_limit_s:g} s") from None
        ms = 1000 * (time.perf_counter() - start)
        metrics.search(retriever, result.decoder, ms)
        return _json(_found(result, corpus, retriever, budget, ms))

    @app.post("/trace", responses={**pages.REFUSALS, 200: pages.EVENT_STREAM}, response_class=Response)
    async def trace(request: SearchRequest) -> Response:
        """As /search, streaming one `step` event per denoising step and then a `result` event."""
        return _trace(request)

    @app.post("/documents", response_model=Added, responses=pages.REFUSALS)
    async def documents(request: NewDocuments) -> Response:
        """Add documents to the corpus without training."""
        added = await batcher.call(lambda: state.corpus.add(request.documents))
        return _json(added.model_dump())

    @app.get("/retrievers", response_model=dict[str, Any], responses=pages.REFUSALS)
    async def retrievers() -> Response:
        """Names, code length, decoders and measured budgets."""
        corpus = state.corpus
        return _json(
            {
                "retrievers": list(corpus.searchable.retrievers),
                "default": corpus.searchable.default,
                "artifact": corpus.identity,
                "levels": corpus.searchable.levels,
                "takes_documents": corpus.journal is not None,
                "decoders": {name: r.decoders for name, r in corpus.searchable.retrievers.items()},
                "stepwise": STEPWISE,
                "orders": ORDERS,
                "remask": REMASK,
                "constraints": CONSTRAINTS,
                "calibration": corpus.calibration.rows(),
            }
        )

    @app.get("/reports", response_model=list[dict[str, Any]], responses=pages.REFUSALS)
    async def report_list() -> Response:
        """Finished runs, newest first."""
        return _json(await asyncio.to_thread(reports.listed, args.reports))

    @app.get("/reports/{name}", response_model=dict[str, Any], responses=pages.REFUSALS)
    async def report(name: str) -> Response:
        """The report of a run."""
        return _json(await asyncio.to_thread(reports.read, args.reports, name))

    @app.get("/reports/{name}/plots/{file}", responses=pages.REFUSALS, response_class=FileResponse)
    async def plot(name: str, file: str) -> Response:
        """A plot of a run."""
        path = await asyncio.to_thread(reports.plot, args.reports, name, file)
        return FileResponse(path, media_type=reports.PLOTS[path.suffix], headers=pages.HEADERS)

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("console/")

    def _trace(request: SearchRequest) -> Response:
        corpus = state.corpus
        retriever, options, budget = _plan(request, corpus)
        if retriever != corpus.searchable.default:
            raise RequestRefused(422, "bad_search", f"only {corpus.searchable.default} has denoising steps to trace")
        return stream(_steps(request.query, options, corpus, budget))

    async def _steps(
        query: str, options: SearchOptions, corpus: Corpus, budget: dict[str, Any]
    ) -> AsyncIterator[tuple[str, Any]]:
        start = time.perf_counter()
        deadline = time.monotonic() + args.time_limit_s
        steps = batcher.iterate(lambda: corpus.trace(query, options))
        try:
            while True:
                async with asyncio.timeout(deadline - time.monotonic()):
                    item = await anext(steps)
                if isinstance(item, SearchResult):
                    ms = 1000 * (time.perf_counter() - start)
                    metrics.search(corpus.searchable.default, options.decoder, ms)
                    yield "result", _found(item, corpus, corpus.searchable.default, budget, ms)
                    return
                yield "step", vars(item)
        finally:
            await steps.aclose()  # type: ignore[attr-defined]

    return app


def check_health(state: State) -> None:
    """Raise if this replica can no longer serve.

    Raises:
        RequestRefused: 503, saying why.
    """
    journal = state.corpus.journal
    if journal is not None and journal.damage is not None:
        raise RequestRefused(503, "unhealthy", "the documents added to this corpus cannot be read; see the log")


def _plan(request: SearchRequest, corpus: Corpus) -> tuple[str, SearchOptions, dict[str, Any]]:
    """Retriever, options and applied budget of a request.

    Raises:
        RequestRefused: as :func:`_chosen`, and 422 for max_ms where nothing was measured.
        BadSearch: if the options do not fit the model.
    """
    searchable = corpus.searchable
    retriever, decoder = _chosen(request, searchable)
    steps, over_budget = request.steps, False
    if request.max_ms is not None:
        if retriever != searchable.default or decoder not in corpus.calibration.p95_ms:
            raise RequestRefused(
                422, "bad_search", f"max_ms: no latency of {decoder} with {retriever} was measured; give steps instead"
            )
        fitting = corpus.calibration.steps_within(decoder, request.max_ms)
        if fitting is None:
            decoder, over_budget = "one_pass", True
        else:
            steps = fitting[0]
    options = SearchOptions(
        k=request.k,
        # A retriever without decoders does not read this.
        decoder=decoder or SearchOptions.decoder,
        steps=steps,
        threshold=request.threshold,
        order=request.order,
        remask=request.remask,
        constraint=request.constraint,
        beam=request.beam,
        seed=request.seed,
    )
    options.check(searchable.levels)
    applied = options.budget(searchable.levels) if request.threshold is None and decoder in STEPWISE else None
    budget = Budget(steps=applied, threshold=request.threshold, max_ms=request.max_ms, over_budget=over_budget)
    return retriever, options, budget.model_dump()


def _chosen(request: SearchRequest, searchable: Searchable) -> tuple[str, str]:
    """Retriever and decoder of a request; the decoder is empty where the retriever has none.

    Raises:
        RequestRefused: 422 for an unknown retriever, or a decoder that it does not have.
    """
    retriever = request.retriever or searchable.default
    if retriever not in searchable.retrievers:
        names = list(searchable.retrievers)
        raise RequestRefused(422, "bad_search", f"unknown retriever {retriever!r}{nearest(retriever, names)}")
    decoders = searchable.retrievers[retriever].decoders
    if request.decoder is None:
        return retriever, decoders[0] if decoders else ""
    if request.decoder not in decoders:
        has = ", ".join(decoders) or "no decoders"
        raise RequestRefused(422, "bad_search", f"decoder={request.decoder}: {retriever} has {has}")
    return retriever, request.decoder


def _found(result: SearchResult, corpus: Corpus, retriever: str, budget: dict[str, Any], ms: float) -> dict[str, Any]:
    names = ("decoder", "constraint", "scored_by", "nfe", "rows", "steps_used", "filled", "raw_code", "raw_valid")
    hits = [corpus.show(hit.doc_id, float(hit.score)) for hit in result.hits]
    facts = {name: getattr(result, name) for name in names}
    return {"hits": hits, "retriever": retriever, **facts, "ms": round(ms, 3), "budget": budget}


def _snippet(text: str) -> str:
    """The beginning of a text, cut between words where it has any."""
    if len(text) <= SNIPPET_CHARACTERS:
        return text
    cut = text[:SNIPPET_CHARACTERS]
    words = cut.rpartition(" ")[0]
    return f"{words if len(words) > SNIPPET_CHARACTERS // 2 else cut} …"


def _json(value: Any) -> Response:
    """JSON written once. FastAPI would check and encode what we made ourselves a second time."""
    return Response(errors.dumps(value), media_type="application/json")


def _powers(levels: int) -> list[int]:
    """1, 2, 4, ... and the code length itself."""
    return sorted({2**i for i in range(levels.bit_length()) if 2**i <= levels} | {levels})


class Retriever:
    """A replica: the loaded artifact and the HTTP application around it."""

    def __init__(self, args: RetrieverArgs) -> None:
        pages.use_threads(args.threads)
        self.args = args
        self.state = State(Corpus.load(args))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.state, self.args, ServeMetrics())

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


def build(args: RetrieverArgs) -> Application:
    """The Serve application, from its arguments in cluster.yaml.

    Where annotations are strings, as in this module, Serve (Ray 2.60) does not see the type and hands over a dict.
    """
    return serve.deployment(serve.ingress()(Retriever)).bind(RetrieverArgs.model_validate(args))  # type: ignore[attr-defined]

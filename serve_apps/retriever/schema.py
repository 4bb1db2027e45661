"""What the `retriever` application takes and gives: its arguments, requests and answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, StringConstraints, model_validator

from mobula.retrieval.search import ALL_DECODERS, CONSTRAINTS, ORDERS, REMASK
from mobula.serving.app import ModelArgs, Strict
from mobula.serving.app import Text as RequestText
from mobula.serving.paths import LocalPath

TEXT_BYTES = 100_000
CHANGED_AT_ONCE = 256
QUERIES_AT_ONCE = 512
VERSIONS = 2**53  # what JavaScript's numbers hold exactly


class RetrieverArgs(ModelArgs):
    """Arguments of the application in cluster.yaml; its artifact is that of a finished retrieval run."""

    added: LocalPath | None = Field(
        None,
        description="directory that keeps added and removed documents, shared by all replicas; null: nothing changes",
    )
    max_documents_bytes: int = Field(
        32 * 2**20, ge=1024, le=256 * 2**20, description="largest request body that adds documents"
    )
    calibration_s: float = Field(20.0, ge=0, le=600, description="time for measuring budgets at start; 0: no max_ms")


class SearchRequest(Strict):
    """A search. The budget is one of steps, threshold and max_ms; none means half the code length."""

    query: RequestText
    k: int = Field(10, ge=1, le=100, description="documents to return")
    retriever: str | None = Field(None, max_length=64, description="see /retrievers; null: the default one")
    version: int | None = Field(None, ge=0, le=VERSIONS, description="least version to search; null: the present one")
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

    @model_validator(mode="after")
    def _one_budget(self) -> SearchRequest:
        given = [name for name in ("steps", "threshold", "max_ms") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one budget")
        return self


class RetrieveRequest(Strict):
    """Queries that are searched for together, by the default retriever with its own budget (Search-R1's contract)."""

    queries: list[RequestText] = Field(min_length=1, max_length=QUERIES_AT_ONCE)
    topk: int = Field(10, ge=1, le=100, description="documents to return for each, fewer if there are not as many")
    return_scores: bool = Field(False, description="false: documents alone")


class Wanted(Strict):
    """What the tool ``search`` takes."""

    query: RequestText
    k: int = Field(10, ge=1, le=100, description="passages to return")


def _short_enough(text: str) -> str:
    size = len(text.encode())
    if size > TEXT_BYTES:
        raise ValueError(f"the text has {size} bytes in UTF-8, at most {TEXT_BYTES} are allowed")
    return text


DocId = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=TEXT_BYTES), AfterValidator(_short_enough)]


class NewDocument(Strict):
    """A document to add; its text has at most 100,000 bytes in UTF-8."""

    id: DocId
    title: Annotated[str, StringConstraints(max_length=1000)] = ""
    text: Text
    date: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None


class NewDocuments(Strict):
    """Documents to add; all are added, or none."""

    documents: list[NewDocument] = Field(min_length=1, max_length=CHANGED_AT_ONCE)


class Removal(Strict):
    """Documents to remove; all are removed, or none."""

    ids: list[DocId] = Field(min_length=1, max_length=CHANGED_AT_ONCE)


class FoundDocument(BaseModel):
    """A hit with enough to show it."""

    doc_id: str
    score: float | None
    title: str
    snippet: str
    code: list[int] | None = Field(description="its docid; null if the retrieval model has none for it")


class RetrievedDocument(BaseModel):
    """A document as search agents read it."""

    id: str
    contents: str = Field(description="the title in quotation marks, a line break, the text")


class ScoredDocument(BaseModel):
    """A document and how well it fits; null where the model gives it no probability."""

    document: RetrievedDocument
    score: float | None


class RetrieveResponse(BaseModel):
    """A list for each query, best first: of documents with scores, or of documents alone."""

    result: list[list[ScoredDocument]] | list[list[RetrievedDocument]]


class Budget(BaseModel):
    """The budget that was applied. ``over_budget``: nothing measured fits max_ms, so one_pass was run."""

    steps: int | None
    threshold: float | None
    max_ms: int | None
    over_budget: bool


class SearchResponse(BaseModel):
    """Hits, best first, with what they cost."""

    hits: list[FoundDocument]
    version: int = Field(description="the version of the corpus that was searched, and no other")
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
    """What adding documents did, and how the default retriever codes them."""

    added: int
    version: int = Field(description="the first version that has them")
    codes: dict[str, list[int]] = Field(description="docids by document")
    overflow: int = Field(description="documents that share the last index of a full bucket or leaf")
    collisions: int = Field(description="documents whose docid another document has too")


class Removed(BaseModel):
    """What removing documents did."""

    removed: int
    version: int = Field(description="the first version without them")


class ChangeRow(BaseModel):
    """A change of the corpus."""

    version: int
    kind: Literal["add", "remove"]
    documents: int
    time: str | None = Field(description="by the clock of the replica that made it")


class Versions(BaseModel):
    """The corpus as this replica has it, and the changes that led there, newest first."""

    version: int
    documents: int
    versions: list[ChangeRow]

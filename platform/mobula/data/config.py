"""The ``data`` section of a retrieval experiment."""

from __future__ import annotations

from dataclasses import dataclass

from mobula.config import key

NAMES = ("functions", "scifact", "vaswani", "cranfield", "cacm", "nq", "peps", "eips", "pysec", "beir", "files")
TITLES = ("scifact", "vaswani", "cranfield", "cacm", "nq", "peps", "eips", "beir", "files")


@dataclass
class DataConfig:
    """Which corpus, and how its queries are divided."""

    name: str = key("functions", "data set, see `mobula data list`", choices=NAMES)
    path: str = key(
        "", "folder with the set's files, or a Hugging Face id (beir); empty: MOBULA_DATA, then the package"
    )
    split: str = key(
        "by_request",
        "by_document: no test or dev query shares a relevant document with a train query",
        choices=("by_request", "by_document"),
    )
    queries: str = key(
        "given",
        "given: the set's own queries; titles: documents lose their title, which becomes dev or test query",
        choices=("given", "titles"),
    )
    max_documents: int | None = key(None, "keep at most this many documents; null: all", ge=1)
    keep: str = key(
        "first",
        "which documents max_documents keeps: the first by id, or those relevant to a query and then the first",
        choices=("first", "relevant"),
    )
    dev_share: float = key(0.15, "share of the queries that becomes dev where the set has no dev queries", gt=0, lt=0.5)
    test_share: float = key(0.25, "share of the queries that becomes test where the set has no splits", gt=0, lt=0.8)
    dev_windows: int | None = key(
        None, "dev queries made of held-out windows of documents; null: 200 where nothing else is left for dev", ge=1
    )
    near_duplicate: float = key(
        0.8, "Jaccard similarity of word sets that makes two queries near-duplicates", gt=0, le=1
    )
    count_duplicates_up_to: int = key(
        50_000,
        "count near-duplicate documents, for the report alone, of corpora of at most this many; 0: never",
        ge=0,
    )
    seed: int = key(0, "seed of the split, apart from the experiment's seed so that seeds share one test set", ge=0)

    def problems(self) -> list[str]:
        """Contradictions between keys."""
        problems = []
        if self.name in ("beir", "files") and not self.path:
            what = "a Hugging Face id such as BeIR/scifact" if self.name == "beir" else "a folder"
            problems.append(f"path is empty, but name={self.name} needs {what}")
        if self.dev_share + self.test_share >= 1:
            problems.append(f"dev_share + test_share = {self.dev_share + self.test_share:g} leaves nothing to train on")
        if self.queries == "titles" and self.name not in TITLES:
            problems.append(f"queries=titles: documents of {self.name} have no titles to ask for")
        if self.queries == "titles" and self.split == "by_document":
            problems.append("queries=titles and split=by_document exclude each other")
        return problems

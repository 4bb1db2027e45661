"""Built indexes: they rank as those made in memory, to the bit; builds resume; what is wrong is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobula.cluster.pool import Pool, Shard
from mobula.data.records import Document
from mobula.errors import BadRecord, DataError, RunConflict
from mobula.models.encoders import load_encoder
from mobula.retrieval import build_index, stored_index
from mobula.retrieval.build_index import BuildOptions, build
from mobula.retrieval.dense import Dense
from mobula.retrieval.lexical import Bm25
from mobula.retrieval.search import SearchOptions
from mobula.retrieval.stored_bm25 import StoredBm25
from mobula.retrieval.stored_dense import StoredDense

ROOT = Path(__file__).parents[2]
ENCODER = "wordllama"


def documents_of(count: int) -> list[Document]:
    """Passages whose ids are not in order, some of them alike."""
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in ("run", "swim", "fly", "the", "Größe", "cat") for b in ("", "s", "ning", "er", "x7")]
    texts = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(count)]
    return [Document(f"d{i * 7919 % 100_003}", texts[i // 2] if i % 3 else "", texts[i // 3]) for i in range(count)]


def write(file: Path, documents: Sequence[Document]) -> Path:
    rows = [{"id": d.id, "title": d.title, "text": d.text} for d in documents]
    lines = (json.dumps(row, ensure_ascii=False) + ("\n\n" if i % 5 == 0 else "\n") for i, row in enumerate(rows))
    file.write_text("".join(lines), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_index, "STEP", 10)
    monkeypatch.setattr(build_index, "BLOCK", 7)


def opened(folder: Path) -> tuple[StoredBm25, StoredDense]:
    lexical, dense = stored_index.open_parts(folder, "hybrid", load_encoder(ENCODER))
    assert isinstance(lexical, StoredBm25) and isinstance(dense, StoredDense)
    return lexical, dense


@pytest.mark.parametrize("shard", [None, 20])
def test_lists_and_scores_are_those_of_indexes_in_memory(tmp_path: Path, shard: int | None) -> None:
    documents = documents_of(120)
    corpus = write(tmp_path / "corpus.jsonl", documents)
    build(corpus, tmp_path / "index", BuildOptions("hybrid", ENCODER, shard=shard), Pool())
    assert not list(tmp_path.glob(".*"))
    in_order = sorted(documents, key=lambda document: document.id)
    queries = ["running cats", "the", "nothing known", "Größe Größe x7", "", documents[3].text]
    memory = [Bm25(in_order), Dense(load_encoder(ENCODER), in_order)]
    for stored, own in zip(opened(tmp_path / "index"), memory, strict=True):
        for k in (1, 5, 120):
            options = [SearchOptions(k=k)] * len(queries)
            assert [r.hits for r in stored.search(queries, options)] == [r.hits for r in own.search(queries, options)]
    assert list(stored_index.open_passages(tmp_path / "index")) == in_order


def test_arrays_are_those_that_bm25s_makes(tmp_path: Path) -> None:
    documents = documents_of(60)
    build(write(tmp_path / "corpus.jsonl", documents), tmp_path / "index", BuildOptions(shard=10), Pool())
    stored = StoredBm25(tmp_path / "index" / "bm25", [])
    theirs = Bm25(sorted(documents, key=lambda document: document.id))._index.scorer
    assert theirs is not None and len(stored._terms) == len(theirs.vocab_dict) - 1  # and the empty token
    for row, term in enumerate(stored._terms):
        mine, own = postings(stored._scorer, row), postings(theirs, theirs.vocab_dict[term])
        assert mine == own and mine


def postings(scorer: Any, term: int) -> dict[int, float]:
    """The score of each document that has a term."""
    start, end = scorer.scores["indptr"][term : term + 2]
    parts = (scorer.scores[part][start:end].tolist() for part in ("indices", "data"))
    return dict(zip(*parts, strict=True))


@pytest.mark.parametrize("faiss", ["ivf", "hnsw"])
def test_approximate_indexes_find_what_is_near_and_say_their_sizes(tmp_path: Path, faiss: str) -> None:
    documents = [Document(f"{i:04}", "", f"word{i} and number {i * i}") for i in range(400)]
    corpus = write(tmp_path / "corpus.jsonl", documents)
    manifest = build(corpus, tmp_path / "index", BuildOptions("dense", ENCODER, faiss), Pool())
    assert manifest.dense is not None and manifest.dense["faiss"] == faiss and manifest.bm25 is None
    assert ("lists" if faiss == "ivf" else "links") in manifest.dense
    (stored,) = stored_index.open_parts(tmp_path / "index", "dense", load_encoder(ENCODER))
    lists = stored.search([d.text for d in documents], [SearchOptions(k=3)] * 400)
    assert np.mean([found.hits[0].doc_id == d.id for found, d in zip(lists, documents, strict=True)]) > 0.9
    assert all(hit.doc_id for found in lists for hit in found.hits)


@pytest.mark.parametrize("faiss", ["flat", "ivf", "hnsw"])
def test_vectors_are_mapped_and_not_read(tmp_path: Path, faiss: str) -> None:
    """In a process of its own: what it holds for itself does not grow by the size of the vectors."""
    from mobula.retrieval.stored_dense import write_vectors

    vectors = np.random.default_rng(0).standard_normal((20_000 if faiss != "hnsw" else 4000, 256)).astype(np.float32)
    write_vectors([vectors], vectors[:2000], 2000, faiss, tmp_path)
    code = (
        "import sys, pathlib\n"
        "from mobula.models.encoders import load_encoder\n"
        "from mobula.retrieval.stored_dense import StoredDense\n"
        "from mobula.retrieval.search import SearchOptions\n"
        "def own():\n"
        "    lines = pathlib.Path('/proc/self/smaps_rollup').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('Anonymous:')) // 1024\n"
        "encoder = load_encoder('wordllama'); encoder.embed(['x']); before = own()\n"
        "dense = StoredDense(pathlib.Path(sys.argv[1]), encoder, range(20_000))\n"
        "dense.search(['a query'] * 30, [SearchOptions(k=5)] * 30); print(own() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.4 * vectors.nbytes / 2**20


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([*range(25), 3], r"corpus.jsonl, line 26: the id 'd3' is that of line 4 too"),
        ([*range(25), {"id": "x", "text": " "}], "line 26: field text is empty"),
        ([*range(25), {"id": "x"}], "line 26: field text must be text"),
        ([*range(25), '{"id": '], "line 26: not JSON"),
        ([*range(25), {"id": "x", "text": "a\ud800"}], "line 26: .* half of a surrogate pair"),
        ([], "no passage in it"),
        ([""] * 3, "no passage in it"),
        ([{"id": "x", "text": "the"}], "at least one word that is not a stop word"),
    ],
)
def test_what_is_wrong_in_a_corpus_is_named(tmp_path: Path, rows: list[Any], reason: str) -> None:
    whole = [{"id": f"d{row}", "text": f"word{row}"} if isinstance(row, int) else row for row in rows]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in whole]
    (tmp_path / "corpus.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(DataError, match=reason):
        build(tmp_path / "corpus.jsonl", tmp_path / "index", BuildOptions(shard=10), Pool())
    assert not (tmp_path / "index").exists()


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(b'{"id": "x", "text": "a"}\n' * 30 + b'{"id": "y", "text": "\xff"}\n')
    with pytest.raises(DataError, match=r"corpus.jsonl, line 31: not UTF-8"):
        build(tmp_path / "corpus.jsonl", tmp_path / "index", BuildOptions(shard=10), Pool())


class Interrupted(Pool):
    """Gives up after some parts, and counts those that it has done."""

    def __init__(self, parts: int) -> None:
        self.left, self.done = parts, 0

    def process(self, worker: Any, shards: Sequence[Shard]) -> Iterator[Any]:
        for shard in shards:
            if not self.left:
                raise KeyboardInterrupt
            self.left, self.done = self.left - 1, self.done + 1
            yield from super().process(worker, [shard])


def digests(folder: Path) -> dict[str, str]:
    return {name: facts["sha256"] for name, facts in stored_index.verify(folder).files.items()}


@pytest.mark.parametrize("finished", [2, 8])
def test_an_interrupted_build_goes_on_with_what_is_missing(tmp_path: Path, finished: int) -> None:
    corpus, options = write(tmp_path / "corpus.jsonl", documents_of(50)), BuildOptions("hybrid", ENCODER, shard=10)
    build(corpus, tmp_path / "whole", options, whole := Interrupted(99))
    with pytest.raises(KeyboardInterrupt):
        build(corpus, tmp_path / "index", options, Interrupted(finished))
    assert not (tmp_path / "index").exists()
    again = Interrupted(99)
    build(corpus, tmp_path / "index", options, again)
    assert again.done == whole.done - finished
    assert digests(tmp_path / "index") == digests(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_a_build_of_something_else_does_not_take_the_parts_of_another(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", documents_of(50))
    with pytest.raises(KeyboardInterrupt):
        build(corpus, tmp_path / "index", BuildOptions(shard=10), Interrupted(2))
    with pytest.raises(RunConflict, match=r"\.index\.building: left by a build that was interrupted"):
        build(corpus, tmp_path / "index", BuildOptions(shard=20), Pool())
    write(corpus, documents_of(51))
    with pytest.raises(RunConflict, match="of another corpus or with other options"):
        build(corpus, tmp_path / "index", BuildOptions(shard=10), Pool())


def test_a_finished_index_stays(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", documents_of(50))
    first = build(corpus, tmp_path / "index", BuildOptions(), Pool())
    assert build(corpus, tmp_path / "index", BuildOptions(), Interrupted(0)) == first
    with pytest.raises(RunConflict, match="an index of another corpus or of another kind"):
        build(corpus, tmp_path / "index", BuildOptions("dense", ENCODER), Pool())
    shutil.rmtree(tmp_path / "index")
    (tmp_path / "index").mkdir()
    with pytest.raises(RunConflict, match="something that is no index"):
        build(corpus, tmp_path / "index", BuildOptions(), Pool())


def test_an_index_that_fails_its_check_does_not_appear(tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        assert stored_index.read_manifest(folder).corpus["passages"] == 50
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        build(write(tmp_path / "c.jsonl", documents_of(50)), tmp_path / "index", BuildOptions(), Pool(), check)
    assert not (tmp_path / "index").exists()


def test_too_many_parts_are_refused(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", documents_of(500))
    with pytest.raises(DataError, match=r"--shard 2 makes more than 200 parts of 600 lines; give at least 3"):
        build(corpus, tmp_path / "index", BuildOptions(shard=2), Pool())


def test_damage_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    build(write(tmp_path / "corpus.jsonl", documents_of(50)), folder, BuildOptions(), Pool())
    file = folder / "passages" / "contents.bin"
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    stored_index.read_manifest(folder)  # compares sizes alone
    with pytest.raises(DataError, match=r"contents.bin: checksum differs"):
        stored_index.verify(folder)
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"contents.bin: missing, or not of \d+ bytes"):
        stored_index.read_manifest(folder)
    (folder / "index.json").write_text('{"format": 2}')
    with pytest.raises(DataError, match="index format 2; this version reads 1"):
        stored_index.read_manifest(folder)
    (folder / "index.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match="damaged manifest"):
        stored_index.read_manifest(folder)
    with pytest.raises(DataError, match=r"not an index \(no index.json\); make one with `mobula index build`"):
        stored_index.read_manifest(tmp_path)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mobula.cli", "index", "build", *map(str, arguments)]


@pytest.mark.end_to_end
def test_a_killed_build_resumes_on_ray_to_the_same_files(tmp_path: Path) -> None:
    documents = [Document(f"d{i}", "", f"number{i} of many {i % 97} words") for i in range(20_000)]
    corpus = write(tmp_path / "corpus.jsonl", documents)
    build(corpus, tmp_path / "whole", BuildOptions("hybrid", ENCODER, shard=1000), Pool())
    build_command = command(corpus, "--out", tmp_path / "index", "--kind", "hybrid", "--encoder", ENCODER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
    options = ["--shard", "1000", "--actors", "2"]
    killed = subprocess.Popen([*build_command, *options], env=environment, cwd=tmp_path, start_new_session=True)
    work, until = tmp_path / ".index.building", time.monotonic() + 200
    while not list(work.glob("vectors-*.npy")) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in work.glob("vectors-*.npy")}
    assert kept and not (tmp_path / "index").exists()
    done = subprocess.run(
        [*build_command, *options], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"vectors: {len(kept)} of" in done.stderr
    assert digests(tmp_path / "index") == digests(tmp_path / "whole")


@pytest.mark.end_to_end
def test_what_an_actor_finds_wrong_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "text": "b"}\n{"id": "c"}\n')
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
    done = subprocess.run(
        [*command(tmp_path / "corpus.jsonl", "--out", tmp_path / "index"), "--actors", "1"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"error: {tmp_path}/corpus.jsonl, line 2: field text must be text, found None"
    assert BadRecord.__name__ not in done.stderr

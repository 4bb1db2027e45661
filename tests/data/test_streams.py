"""Dated collections: proposals that cite one another, and advisories."""

import io
import re
import tarfile
from collections import Counter

import pytest
from click.testing import CliRunner

from mobula.cli import main
from mobula.data import SETS, DataConfig, Document, Query, RetrievalData, export, load_retrieval, streams
from mobula.data.config import NAMES
from mobula.data.duplicates import identical, normalise, split_words
from mobula.data.files import load_files
from mobula.data.sessions import SessionsConfig, plan_sessions
from mobula.data.sources import UNSPLIT
from mobula.environment import data_folder
from mobula.errors import BadRecord, DataError

needs_data = pytest.mark.skipif(data_folder() is None, reason="MOBULA_DATA is not set")


@pytest.fixture(scope="module")
def peps():
    return streams.peps(DataConfig(name="peps"))


@pytest.fixture(scope="module")
def eips():
    return streams.eips(DataConfig(name="eips"))


@pytest.fixture(scope="module")
def pysec():
    return streams.pysec(DataConfig(name="pysec"))


def plan(collection, **keys):
    data = RetrievalData("x", "", "", collection.documents, {"train": collection.queries[UNSPLIT]})
    return plan_sessions(data, SessionsConfig(**keys))


def standing(queries, documents):
    """Queries of 8 words or more whose words stand in a document."""
    forms = {}
    for query in queries:
        words = split_words(query.text)
        if len(words) >= 8:
            forms.setdefault(" ".join(words[:8]), []).append(" ".join(words))
    found = []
    for document in documents:
        words = split_words(document.text)
        text = f" {' '.join(words)} "
        starts = (i for i in range(len(words) - 7) if " ".join(words[i : i + 8]) in forms)
        found.extend(form for i in starts for form in forms[" ".join(words[i : i + 8])] if f" {form} " in text)
    return found


def check_queries(collection):
    """What test 13 of the method asks of a set of citing sentences."""
    queries, ids = collection.queries[UNSPLIT], {d.id for d in collection.documents}
    assert standing(queries, collection.documents) == []
    for query in queries:
        number = re.search(r"\d+", query.gold[0])[0].lstrip("0")
        assert number not in [word.lstrip("0") for word in split_words(query.text)]
        assert len(query.gold) == 1 and query.source_doc in ids and query.source_doc != query.gold[0]
    assert len({normalise(q.text) for q in queries}) == len({(normalise(q.text), q.gold) for q in queries})


@needs_data
def test_query_sentence_removed_from_peps(peps):
    check_queries(peps)
    spoilt = [*peps.documents[:9], Document("x", "", f"Then: {peps.queries[UNSPLIT][99].text}")]
    assert standing(peps.queries[UNSPLIT], spoilt) == [normalise(peps.queries[UNSPLIT][99].text)]


@needs_data
def test_query_sentence_removed_from_eips(eips):
    check_queries(eips)
    assert eips.notes["documents without a date"] == 365


@needs_data
def test_peps_divide_as_measured(peps):
    assert len(peps.documents) == 736
    assert abs(len(peps.queries[UNSPLIT]) - 2590) < 60
    divided = plan(peps, queries="by_source_doc")
    assert divided.sizes == [368, 74, 73, 74, 73, 74]
    dropped = divided.notes["train and dev queries dropped as near-duplicates of dev or test queries"]
    assert abs(len(divided.train) + len(divided.dev) + dropped - 790) < 40
    assert abs(len(divided.dev) / (len(divided.train) + len(divided.dev)) - 0.2) < 0.01
    for session, expected in enumerate((459, 374, 376, 333, 171, 87)):
        assert abs(len(divided.rows(session)) - expected) < 20
    dates = {d.id: d.date for d in peps.documents}
    assert max(dates[q.source_doc] for q in divided.train) <= min(dates[q.source_doc] for q in divided.dev)
    last = max(d.date for d in divided.documents(peps.documents, 0))
    assert all(dates[row.query.source_doc] >= last for row in divided.rows(0))
    assert all(row.neutral == {row.query.source_doc} for row in divided.test)


@needs_data
def test_eips_divide_as_measured(eips):
    assert len(eips.documents) == 584
    assert abs(len(eips.queries[UNSPLIT]) - 1887) < 60
    divided = plan(eips, queries="by_source_doc")
    assert divided.sizes == [292, 58, 59, 58, 59, 58]
    found = [len(divided.rows(session)) for session in range(1, 6)]
    assert all(abs(a - b) < 20 for a, b in zip(found, (128, 231, 204, 157, 129), strict=True))
    assert len({row.query.gold for row in divided.rows(5)}) < 20


@needs_data
def test_advisories_of_equal_text_are_one_document(pysec):
    assert len(pysec.documents) == 2050
    assert pysec.notes["documents merged, their texts being equal"] == 602
    assert identical([d.text for d in pysec.documents]) == []
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d", d.date) for d in pysec.documents)
    assert standing(pysec.queries[UNSPLIT], pysec.documents) == []
    texts = Counter(normalise(q.text) for q in pysec.queries[UNSPLIT])
    assert len(texts) == len(pysec.queries[UNSPLIT]) > 650
    assert all(q.source_doc is None and q.id == f"{q.gold[0]}#first" for q in pysec.queries[UNSPLIT])


@needs_data
def test_splits_of_load_retrieval_lose_no_citing_sentence(eips):
    data = load_retrieval(DataConfig(name="eips"), quiet=True)
    found = [q for split in data.queries.values() for q in split]
    assert {q.id for q in found} == {q.id for q in eips.queries[UNSPLIT]}
    assert all(data.queries[split] for split in ("train", "dev", "test"))
    assert plan_sessions(data, SessionsConfig(queries="by_source_doc")).hash == plan(eips, queries="by_source_doc").hash


PEP = "PEP: {number}\nTitle: Number {number}\nType: Process\nTopic: Typing\nCreated: 0{day}-Jan-2001\n\n{body}\n"


def pack(folder, name, files):
    with tarfile.open(folder / name, "w:gz") as archive:
        for path, text in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return DataConfig(path=str(folder))


def pep(number, *paragraphs):
    return PEP.format(number=number, day=number % 9 + 1, body="\n\n".join(paragraphs))


def asked(collection):
    return {q.text: (q.source_doc, *q.gold) for q in collection.queries[UNSPLIT]}


def test_citing_sentences_of_a_pep(tmp_path):
    words = "the quick brown fox jumps over it"
    files = {
        "peps/pep-0011.rst": pep(
            11,
            f"First, {words} as :pep:`12` says. In PEP 11 {words} too. Neither PEP 12 nor :pep:`13` has {words}.",
            f"* An item: {words} (see `the page <https://peps.python.org/pep-0012/#x>`_)\n* PEP 99 has {words}.",
            f"Code::\n\n    {words} of PEP 12",
            "PEP 12, short.",
            f"Number 12 has {words} of PEP 12.",
        ),
        "peps/pep-0012.rst": pep(
            12,
            f"As PEP 13 shows, here {words} again and again. A twin of :pep:`13` has {words} and more.",
            "References\n==========",
            f"PEP 11 has {words} in its list.",
        ),
        "peps/pep-0013.rst": pep(
            13, f"A twin of has {words} and more. So says :pep:`the  first\none <11#part>`: {words}."
        ),
    }
    found = streams.peps(pack(tmp_path, streams.PEPS, files))
    assert asked(found) == {
        f"First, {words} as says.": ("pep-0011", "pep-0012"),
        f"An item: {words} (see the page)": ("pep-0011", "pep-0012"),
        f"As shows, here {words} again and again.": ("pep-0012", "pep-0013"),
        f"So says the first one: {words}.": ("pep-0013", "pep-0011"),
    }
    assert found.notes["queries dropped, their sentence standing in another document"] == 1
    texts = {d.id: d.text for d in found.documents}
    assert texts["pep-0011"].split("\n") == [
        f"In PEP 11 {words} too. Neither PEP 12 nor PEP 13 has {words}.",
        f"PEP 99 has {words}.",
        "Code::",
        f"{words} of PEP 12",
        "PEP 12, short.",
        f"Number 12 has {words} of PEP 12.",
    ]
    assert texts["pep-0013"] == f"A twin of has {words} and more."
    assert f"PEP 11 has {words} in its list." in texts["pep-0012"]
    document = found.documents[0]
    assert (document.title, document.date, document.source) == ("Number 11", "2001-01-03", "Process/Typing")


def test_citing_sentences_of_an_eip(tmp_path):
    head = '---\neip: {}\ntitle: "One of"\ntype: Standards Track\ncategory: Core\ncreated: 2020-01-0{}\n---\n'
    words = "the quick brown fox jumps over it"
    files = {
        "EIPS/eip-20.md": head.format(20, 1)
        + f"## About [EIP-7](./eip-7.md) where {words}\nIt is [ERC-7](./eip-7.md) {words}.",
        "EIPS/eip-7.md": head.format(7, 2)
        + f"```\nEIP-20 {words}\n```\n\n| EIP-20 | {words} |\n\nERC20 is {words}. No.",
        "EIPS/eip-5.md": "---\neip: 5\nstatus: Moved\n---\n\nThis file was moved.\n",
    }
    found = streams.eips(pack(tmp_path, streams.EIPS, files))
    assert asked(found) == {f"It is {words}.": ("eip-20", "eip-7"), f"is {words}.": ("eip-7", "eip-20")}
    assert found.notes["documents without a date"] == 1
    assert [(d.id, d.title, d.source) for d in found.documents] == [
        ("eip-20", "One of", "Core"),
        ("eip-7", "One of", "Core"),
    ]
    assert found.documents[1].text.endswith("\nNo.")


def test_first_sentences_of_advisories(tmp_path):
    first = "Before version two, anyone could read every file there was."

    def advisory(id, package, published, details):
        lines = [
            f"id: {id}",
            f"details: {details}",
            "affected:",
            f"- package: {{name: {package}}}",
            "aliases: [CVE-1-1]",
        ]
        return "\n".join([*lines, *([f"published: {published}"] if published else [])])

    shared = "This package is a package that does what packages do."
    files = {
        "a/P-3.yaml": advisory("P-3", "wide-b", "2021-02-03T04:05:06Z", f"{first} It is mended."),
        "a/P-2.yaml": advisory("P-2", "wide-a", '"2021-02-01T00:00:00Z"', f"'{first}  It is   MENDED'"),
        "a/P-1.yaml": advisory("P-1", "other", None, f"{first} Nobody knows when."),
        "a/P-4.yaml": advisory("P-4", "b", "2022-01-01T00:00:00Z", f"{shared} One."),
        "a/P-5.yaml": advisory("P-5", "c", "2022-01-01T00:00:00Z", f"{shared} Two."),
    }
    found = streams.pysec(pack(tmp_path, streams.PYSEC, files))
    merged = next(d for d in found.documents if d.id == "P-2")
    assert (merged.title, merged.text, merged.date) == ("wide-a, wide-b: CVE-1-1", "It is MENDED", "2021-02-01")
    assert asked(found) == {first: (None, "P-2")}
    assert {d.text for d in found.documents} == {"It is MENDED", f"{shared} One.", f"{shared} Two."}
    assert found.notes["documents without a date"] == 1


def test_archives_are_read_without_writing_and_damage_is_an_error(tmp_path):
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    config = pack(folder, streams.PEPS, {"../../pep-0001.rst": pep(1, "Text."), "/tmp/x/pep-0002.rst": pep(2, "More.")})
    assert [d.id for d in streams.peps(config).documents] == ["pep-0001", "pep-0002"]
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [streams.PEPS]
    whole = (folder / streams.PEPS).read_bytes()
    for damaged in (b"not an archive", whole[: len(whole) // 2]):
        (folder / streams.PEPS).write_bytes(damaged)
        with pytest.raises(DataError, match=r"not a complete tar\.gz archive"):
            streams.peps(config)
    pack(folder, streams.PEPS, {"pep-0001.rst": pep(1, "Text.").replace("Created: 02", "Created: 42")})
    with pytest.raises(BadRecord, match=r"pep-0001\.rst: field Created must read like"):
        streams.peps(config)
    pack(folder, streams.PEPS, {"pep-0001.rst": "PEP: 1\nTitle: x\n\nText"})
    with pytest.raises(BadRecord, match=r"pep-0001\.rst: field Type is missing"):
        streams.peps(config)
    with pytest.raises(DataError, match=r"no ethereum\+EIPs"):
        streams.eips(DataConfig(name="eips", path=str(folder)))


def test_optional_fields_survive_export(tmp_path):
    words = "the quick brown fox jumps over it"
    files = {f"pep-001{i}.rst": pep(10 + i, f"Line {i} of {words} in :pep:`{11 + i % 4}`.", "Rest.") for i in range(5)}
    config = pack(tmp_path, streams.PEPS, files)
    found = streams.peps(config)
    queries = {
        "test": found.queries[UNSPLIT][:2],
        "train": found.queries[UNSPLIT][2:3],
        "dev": found.queries[UNSPLIT][3:],
    }
    export(RetrievalData("x", "", "", found.documents, queries), tmp_path / "out")
    data = load_retrieval(DataConfig(name="files", path=str(tmp_path / "out"), near_duplicate=1.0), quiet=True)
    assert data.documents == found.documents and all(d.source for d in data.documents)
    assert data.queries == queries and all(q.source_doc for q in queries["test"])
    judged = tmp_path / "out" / "queries.jsonl"
    judged.write_text('{"id": "q", "text": "words", "source_doc": "pep-0011"}\n')
    (tmp_path / "out" / "qrels.txt").write_text("q 0 pep-0012 1\n")
    read = load_files(DataConfig(name="files", path=str(tmp_path / "out")))
    assert read.queries == {UNSPLIT: [Query("q", "words", ("pep-0012",), source_doc="pep-0011")]}
    (tmp_path / "out" / "qrels.txt").unlink()
    judged.write_text('{"id": "q", "text": "words", "gold": ["pep-0012"], "source_doc": "nowhere"}\n')
    with pytest.raises(BadRecord, match="field source_doc names document 'nowhere'"):
        load_retrieval(DataConfig(name="files", path=str(tmp_path / "out")), quiet=True)


def test_every_set_can_be_named_and_is_listed():
    assert set(SETS) == set(NAMES)
    shown = CliRunner().invoke(main, ["data", "list"]).output
    assert all(f"MOBULA_DATA/{name}" in shown for name in ("peps", "eips", "pysec"))

"""The user's own corpora, and BEIR sets."""

import json

import datasets
import pytest

from mobula.config import build
from mobula.data import DataConfig, Document, Query, RetrievalData, export, load_retrieval
from mobula.errors import BadRecord, ConfigError, DataError


def load(folder, **keys):
    return load_retrieval(DataConfig(name="files", path=str(folder), **keys), quiet=True)


@pytest.fixture
def folder(tmp_path):
    corpus = [{"_id": f"d{i}", "title": f"T{i}", "text": f"body number {i}"} for i in range(30)]
    queries = [{"_id": f"q{i}", "text": f"asking for thing{i}"} for i in range(20)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (tmp_path / "qrels.txt").write_text("".join(f"q{i} 0 d{i} {1 + i % 2}\nq{i} 0 d29 0\n" for i in range(20)))
    return tmp_path


def test_jsonl_with_trec_judgements(folder):
    data = load(folder)
    assert len(data.documents) == 30
    assert sum(map(len, data.queries.values())) == 20
    graded = {q.id: q for found in data.queries.values() for q in found}
    assert graded["q1"].gold == ("d1",) and graded["q1"].grades == (2,)
    assert data.source == f"path {folder}"


def test_beir_layout_keeps_its_splits(folder):
    (folder / "qrels.txt").unlink()
    (folder / "qrels").mkdir()
    for split, rows in (("train", range(10)), ("dev", range(10, 15)), ("test", range(15, 20))):
        lines = [f"q{i}\td{i}\t1" for i in rows]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]))
    counts = {split: len(found) for split, found in load(folder).queries.items()}
    assert counts == {"train": 10, "dev": 5, "test": 5}


def test_trec_layout(tmp_path):
    docs = "".join(f"<DOC>\n<DOCNO>d{i}</DOCNO>\n<TEXT>\nwords of {i}\n</TEXT></DOC>\n" for i in range(5))
    (tmp_path / "documents.trec").write_text(docs)
    topics = "".join(f"<top>\n<num> Number: {i}\n<title> topic{i} here\n<desc> long\n</top>\n" for i in range(5))
    (tmp_path / "topics.trec").write_text(topics)
    (tmp_path / "qrels.txt").write_text("".join(f"{i} 0 d{i} 1\n" for i in range(5)))
    data = load(tmp_path, test_share=0.4, dev_share=0.2)
    assert data.documents[2] == Document("d2", "", "words of 2")
    assert {q.text for found in data.queries.values() for q in found} == {f"topic{i} here" for i in range(5)}


def test_export_and_load_give_the_same_data(tmp_path):
    documents = [Document(str(i), f"t{i}", f"text {i}", "2020-01-01") for i in range(6)]
    queries = {
        "train": [Query("a", "first question", ("1", "2"), (2, 1))],
        "dev": [Query("b", "second thing", ("3",))],
        "test": [Query("c", "third matter", ("4",))],
        "given": [Query("d", "fourth point", ("5",))],
    }
    export(RetrievalData("x", "here", "", documents, queries), tmp_path)
    data = load(tmp_path)
    assert data.documents == documents
    assert data.queries == queries


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "x", "text": "t", "gold": []}', "field gold must be a list of at least one document id"),
        ('{"id": "x", "text": "t", "gold": ["d1"], "split": "valid"}', "field split must be one of"),
        ('{"id": "x", "text": "t", "gold": ["d1"], "grades": [1, 2]}', "field grades must be a list of 1"),
        ('{"id": "x", "text": "", "gold": ["d1"]}', "field text is empty"),
        ('{"text": "t", "gold": ["d1"]}', "field id must be text"),
        ('{"id": "x", "text": "t", "gold": ["nowhere"]}', "names document 'nowhere', which is not in the corpus"),
        ("[1]", "expected a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_bad_lines_name_file_line_and_field(folder, line, message):
    (folder / "queries.jsonl").write_text(line)
    (folder / "qrels.txt").unlink()
    with pytest.raises(BadRecord, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert "nowhere" in line or "queries.jsonl, line 1" in str(caught.value)


def test_bad_judgements(folder):
    (folder / "qrels.txt").write_text("q1 0 d1 1\nq1 d1\n")
    with pytest.raises(BadRecord, match=r"qrels\.txt, line 2: expected"):
        load(folder)
    (folder / "qrels.txt").write_text("zz 0 d1 1\n")
    with pytest.raises(BadRecord, match="judges query 'zz'"):
        load(folder)


def test_repeated_document_id(folder):
    with (folder / "corpus.jsonl").open("a") as stream:
        stream.write('\n{"_id": "d1", "text": "again"}')
    with pytest.raises(BadRecord, match="document 'd1': field id is repeated"):
        load(folder)


def test_folder_of_neither_layout(tmp_path):
    with pytest.raises(DataError, match=r"neither corpus\.jsonl nor documents\.trec"):
        load(tmp_path)


@pytest.mark.parametrize("separate", [True, False])
def test_beir_by_hugging_face_id(monkeypatch, separate):
    name = "BeIR/tiny" if separate else "someone/tiny"
    rows = {
        (name, "corpus", "corpus"): [{"_id": f"d{i}", "title": "", "text": f"body {i}"} for i in range(4)],
        (name, "queries", "queries"): [{"_id": f"q{i}", "text": f"query{i}"} for i in range(3)],
    }
    judged = f"{name}-qrels" if separate else name
    rows[judged, "default", "train"] = [{"query-id": "q0", "corpus-id": "d0", "score": 1}]
    rows[judged, "default", "test"] = [{"query-id": "q1", "corpus-id": "d1", "score": 2}]

    def load_dataset(name, subset, split):
        if (name, subset, split) not in rows:
            raise ValueError(f"no {split}")
        return datasets.Dataset.from_list(rows[name, subset, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_retrieval(DataConfig(name="beir", path=name, dev_windows=None, dev_share=0.4), quiet=True)
    assert data.queries["test"] == [Query("q1", "query1", ("d1",), (2,))]
    assert data.source == f"Hugging Face {name}"
    del rows[judged, "default", "test"]
    with pytest.raises(DataError, match="cannot load 'default'"):
        load_retrieval(DataConfig(name="beir", path=name), quiet=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "scifakt"}, "did you mean scifact"),
        ({"name": "files"}, "needs a folder"),
        ({"dev_share": 0.4, "test_share": 0.7}, "leaves nothing to train on"),
        ({"name": "pysec", "queries": "titles"}, "have no titles"),
        ({"name": "scifact", "queries": "titles", "split": "by_document"}, "exclude each other"),
    ],
)
def test_config_contradictions(values, message):
    with pytest.raises(ConfigError, match=message):
        build(DataConfig, values)


def test_source_is_printed(folder, capsys):
    load_retrieval(DataConfig(name="files", path=str(folder)))
    assert f"data: files from path {folder}: 30 documents" in capsys.readouterr().out

"""EXSEARCH and DRO on questions and passages of one's own: the recipes of docs/own_data.md with another `data.path`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mobula import artifacts, methods
from mobula.artifacts import read_jsonl
from mobula.cli import main
from mobula.cluster.pool import Pool
from mobula.config import build
from mobula.data.jsonl import SPLITS
from mobula.data.records import Document
from mobula.errors import ArtifactError, BadRecord, ConfigError, DataError
from mobula.models.causal import word_tokenizer
from mobula.rag import stored_search
from mobula.rag.dro.config import Config as DroConfig
from mobula.rag.exsearch.chat import MARKERS
from mobula.rag.exsearch.config import Config as SearchConfig
from mobula.rag.exsearch.data import problems_of
from mobula.rag.search import open_searcher
from mobula.retrieval.build_index import BuildOptions
from mobula.running import run_experiment
from tests.models.tiny_llama import save_llama
from tests.rag.server import Answer, serving

ROOT = Path(__file__).parents[2]
RECIPES = {name: ROOT / "jobs" / name / "own.yaml" for name in ("dro", "exsearch")}
TORCH = "model.engine.kind=torch"  # vLLM wants heads of 32 and more
TOWNS = ["Oslo", "Lima", "Cairo", "Quito"]
NAMES = ["Arlo", "Bena", "Caro", "Dino", "Esma", "Finn", "Gita", "Hugo", "Ines", "Juno", "Kaia", "Levi"]


def write_own(folder: Path, *, support: bool = True, steps: bool = False) -> Path:
    """A folder of one's own: who is from where. Without ``support``, train.jsonl alone names supporting passages."""
    folder.mkdir(exist_ok=True)
    people = [(name, TOWNS[i % len(TOWNS)]) for i, name in enumerate(NAMES)]
    passages = [
        {"id": f"p{i}", "title": name, "text": f"{name} comes from {town} ."} for i, (name, town) in enumerate(people)
    ]
    questions = [
        {"id": f"q{i}", "question": f"where is {name} from", "golden_answers": [town], "support": [f"p{i}"]}
        for i, (name, town) in enumerate(people)
    ]
    files = dict(zip(SPLITS, (questions[:7], questions[7:9], questions[9:]), strict=True))
    if not support:
        for split in ("dev", "test"):
            files[split] = [{k: v for k, v in row.items() if k != "support"} for row in files[split]]
    if steps:
        files["train"] = [
            {**row, "steps": [[NAMES[i], row["golden_answers"][0]]]} for i, row in enumerate(files["train"])
        ]
    files["corpus"] = passages
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_base(folder: Path) -> Path:
    """A tiny Llama of random weights that knows the words of these questions and the markers of turns."""
    tokenizer = word_tokenizer([" ".join([*NAMES, *TOWNS, "where is from comes . none"])], MARKERS)
    return save_llama(folder, tokenizer)


def run(method: str, data: Path, out: Path, *overrides: str) -> dict[str, Any]:
    """The report of the recipe with another path."""
    run_experiment(RECIPES[method], [f"data.path={data}", *overrides], out)
    return json.loads((out / "report.json").read_text())


def test_dro_runs_on_ones_own_data_by_its_path_alone(tmp_path: Path) -> None:
    report = run("dro", write_own(tmp_path / "data"), tmp_path / "run")
    assert report["data"][0]["name"].startswith("jsonl: 12 questions, 12 passages")
    assert {"dro/f1", "dro/hit@1", "dro/recall"} <= set(report["measures"])
    assert "test questions: 3" in report["notes"]
    rows = read_jsonl(tmp_path / "run/questions/test.jsonl")
    assert {row["id"] for row in rows} == {"q9", "q10", "q11"} and all(len(row["candidates"]) == 4 for row in rows)
    predictor = methods.get("dro").load(artifacts.open_artifact(tmp_path / "run/artifact"))
    request, failed = predictor.find("where is Bena from")
    assert not failed and "p1" in request.candidates
    assert isinstance(predictor.answer(request, predictor.select(request)), str)


def test_dro_does_without_support(tmp_path: Path) -> None:
    report = run("dro", write_own(tmp_path / "data", support=False), tmp_path / "run")
    assert "dro/hit@1" in report["measures"] and "dro/recall" not in report["measures"]


def test_exsearch_runs_on_ones_own_data_by_its_path(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    quick = ["warm_up.steps=60", "warm_up.lr=0.01", "warm_up.batch=4", "model.lora.rank=16", "retrieve.kind=bm25"]
    data = write_own(tmp_path / "data", support=False)
    report = run("exsearch", data, tmp_path / "run", f"model.base={base}", TORCH, *quick)
    assert report["data"][0]["records"] == 24 and report["data"][0]["source"] == str(data)
    # Nobody says which passages settle test questions, so nothing is said about finding them.
    assert "exsearch/em" in report["measures"] and "exsearch/gold_hit" not in report["measures"]
    rows = read_jsonl(tmp_path / "run/results/seed-0/exsearch.jsonl")
    assert {row["query"] for row in rows} == {"q9", "q10", "q11"}
    shown = {id for row in rows for ids in row["trajectory"]["shown"] for id in ids}
    assert shown and shown <= {f"p{i}" for i in range(12)}
    predictor = methods.get("exsearch").load(artifacts.open_artifact(tmp_path / "run/artifact"))
    assert len(predictor.answer(["where is Bena from"])) == 1


def answers_from(data: Path) -> Answer:
    """What a server answers that has the passages of a folder, and shares no code with who asks."""
    passages = [json.loads(line) for line in (data / "corpus.jsonl").read_text().splitlines()]
    documents = [Document(row["id"], row["title"], row["text"]) for row in passages]
    index = open_searcher(documents, "bm25")

    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        lists = index.search(request["queries"], min(request["topk"], len(documents)))
        return 200, {"result": [[item(index.document(hit.id), hit.score) for hit in hits] for hits in lists]}

    def item(document: Document, score: float) -> dict[str, Any]:
        return {"document": {"id": document.id, "contents": f'"{document.title}"\n{document.text}'}, "score": score}

    return answer


@pytest.mark.parametrize("corpus", [True, False], ids=["own_copy", "servers_corpus"])
def test_dro_asks_a_served_retriever_once_a_batch(tmp_path: Path, corpus: bool) -> None:
    data = write_own(tmp_path / "data")
    with serving(answers_from(data)) as server:
        if not corpus:
            (data / "corpus.jsonl").unlink()
        report = run("dro", data, tmp_path / "run", f"retrieve.url={server.url}")
        # One when it is opened, then one for each of the four splits.
        assert [len(request["queries"]) for request in server.asked] == [1, 4, 3, 2, 3]
        assert report["data"][0]["name"].endswith("failed 0 questions and found too few passages for 0")
        artifact = artifacts.open_artifact(tmp_path / "run/artifact")
        assert ("documents.jsonl" in artifact.files) == corpus
        predictor = methods.get("dro").load(artifact)
        request, failed = predictor.find("where is Bena from")
        picks = predictor.select(request)
        assert not failed and "p1" in request.candidates and picks[0].document.text.split()[1] == "comes"
        assert isinstance(predictor.answer(request, picks), str)
    request, failed = predictor.find("where is Caro from")
    assert failed and request.candidates == ()


def test_an_artifact_of_found_passages_chooses_as_one_that_holds_them(tmp_path: Path) -> None:
    """The same networks see the same vectors and tokens of passages, whoever has these."""
    data = write_own(tmp_path / "data")
    with serving(answers_from(data)) as server:
        run("dro", data, tmp_path / "held", f"retrieve.url={server.url}")
        (data / "corpus.jsonl").unlink()
        run("dro", data, tmp_path / "asked", f"retrieve.url={server.url}")
        answers = []
        for name in ("held", "asked"):
            predictor = methods.get("dro").load(artifacts.open_artifact(tmp_path / name / "artifact"))
            request, _ = predictor.find("where is Mira or Esma from")
            picks = predictor.select(request)
            answers.append(([(p.document, p.rank) for p in picks], predictor.answer(request, picks)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("corpus", [True, False], ids=["own_copy", "servers_corpus"])
def test_exsearch_asks_a_served_retriever(tmp_path: Path, corpus: bool) -> None:
    data = write_own(tmp_path / "data", steps=True)
    quick = ["warm_up.steps=60", "warm_up.lr=0.01", "warm_up.batch=4", "model.lora.rank=16"]
    quick += [f"model.base={write_base(tmp_path / 'base')}", TORCH]
    with serving(answers_from(data)) as server:
        if not corpus:
            (data / "corpus.jsonl").unlink()
        run("exsearch", data, tmp_path / "run", f"retrieve.url={server.url}", *quick)
        assert max(len(request["queries"]) for request in server.asked) > 1
        rows = read_jsonl(tmp_path / "run/results/seed-0/exsearch.jsonl")
        assert any(shown for row in rows for shown in row["trajectory"]["shown"])
        assert all(row["retriever_errors"] == 0 and row["error"] == "" for row in rows)
        artifact = artifacts.open_artifact(tmp_path / "run/artifact")
        assert ("documents.jsonl" in artifact.files) == corpus
        assert len(methods.get("exsearch").load(artifact).answer(["where is Bena from"])) == 1


def built(data: Path, out: Path, options: BuildOptions) -> Path:
    stored_search.build(data / "corpus.jsonl", out, options, Pool())
    return out


@pytest.mark.parametrize("corpus", [True, False], ids=["own_copy", "index_alone"])
def test_dro_searches_a_built_index_as_the_corpus_itself(
    tmp_path: Path, corpus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_own(tmp_path / "data")
    memory = run("dro", data, tmp_path / "memory")
    index = built(data, tmp_path / "index", BuildOptions("hybrid", "wordllama"))
    if not corpus:
        (data / "corpus.jsonl").unlink()
    indexed = run("dro", data, tmp_path / "run", f"retrieve.index={index}")
    for split in SPLITS:
        rows = [read_jsonl(tmp_path / name / f"questions/{split}.jsonl") for name in ("memory", "run")]
        assert rows[0] == rows[1] and rows[0]
    assert {k: v["value"] for k, v in indexed["measures"].items()} == {
        k: v["value"] for k, v in memory["measures"].items()
    }
    artifact = artifacts.open_artifact(tmp_path / "run/artifact")
    assert "documents.jsonl" not in artifact.files and artifact.meta["index"]["path"] == str(index)
    predictors = [
        methods.get("dro").load(artifacts.open_artifact(tmp_path / n / "artifact")) for n in ("memory", "run")
    ]
    answers = []
    for predictor in predictors:
        request, failed = predictor.find("where is Bena from")
        picks = predictor.select(request)
        answers.append((failed, [(p.document, p.rank) for p in picks], predictor.answer(request, picks)))
    assert answers[0] == answers[1]
    moved_away(index, tmp_path, artifact, monkeypatch)


def moved_away(index: Path, folder: Path, artifact: artifacts.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its index an artifact says which one it needs; in its place below MOBULA_DATA it finds it."""
    hash = artifact.meta["index"]["hash"]
    (folder / "elsewhere/indexes").mkdir(parents=True)
    index.rename(folder / "elsewhere/indexes" / hash)
    monkeypatch.delenv("MOBULA_DATA", raising=False)
    with pytest.raises(ArtifactError, match=f"searches the index {hash} .*MOBULA_DATA"):
        methods.get(artifact.method).load(artifact)
    monkeypatch.setenv("MOBULA_DATA", str(folder / "elsewhere"))
    methods.get(artifact.method).load(artifact)


@pytest.mark.parametrize("corpus", [True, False], ids=["own_copy", "index_alone"])
def test_exsearch_searches_a_built_index(tmp_path: Path, corpus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_own(tmp_path / "data")
    quick = ["warm_up.steps=60", "warm_up.lr=0.01", "warm_up.batch=4", "model.lora.rank=16"]
    quick += [f"model.base={write_base(tmp_path / 'base')}", TORCH]
    index = built(data, tmp_path / "index", BuildOptions())
    if not corpus:
        (data / "corpus.jsonl").unlink()
    report = run("exsearch", data, tmp_path / "run", f"retrieve.index={index}", *quick)
    assert {"exsearch/em", "exsearch/gold_hit"} <= set(report["measures"])
    rows = read_jsonl(tmp_path / "run/results/seed-0/exsearch.jsonl")
    assert any(shown for row in rows for shown in row["trajectory"]["shown"])
    assert all(row["retriever_errors"] == 0 and row["error"] == "" for row in rows)
    artifact = artifacts.open_artifact(tmp_path / "run/artifact")
    assert "documents.jsonl" not in artifact.files
    assert len(methods.get("exsearch").load(artifact).answer(["where is Bena from"])) == 1
    moved_away(index, tmp_path, artifact, monkeypatch)


@pytest.mark.parametrize("method", ["dro", "exsearch"])
def test_an_index_of_another_corpus_is_refused_before_training(method: str, tmp_path: Path) -> None:
    data = write_own(tmp_path / "data")
    index = built(data, tmp_path / "index", BuildOptions())
    with (data / "corpus.jsonl").open("a") as stream:
        stream.write('{"id": "more", "text": "Zora comes from Oslo ."}\n')
    with pytest.raises(DataError, match=r"corpus.jsonl: is not the corpus of retrieve.index="):
        run(method, data, tmp_path / "run", f"retrieve.index={index}", "retrieve.kind=bm25")
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_the_commands_of_the_page_build_an_index_and_run_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "own_data.md").read_text().split("## A built index")[1].split("\n## ")[0]
    commands = [line for line in page.splitlines() if line.startswith("mobula ") and "CORPUS" not in line]
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    monkeypatch.chdir(tmp_path)
    output = ""
    for command in commands:
        done = CliRunner().invoke(main, shlex.split(command)[1:])
        assert done.exit_code == 0, f"{command}: {done.output}"
        output += done.output
    assert len(commands) == 3 and "hybrid index" in output and "of 36 passages" in output
    assert "files match the manifest" in output and (tmp_path / "runs/own_indexed/report.json").is_file()


@pytest.mark.end_to_end
@pytest.mark.language
@pytest.mark.timeout(2400)
def test_exsearch_runs_on_ones_own_data_by_its_path_alone(tmp_path: Path) -> None:
    report = run("exsearch", write_own(tmp_path / "data"), tmp_path / "run")
    assert {"exsearch/em", "exsearch/gold_hit", "warm_up/em"} <= set(report["measures"])


def test_an_oracle_takes_the_steps_that_a_question_says_and_titles_otherwise(tmp_path: Path) -> None:
    data = write_own(tmp_path)
    row = {
        "id": "x",
        "question": "q",
        "golden_answers": ["Ada"],
        "support": ["p1", "p2"],
        "steps": [["b", "c"], ["d", "e"]],
    }
    with (data / "train.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    config = build(SearchConfig, {"method": "exsearch"}, [
        "data.source=jsonl", f"data.path={data}", "data.warm_up=8", "data.train=null", "data.dev=2", "data.test=2",
        "model.base=b",
    ])  # fmt: skip
    with pytest.raises(DataError, match=r"data\.train: 1 questions are needed"):
        problems_of(config.data, "train")
    config.data.warm_up = 7
    found = {problem.id: problem for split in ("warm_up", "train") for problem in problems_of(config.data, split)}
    assert [(step.query, step.fact, step.passage) for step in found["x"].plan] == [("b", "c", "p1"), ("d", "e", "p2")]
    assert [(step.query, step.fact, step.passage) for step in found["q0"].plan] == [("", "", "p0")]


@pytest.mark.parametrize(
    ("method", "overrides", "reason"),
    [
        ("dro", ["data.path=''"], "data.path is empty, but source=jsonl needs a folder with corpus.jsonl"),
        ("dro", ["data.source=nq"], "data.train=null: .* all needs source=jsonl"),
        ("dro", ["data.labelled=null"], "labelled"),
        ("dro", ["retrieve.pool=own"], "retrieve.pool=own: questions of data.source=jsonl come with no passages"),
        ("exsearch", ["model.base=''"], "data.source=jsonl needs model.base"),
        ("exsearch", ["data.test_set=hotpotqa_100"], "test_set=hotpotqa_100 needs source=hotpotqa"),
        ("exsearch", ["data.source=world", "retrieve.url=http://x"], "retrieve.url: a served retriever has one corpus"),
        (
            "exsearch",
            ["data.source=world", "retrieve.index=x"],
            "retrieve.index is for passages of one's own.*source=jsonl",
        ),
        (
            "dro",
            ["data.source=hotpotqa", "data.train=4", "retrieve.index=x"],
            "retrieve.index is for passages of one's own",
        ),
        ("dro", ["retrieve.index=x", "retrieve.url=http://x"], "retrieve.index and url exclude each other"),
        ("dro", ["retrieve.index=x", "retrieve.pool=own"], "retrieve.index ranks the whole corpus; use pool=corpus"),
    ],
)
def test_contradictions_are_named(method: str, overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        methods.load_config(RECIPES[method], overrides)


@pytest.mark.parametrize("method", ["dro", "exsearch"])
def test_support_that_is_not_in_the_corpus_is_named_before_training(method: str, tmp_path: Path) -> None:
    data = write_own(tmp_path / "data")
    lines = (data / "corpus.jsonl").read_text().splitlines(keepends=True)
    (data / "corpus.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(BadRecord, match="question 'q11': its supporting passage 'p11' is not in"):
        run(method, data, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.safetensors")) or method == "dro"


def test_a_dro_config_still_counts_the_questions_of_a_world() -> None:
    with pytest.raises(ConfigError, match="train=null"):
        build(DroConfig, {"method": "dro", "data": {"train": None}})

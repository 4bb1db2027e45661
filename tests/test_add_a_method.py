"""The walk-through of docs/add_a_method.md, carried out: its files, its recipe, its endpoint."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mobula import methods
from mobula.artifacts import open_artifact
from mobula.errors import ConfigError
from mobula.methods import Entry
from mobula.running import run_experiment
from tests.serving.asgi import ask

PAGE = Path(__file__).parent.parent / "docs" / "add_a_method.md"
MODULE = "mobula.retrieval.term_weights"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.S)


@pytest.fixture
def walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, ModuleType]]:
    """The recipe's path and the application's module, as a reader of the page has them."""
    *method, entry, application = blocks("python")
    monkeypatch.setitem(sys.modules, MODULE, _module(MODULE, tmp_path / "term_weights.py", "\n\n".join(method)))
    monkeypatch.setitem(methods.METHODS, *eval(f"{{{entry}}}", {"Entry": Entry}).popitem())
    recipe = tmp_path / "smoke.yaml"
    recipe.write_text(blocks("yaml")[0])
    yield recipe, _module("terms", tmp_path / "terms.py", application)
    sys.modules.pop("terms", None)


def _module(name: str, path: Path, source: str) -> ModuleType:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_method_of_the_page_trains_compares_and_is_served(
    walked: tuple[Path, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, application = walked
    monkeypatch.chdir(tmp_path)  # without cluster.yaml it trains in this process
    report = run_experiment(recipe, ["training.steps=40"], tmp_path / "run")
    values = {name: measure.value for name, measure in report.measures.items()}
    assert values["trained/hit@10"] > values["idf/hit@10"] > values["uniform/hit@10"]
    assert {claim.name for claim in report.claims} == {"beats idf", "beats uniform"}
    assert [row[0] for row in report.tables["Test queries"]] == ["arm", "trained", "idf", "uniform"]

    args = application.ModelArgs(artifact=tmp_path / "run" / "artifact", key_required=False)
    app = application.create_app(application.Engine(args), args)
    document = methods.get("term_weights").load(open_artifact(args.artifact)).corpus.data.documents[0]
    answer = ask(app, "POST", "/search", json={"query": document.text[:300], "k": 3})
    assert answer.status_code == 200 and answer.json()["hits"][0][0] == document.id
    assert ask(app, "POST", "/search", json={"query": " "}).status_code == 422


def test_the_page_names_what_is_wrong_with_a_config(walked: tuple[Path, ModuleType], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"arms: unknown 'ifd' \(did you mean idf\?\)"):
        run_experiment(walked[0], ["arms=[trained, ifd]"], tmp_path / "run")

"""Guards over the whole checkout: the name of the source root, recipes, config keys and documentation."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from mobula import methods
from mobula.cli import main
from mobula.config import describe, read_yaml

ROOT = Path(__file__).parents[1]
LONGEST = 60  # lines of a function
METHOD_LINES = 2300  # of a method's package
CODE = "import platform; platform.system(); import mobula; print(platform.__file__)"


def test_platform_is_not_a_package_and_holds_no_module() -> None:
    assert not list((ROOT / "platform").glob("*.py"))


@pytest.mark.parametrize("mode", ["-c", "-m", "script", "PYTHONPATH", "pytest"])
def test_the_standard_module_platform_is_found_from_the_root(mode: str, tmp_path: Path) -> None:
    script = tmp_path / "probe_layout.py"
    script.write_text(CODE)
    paths = [str(ROOT / "platform"), str(tmp_path)]
    if mode == "PYTHONPATH":
        paths.insert(0, str(ROOT))
    (tmp_path / "test_probe.py").write_text(f"def test_probe():\n    {CODE}\n")
    arguments = {
        "-c": ["-c", CODE],
        "-m": ["-m", "probe_layout"],
        "script": [str(script)],
        "PYTHONPATH": ["-c", CODE],
        "pytest": ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_probe.py")],
    }[mode]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if mode != "pytest":
        assert str(ROOT) not in done.stdout


# Recipes, sweeps and words that no one runs any more go stale: everything below reads them as they stand.

RECIPES = sorted((ROOT / "jobs").rglob("*.yaml"))
SPACES = sorted((ROOT / "tune_spaces").glob("*.yaml"))
SMOKE_MINUTES = 10  # of CI's 25; the rest is for the tests
# Keys that a person reads; `mobula show` prints them and no code needs them.
FOR_READERS = {"about.what", "about.minutes", "about.memory_gb", "about.result"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_loads_and_says_what_it_costs(path: Path) -> None:
    config = methods.load_config(path)
    assert config.about.what, "about.what is empty"
    assert config.about.minutes > 0, "about.minutes is missing"
    assert getattr(config, "evaluation_problems", list)() == []


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.name)
def test_every_sweep_has_its_experiment(path: Path) -> None:
    space = read_yaml(path)
    assert (ROOT / space["experiment"]).is_file()
    schema = methods.get(read_yaml(ROOT / space["experiment"])["method"]).Config
    known = {name for name, _, _ in describe(schema)}
    assert {*space["parameters"], *space.get("fixed", {})} <= known


def test_smoke_recipes_fit_into_ci() -> None:
    smoke = [methods.load_config(path) for path in RECIPES if path.stem == "smoke"]
    assert smoke
    assert sum(config.about.minutes for config in smoke) <= SMOKE_MINUTES


def test_every_method_has_a_smoke_recipe() -> None:
    for name in methods.METHODS:
        assert (ROOT / "jobs" / name / "smoke.yaml").is_file()


@pytest.mark.parametrize("method", methods.METHODS)
def test_no_key_of_a_config_is_without_effect(method: str) -> None:
    """Every leaf is read somewhere: as an attribute, not merely declared."""
    source = "\n".join(path.read_text() for path in (ROOT / "platform").rglob("*.py"))
    used = set(re.findall(r"\.(\w+)", source)) | set(re.findall(r"getattr\(\w+(?:\.\w+)*, \"(\w+)\"", source))
    leaves = {name for name, _, _ in describe(methods.get(method).Config)} - FOR_READERS
    # Read by the name of a paradigm or of a kind of system: getattr(config.learning_rates, arm.paradigm).
    kinds = ("diffusion", "autoregressive", "classifier", "numeric", "text")
    by_name = {f"learning_rates.{kind}" for kind in kinds}
    assert sorted(name for name in leaves - by_name if name.rsplit(".", 1)[-1] not in used) == []


PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def commands_of(page: Path) -> list[str]:
    """Lines of a page's code blocks that call `mobula` or `make`."""
    blocks = re.findall(r"```(?:sh|bash|console)?\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.split(" ")[0].endswith(("mobula", "make"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_documentation_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for line in commands_of(page):
        program, *words = shlex.split(line, comments=True)
        if program.endswith("make"):
            assert {word for word in words if "=" not in word and not word.startswith("-")} <= targets, line
            continue
        command: click.Command = main
        while isinstance(command, click.Group):
            name = next((word for word in words if not word.startswith("-")), None)
            if name is None:
                break
            words.remove(name)
            assert name in command.commands, line
            command = command.commands[name]
        options = {text for parameter in command.params for text in (*parameter.opts, "--help", "-h", "--version")}
        own = words[: words.index("--")] if "--" in words else words
        assert {word.split("=")[0] for word in own if word.startswith("--")} <= options, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_the_documentation_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:jobs|tune_spaces|platform|tests|docs|benchmarks|serve_apps)/[\w./-]+)`", page.read_text())
    # The walk-through's own method is not in the repository.
    own = ("term_weights", "serve_apps/terms.py")
    assert [name for name in named if not any(part in name for part in own) and not (ROOT / name).exists()] == []


def _imports(tree: ast.AST, modules: set[str]) -> set[str]:
    """The modules that a module imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def test_no_modules_import_each_other_in_a_circle() -> None:
    source = ROOT / "platform"
    paths = {".".join(p.relative_to(source).with_suffix("").parts): p for p in source.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    graph = {name: _imports(ast.parse(p.read_text()), set(paths)) - {name} for name, p in paths.items()}
    # A module that imports nothing which is left cannot be on a circle.
    while free := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, f"circles among or below: {', '.join(sorted(graph))}"


def test_functions_are_short() -> None:
    folders = (ROOT / "platform", ROOT / "serve_apps", ROOT / "jobs")
    long = [
        f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"
        for folder in folders
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > LONGEST
    ]
    assert long == []


METHOD_PACKAGES = ("agents/moat", "rag/exsearch", "rag/dro", "retrieval/dynamic")


@pytest.mark.parametrize("package", METHOD_PACKAGES)
def test_a_method_stays_small(package: str) -> None:
    files = (ROOT / "platform" / "mobula" / package).rglob("*.py")
    assert sum(len(path.read_text().splitlines()) for path in files) <= METHOD_LINES


def test_make_runs_every_test_that_starts_ray() -> None:
    """A folder that it does not know is never run there, and one without such tests fails."""
    (listed,) = re.findall(r"^END_TO_END := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    texts = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)}
    no_ray = ("mark.alone", "mark.language")
    starts_ray = [p for p, text in texts.items() if "mark.end_to_end" in text and not any(n in text for n in no_ray)]
    assert set(listed.split()) == {path.relative_to(ROOT / "tests").parts[0] for path in starts_ray}

"""The table of methods: every entry is what the platform expects of a method."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from mobula import methods
from mobula.errors import ConfigError
from mobula.experiment import ExperimentConfig


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_offers_config_run_and_load(name: str) -> None:
    module = methods.get(name)
    assert issubclass(module.Config, ExperimentConfig)
    assert list(inspect.signature(module.run).parameters) == ["run"]
    assert list(inspect.signature(module.load).parameters) == ["artifact"]
    assert module.Config().name == ExperimentConfig().name


def test_listing_the_methods_imports_none() -> None:
    code = "import sys; from mobula import methods; print('torch' in sys.modules, len(methods.METHODS))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split()[0] == "False"


def test_an_unknown_method_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'difugr' \(did you mean diffugr\?\)"):
        methods.get("difugr")


@pytest.mark.parametrize("text", ["name: x\n", "method: 3\n", ""])
def test_a_file_without_a_method_says_which_there_are(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"x.yaml: the key method is missing; expected one of diffugr"):
        methods.load_config(tmp_path / "x.yaml")


def test_an_override_cannot_change_the_method(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("method: diffugr\n")
    assert methods.load_config(tmp_path / "x.yaml", ["seed=4"]).seed == 4
    with pytest.raises(ConfigError, match="cannot be overridden"):
        methods.load_config(tmp_path / "x.yaml", ["method=other"])

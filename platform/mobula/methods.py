"""The table of methods. A method is a module with a ``Config`` schema, ``run(run) -> Report`` and
``load(artifact) -> predictor``; nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mobula import config as configs
from mobula.errors import ConfigError
from mobula.experiment import ExperimentConfig


@dataclass(frozen=True)
class Entry:
    """Where a method lives and what it is, in one line."""

    area: str
    module: str
    summary: str


METHODS = {
    "diffugr": Entry(
        "retrieval",
        "mobula.retrieval.diffugr",
        "generative document retrieval: a masked diffusion model denoises document identifiers",
    ),
    "dynamic_retrieval": Entry(
        "retrieval",
        "mobula.retrieval.dynamic.method",
        "generative retrieval over corpora that grow: docid families, and several docids per document",
    ),
    "moat": Entry(
        "agents",
        "mobula.agents.moat.study",
        "a planner and a grounder aligned jointly, each tuned on what the other makes of its work",
    ),
    "exsearch": Entry(
        "rag",
        "mobula.rag.exsearch.study",
        "an agent that thinks, searches and records before it answers, learned by EM over its trajectories",
    ),
    "dro": Entry(
        "rag",
        "mobula.rag.dro.method",
        "a selector of passages and a generator of answers learned together by EM over permutations",
    ),
}


def get(name: str) -> ModuleType:
    """Import a method.

    Raises:
        ConfigError: if there is no method of that name.
    """
    if name not in METHODS:
        raise ConfigError([f"unknown method {name!r}{configs.nearest(name, list(METHODS))}"], "methods")
    return importlib.import_module(METHODS[name].module)


def load_config(path: Path, overrides: tuple[str, ...] | list[str] = ()) -> ExperimentConfig:
    """Load an experiment file with the schema of the method it names.

    Raises:
        ConfigError: with everything that is wrong in it.
    """
    values: dict[str, Any] = configs.read_yaml(path)
    name = values.get("method")
    if not isinstance(name, str):
        raise ConfigError([f"the key method is missing; expected one of {', '.join(METHODS)}"], str(path))
    loaded = configs.load(get(name).Config, path, overrides)
    if loaded.method != name:
        raise ConfigError([f"method={loaded.method}: the method of an experiment cannot be overridden"], str(path))
    return loaded

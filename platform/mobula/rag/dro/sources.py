"""Which source an experiment asks for, and what opens its artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobula.artifacts import Artifact
from mobula.rag.dro import answering
from mobula.rag.dro.config import FACTS, Config
from mobula.rag.dro.facts import source as facts
from mobula.rag.dro.language import source as language
from mobula.rag.dro.passages import source as passages
from mobula.rag.dro.questions import FOLDER
from mobula.rag.dro.source import Source


def source_of(config: Config, directory: Path) -> Source:
    """The source of an experiment whose run is in ``directory``."""
    if config.data.source == FACTS:
        return facts.Facts(config)
    made = language.Language if config.model.base else passages.Passages
    return made(config, directory / FOLDER)


def open_predictor(artifact: Artifact) -> Any:
    """What answers questions with an artifact's networks."""
    return (facts.load if artifact.kind == facts.ARTIFACT else answering.load)(artifact)

"""Real questions with their candidates: what sources with small networks and with language models share."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mobula.alternation import Row
from mobula.artifacts import write_json, write_jsonl
from mobula.experiment import DataFacts
from mobula.rag.candidates import DOCUMENTS, FACTS, Candidates, open_candidates, prepare
from mobula.rag.dro.asked import labelled
from mobula.rag.dro.config import Config

FOLDER = "questions"  # folder of a run that holds questions, passages and candidates
VECTOR_FILE, EXAMPLE_FILE = "vectors.safetensors", "examples.json"
EXAMPLES = 8  # questions for people who want to try an artifact


@dataclass(frozen=True)
class Questions:
    """What :meth:`prepare` makes is in ``directory``."""

    config: Config
    directory: Path
    artifact = "rag"

    @property
    def candidates(self) -> Candidates:
        """Questions by split, with their candidates."""
        return open_candidates(self.directory)

    @property
    def found(self) -> Row:
        """Facts about questions and candidates."""
        return json.loads((self.directory / FACTS).read_text(encoding="utf-8"))

    def prepare(self) -> DataFacts:
        """Candidates are found once and kept."""
        data = self.config.data
        found = prepare(self.directory, data.source, data.path, data.sizes, self.config.retrieve, data.seed)
        title = (
            f"{data.source}: {found.questions} questions, {found.passages} passages; the retriever failed "
            f"{found.retriever_errors} questions and found too few passages for {found.too_few}"
        )
        return DataFacts(title, found.source, found.sha256, found.questions)

    def queries(self, split: str) -> list[int]:
        """All of a split, whether or not the retriever answered; of those to learn from, only where it did."""
        asked = self.candidates.splits[split]
        return [query for query, one in enumerate(asked) if one.candidates or split in ("dev", "test")]

    def labels(self, kind: str, seed: int) -> list[Row]:
        """As :func:`labelled`."""
        candidates = self.candidates
        return labelled(candidates, candidates.splits["labelled"], kind, self.config.retrieve.choose, seed)

    def write_questions(self, folder: Path) -> None:
        """Passages with their vectors, and some questions to try, into the folder of an artifact."""
        candidates = self.candidates
        write_jsonl(folder / DOCUMENTS, map(asdict, candidates.documents))
        save_file({"vectors": torch.from_numpy(candidates.vectors)}, folder / VECTOR_FILE)
        write_json(folder / EXAMPLE_FILE, [asked.text for asked in candidates.splits["dev"][:EXAMPLES]])

    def sizes(self) -> dict[str, Any]:
        """What an artifact says of its networks and its retriever."""
        config = self.config
        return {name: asdict(getattr(config, name)) for name in ("model", "retrieve", "select")}

"""Small real-looking data in the files' own formats, and configs for it, for the tests of DRO on text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mobula.models.causal import word_tokenizer
from mobula.running import run_experiment
from tests.models.tiny_llama import save_llama

CITIES = ["Paris", "Oslo", "Lima", "Cairo", "Quito", "Dakar", "Hanoi", "Sofia", "Minsk", "Accra", "Delhi", "Tunis"]
NAMES = ["Arlo", "Bena", "Caro", "Dino", "Esma", "Finn", "Gita", "Hugo", "Ines", "Juno", "Kaia", "Levi", "Mira", "Nils",
         "Olga", "Pita", "Quin", "Rosa", "Sven", "Tara", "Ugo", "Vera", "Wim", "Yara"]  # fmt: skip
CONFIG: dict[str, Any] = {
    "method": "dro",
    "name": "small",
    "arms": ["dro", "rag_sft"],
    "data": {"source": "nq", "labelled": 6, "train": 10, "dev": 4, "test": 4},
    "retrieve": {"encoder": "wordllama", "candidates": 6, "choose": 2},
    "model": {"layers": 1, "selector_width": 16, "generator_width": 16, "passage_tokens": 24},
    "cold": {"selector_steps": 4, "generator_steps": 4, "reading_steps": 4},
    "em": {"samples": 3, "shard": 4},
    "fit": {"steps": 3, "batch": 4, "workers": 0},
    "alternation": {"iterations": 1, "actors": 0, "monitor": "dev_f1"},
    "evaluation": {"decisive": False, "resamples": 200},
}


def write_nq(folder: Path) -> None:
    """Questions in the form of nq_generator_training.json: a passage that answers, and four about others."""
    rows = []
    for number, name in enumerate(NAMES):
        near = [(number + step) % len(NAMES) for step in range(5)]
        known = [(NAMES[at], CITIES[at % len(CITIES)]) for at in near]
        passages = "\n".join(
            f'[{i}] Title: "{one} the baker" Text:  {one} was born in {city} and bakes ""bread"".'
            for i, (one, city) in enumerate(known, 1)
        )
        asked = f"where was {name} born"
        prompt = f"Answer these.\n{passages}\nQuestion: {asked}\nYour answer: "
        rows.append({"prompt": prompt, "response": known[0][1], "query_id": str(number), "sample_id": 0, "probs": 1.0})
    (folder / "nq_generator_training.json").write_text(json.dumps(rows))


def write_squad(folder: Path) -> None:
    """Texts with answers in the form of squad_v2.0.json."""
    rows = []
    for name, city in zip(NAMES, CITIES * 2, strict=True):
        text = f"The painter {name} grew up in {city} before the war."
        start = text.index(city)
        question = f"Where did {name} grow up?"
        rows.append({"question": question, "context": text, "answer": city, "answer_span": [start, start + len(city)]})
    (folder / "squad_v2.0.json").write_text(json.dumps(rows))


def write_base(folder: Path) -> Path:
    """A tiny Llama of random weights that knows the words of the questions."""
    marks = [f"[{i}]" for i in range(1, 13)]
    texts = [" ".join([*NAMES, *CITIES, *marks, "> was born in where and the baker Question passages answer the"])]
    tokenizer = word_tokenizer(texts)
    return save_llama(folder, tokenizer)


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """The config of a run over the data of ``folder``, with sections changed in part."""
    found = {name: dict(value) if isinstance(value, dict) else value for name, value in CONFIG.items()}
    found["data"]["path"] = found["cold"]["reading_path"] = str(folder)
    for name, change in changes.items():
        found[name] = {**found[name], **change} if isinstance(change, dict) and name in found else change
    return found


def run_in(directory: Path, config: dict[str, Any]) -> Path:
    """The directory of a run that has finished."""
    path = directory.with_name(f"{directory.name}.yaml")
    path.write_text(yaml.safe_dump(config))
    run_experiment(path, [], directory)
    return directory


def trained(folder: Path) -> Path:
    """The artifact of a run with small networks."""
    write_nq(folder)
    write_squad(folder)
    return run_in(folder / "run", values(folder, arms=["dro"])) / "artifact"

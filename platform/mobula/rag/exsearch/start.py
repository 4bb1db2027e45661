"""What comes before EM: small models learn to read, and all learn the form of turns from oracle trajectories."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator
from pathlib import Path

from mobula.alternation import seed_of
from mobula.locks import alone
from mobula.models.causal import CausalModel, word_tokenizer
from mobula.rag.exsearch.chat import MARKERS, QUERY, TURN, chat_of
from mobula.rag.exsearch.config import SKILL, WARM, Config, Mode
from mobula.rag.exsearch.oracle import Oracle
from mobula.rag.exsearch.sources import Corpus, corpus_of, problems_of, skill_problems
from mobula.rag.exsearch.training import DATA, MODEL, QueryRows, RowsTask, tune, write_rows
from mobula.rag.exsearch.workers import searcher_of
from mobula.rag.exsearch.world import words
from mobula.threads import one_thread

FRESH, USUAL = "fresh", "usual"
log = logging.getLogger(__name__)


def warmed_up(config: Config, directory: Path, seed: int, mode: Mode) -> Path:
    """The model that has seen oracle trajectories of a mode, trained in ``directory`` unless it is there."""
    base, place = begun(config, directory, seed, mode), directory / WARM / (mode.name or USUAL)
    with _alone(place) as missing:
        if missing:
            log.info("seed %d: warm-up %s", seed, mode.name)
            write_rows(place / DATA, warm_up_rows(config, base, seed, mode))
            tune(RowsTask(base, place / DATA), config.warm_up, place, seed_of(seed, WARM, mode.name), WARM)
    return place / MODEL


def begun(config: Config, directory: Path, seed: int, mode: Mode) -> Path:
    """The model before the warm-up: a pretrained one with a fresh adapter, or a small one that can read."""
    place = directory / SKILL / (mode.name or USUAL)
    with _alone(place) as missing:
        if missing and config.model.base:
            fresh(config, seed).save(place / MODEL)
        elif missing:
            log.info("seed %d: skill stage %s", seed, mode.name)
            fresh(config, seed).save(place / FRESH)
            write_rows(place / DATA, skill_rows(config, place / FRESH, seed, mode, config.skill_questions))
            tune(RowsTask(place / FRESH, place / DATA), config.skill, place, seed_of(seed, SKILL, mode.name), SKILL)
    return place / MODEL


def fresh(config: Config, seed: int) -> CausalModel:
    """An untrained model, or a pretrained one with untrained low-rank parts."""
    shape, own = config.model, seed_of(seed, FRESH) % 2**31
    if shape.base:
        return CausalModel.adapted(shape.base, shape.lora_rank, shape.lora_alpha, own)
    # PyTorch's slow import of transformers is for those who build a small model.
    from mobula.models.pointer import PointerConfig

    tokenizer = word_tokenizer(words(), MARKERS)
    ids = dict(zip((QUERY, TURN), tokenizer.convert_tokens_to_ids([QUERY, TURN]), strict=True))
    network = PointerConfig(
        vocab_size=len(tokenizer),
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        query_id=ids[QUERY],
        turn_id=ids[TURN],
        words_from=tokenizer.convert_tokens_to_ids(MARKERS[-1]) + 1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CausalModel.pointer(tokenizer, network, own)


def skill_rows(config: Config, model: Path, seed: int, mode: Mode, count: int) -> list[QueryRows]:
    """Complete one-hop trajectories of other worlds, the shown passages in random order."""
    opened = CausalModel.open(str(model))
    found = []
    for corpus, problems in skill_problems(config.data, count):
        found += oracle_of(config, opened, corpus, mode, shuffle=True).rows(problems, seed)
    return found


def warm_up_rows(config: Config, base: Path, seed: int, mode: Mode) -> list[QueryRows]:
    """Oracle trajectories of the warm-up's questions; for a small model with skill rows among them."""
    opened = CausalModel.open(str(base))
    corpus = corpus_of(config.data, "warm_up")
    found = oracle_of(config, opened, corpus, mode).rows(problems_of(config.data, "warm_up"), seed)
    if config.model.base:
        return found
    more = round(len(found) * config.skill_share / (1 - config.skill_share))
    skilled = skill_rows(config, base, seed, mode, config.skill_questions)
    return found + random.Random(seed_of(seed, "mixed")).sample(skilled, min(more, len(skilled)))


def oracle_of(config: Config, model: CausalModel, corpus: Corpus, mode: Mode, *, shuffle: bool = False) -> Oracle:
    """The oracle of a corpus, in a model's tokens."""
    rollout, retrieve = config.rollout, config.retrieve
    searcher = searcher_of(corpus, retrieve.kind, retrieve.encoder)
    chat = chat_of(model, rollout.max_passage_tokens)
    return Oracle(model, chat, searcher, mode, rollout.k_show, rollout.k_candidates, shuffle)


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[bool]:
    """Whether the model of ``place`` is missing; concurrent trials of a sweep share it, and one of them makes it."""
    with alone(place), one_thread():
        yield not (place / MODEL).is_dir()

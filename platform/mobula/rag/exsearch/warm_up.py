"""What comes before EM: small models learn to read, and all learn the form of turns from oracle trajectories."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from mobula.alternation import seed_of
from mobula.cluster.spec import ClusterSpec
from mobula.data.worlds.words import words
from mobula.locks import alone
from mobula.models.causal import CausalModel, word_tokenizer
from mobula.models.finetune import MODEL, finetune, save_whole
from mobula.rag.exsearch.chat import MARKERS, QUERY, TURN, chat_of
from mobula.rag.exsearch.config import SKILL, WARM_UP, Config, Mode
from mobula.rag.exsearch.data import corpus_of, problems_of, skill_problems
from mobula.rag.exsearch.oracle import Oracle
from mobula.rag.searchers import Corpus, open_corpus
from mobula.rag.weighted_rows import DATA, QueryRows, RowsTask, write_rows
from mobula.threads import one_thread

FRESH = "fresh"
log = logging.getLogger(__name__)


def warm_up_model(config: Config, directory: Path, seed: int, mode: Mode, cluster: ClusterSpec | None = None) -> Path:
    """The model that has seen oracle trajectories of a mode, trained in a seed's directory unless it is there."""
    base, path = start_model(config, directory, seed, mode, cluster), directory / WARM_UP / mode.name
    with _alone(path) as missing:
        if missing:
            log.info("seed %d: warm-up, %s", seed, mode.name)
            write_rows(path / DATA, warm_up_rows(config, base, seed, mode))
            task, own = RowsTask(base, path / DATA), seed_of(seed, WARM_UP, mode.seed_name)
            finetune(task, config.warm_up, path, seed=own, name=WARM_UP, cluster=cluster)
    return path / MODEL


def start_model(config: Config, directory: Path, seed: int, mode: Mode, cluster: ClusterSpec | None = None) -> Path:
    """The model before the warm-up: a pretrained one, or a small one that can read."""
    path = directory / SKILL / mode.name
    with _alone(path) as missing:
        if missing and config.model.base:
            save_whole(fresh(config, seed), path / MODEL)
        elif missing:
            log.info("seed %d: skill stage, %s", seed, mode.name)
            fresh(config, seed).save(path / FRESH)
            write_rows(path / DATA, skill_rows(config, path / FRESH, seed, mode, config.skill_questions))
            task, own = RowsTask(path / FRESH, path / DATA), seed_of(seed, SKILL, mode.seed_name)
            finetune(task, config.skill, path, seed=own, name=SKILL, cluster=cluster)
    return path / MODEL


def fresh(config: Config, seed: int) -> CausalModel:
    """An untrained model, or a pretrained one as it is, with untrained low-rank parts unless all of it is trained."""
    shape, own = config.model, seed_of(seed, FRESH) % 2**31
    if shape.base:
        return shape.start(own)
    # PyTorch's slow import of transformers is for those who build a small model.
    from mobula.models.pointer import PointerConfig

    tokenizer = word_tokenizer(words(), MARKERS)
    sizes = {"width": shape.width, "layers": shape.layers, "heads": shape.heads}
    network = PointerConfig.of(tokenizer, QUERY, TURN, MARKERS[-1], **sizes)
    return CausalModel.pointer(tokenizer, network, own)


def skill_rows(config: Config, model: Path, seed: int, mode: Mode, count: int) -> list[QueryRows]:
    """Complete one-hop trajectories of other worlds, the shown passages in random order."""
    opened = CausalModel.open(str(model))
    result = []
    for corpus, problems in skill_problems(config.data, count):
        result += oracle_of(config, opened, corpus, mode, shuffle=True).rows(problems, seed)
    return result


def warm_up_rows(config: Config, base: Path, seed: int, mode: Mode) -> list[QueryRows]:
    """Oracle trajectories of the warm-up's questions; for a small model with skill rows among them."""
    opened = CausalModel.open(str(base))
    corpus = corpus_of(config.data, "warm_up")
    oracle = oracle_of(config, opened, corpus, mode).rows(problems_of(config.data, "warm_up"), seed)
    if config.model.base:
        return oracle
    more = round(len(oracle) * config.skill_share / (1 - config.skill_share))
    skilled = skill_rows(config, base, seed, mode, config.skill_questions)
    return oracle + random.Random(seed_of(seed, "mixed")).sample(skilled, min(more, len(skilled)))


def oracle_of(config: Config, model: CausalModel, corpus: Corpus, mode: Mode, *, shuffle: bool = False) -> Oracle:
    """The oracle of a corpus, in a model's tokens."""
    rollout, retrieve = config.rollout, config.retrieve
    searcher, chat = open_corpus(corpus, retrieve), chat_of(model, rollout.max_passage_tokens)
    return Oracle(model, chat, searcher, mode, rollout.k_show, rollout.k_candidates, shuffle)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether the model of ``path`` is missing; concurrent trials of a sweep share it, and one of them makes it."""
    with alone(path), one_thread():
        yield not (path / MODEL).is_dir()


def start_identity(config: Config) -> list[object]:
    """What of a config decides the warm-up."""
    data = {name: value for name, value in asdict(config.data).items() if name not in ("train", "dev", "test")}
    shown = [config.rollout.k_show, config.rollout.k_candidates, config.rollout.max_passage_tokens]
    retrieve, trainings = config.retrieve, [config.skill.identity(), config.warm_up.identity()]
    answers = [retrieve.kind, retrieve.encoder, retrieve.url, *filter(None, [retrieve.index])]
    shares = [config.skill_questions, config.skill_share, config.seed]
    return [data, asdict(config.model), answers, shown, *trainings, *shares]

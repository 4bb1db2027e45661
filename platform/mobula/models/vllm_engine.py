"""Language models behind vLLM: many sequences in flight, prompts that begin alike read once, adapters by request.

An engine is started once in a process for each base model, and what is asked of it names the adapter; so an iteration
that has trained a new adapter asks the same engine. It computes in this process (on an actor, then), which it can take
down with it and no other.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobula.environment import vllm_environment
from mobula.errors import ModelError
from mobula.models.adapters import CONFIG, read_base
from mobula.models.encoders import read_json
from mobula.models.language_model import Continuation, EngineConfig, LanguageModel, Sampling, require_prompts
from mobula.models.pretrained import Pretrained
from mobula.models.text import hash_files

# Engines that a process keeps: an agent of two models has one each where both were trained whole.
KEPT = 2
RANKS = (8, 16, 32, 64, 128, 256, 512)  # of adapters that an engine makes room for
ADAPTERS = 4  # adapters that take part in a batch
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Room:
    """What an engine has room for: adapters up to a rank, on layers of these names."""

    rank: int = 0
    layers: frozenset[str] = frozenset()

    @classmethod
    def of(cls, adapter: dict[str, Any]) -> Room:
        """For an adapter, by PEFT's config of it.

        Raises:
            ModelError: if vLLM has no room for it.
        """
        layers = frozenset(name.rsplit(".", 1)[-1] for name in adapter["target_modules"])
        if adapter["r"] > RANKS[-1]:
            raise ModelError(f"lora.rank={adapter['r']}: vLLM takes {RANKS[-1]} at most; or take engine.kind=torch")
        # Under an adapter there, vLLM cannot score prompts of several requests.
        if "lm_head" in layers:
            raise ModelError("lora.targets: vLLM takes none of the output layer, lm_head; or take engine.kind=torch")
        return cls(min(rank for rank in RANKS if rank >= adapter["r"]), layers)

    def takes(self, other: Room) -> bool:
        """Whether an adapter that needs ``other`` has room here."""
        return other.rank <= self.rank and other.layers <= self.layers


class VllmModel(LanguageModel):
    """A pretrained model, or an adapter on one, asked through a vLLM engine.

    Log-probabilities are those of the distribution that vLLM draws from. Under a temperature or a nucleus those of the
    model as it is take a pass over what was drawn.
    """

    def __init__(self, engine: Any, tokenizer: Any, name: str, adapter: Any = None) -> None:
        super().__init__(tokenizer, name, engine.model_config.try_get_generation_config().get("eos_token_id"))
        self._engine, self._adapter = engine, adapter

    @classmethod
    def open(cls, folder: str, engine: EngineConfig) -> VllmModel:
        """A pretrained model by folder, Hugging Face id or package, or an adapter's folder.

        Raises:
            ModelError: if there is none, vLLM refuses it, or the model under an adapter is not the one that it was
                trained on.
        """
        path = Path(folder).expanduser()
        base = read_base(path)
        pretrained = Pretrained.find(folder if base is None else base.name)
        if base is None:
            return cls(_engine(pretrained, engine, Room()), pretrained.tokenizer(), folder)
        room = Room.of(read_json(path / CONFIG))
        return cls(_engine(pretrained, engine, room), pretrained.tokenizer(), base.name, _request(path))

    @property
    def context(self) -> int:
        """Most tokens of a prompt and what follows it."""
        return self._engine.model_config.max_model_len

    def log_probs(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], batch_tokens: int = 8192
    ) -> list[Tensor]:
        """As :class:`LanguageModel`; vLLM makes the batches."""
        from vllm import SamplingParams

        require_prompts(prompts)
        whole = [[*prompt, *target] for prompt, target in zip(prompts, targets, strict=True)]
        # A request draws at least one token.
        self._require_room(whole, 1)
        outputs = self._ask(
            whole, [SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)] * len(whole)
        )
        columns = zip(prompts, targets, outputs, strict=True)
        return [_chosen(target, output.prompt_logprobs[len(prompt) :]) for prompt, target, output in columns]

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        batch: int = 64,
        memory: list[Any] | None = None,
    ) -> list[Continuation]:
        """As :class:`LanguageModel`. vLLM makes the batches, and remembers prompts by itself."""
        from vllm import SamplingParams

        require_prompts(prompts)
        self._require_room(prompts, sampling.max_tokens)
        shared = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": sorted(self.stops),
            "ignore_eos": True,  # it is among the stops
            "logprobs": 0,
            "detokenize": False,
        }
        outputs = self._ask(prompts, [SamplingParams(seed=seed, **shared) for seed in seeds])
        drawn = [list(output.outputs[0].token_ids) for output in outputs]
        log_q = [_chosen(tokens, one.outputs[0].logprobs).tolist() for tokens, one in zip(drawn, outputs, strict=True)]
        scores = self._scores(prompts, drawn, log_q, sampling)
        return [self.continuation(tokens, row) for tokens, row in zip(drawn, scores, strict=True)]

    def _scores(
        self, prompts: Sequence[Sequence[int]], drawn: list[list[int]], log_q: list[list[float]], sampling: Sampling
    ) -> list[list[tuple[float, float]]]:
        """(log p, log q) of every token."""
        if sampling.exact:
            return [[(value, value) for value in row] for row in log_q]
        if sampling.temperature == 0:  # nothing is drawn, and what vLLM gives is log p
            return [[(value, 0.0) for value in row] for row in log_q]
        log_p = [row.tolist() for row in self.log_probs(prompts, drawn)]
        return [list(zip(p, q, strict=True)) for p, q in zip(log_p, log_q, strict=True)]

    def _ask(self, prompts: Sequence[Sequence[int]], parameters: list[Any]) -> list[Any]:
        if not prompts:
            return []
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return self._engine.generate(requests, parameters, lora_request=self._adapter, use_tqdm=False)

    def _require_room(self, prompts: Sequence[Sequence[int]], more: int) -> None:
        longest = max((len(prompt) for prompt in prompts), default=0)
        if longest + more > self.context:
            raise ModelError(
                f"model {self.name!r}: a prompt of {longest} tokens and {more} more do not fit into the engine's "
                f"{self.context}; raise engine.context, or shorten what is asked"
            )


def _chosen(tokens: Sequence[int], steps: Sequence[Any]) -> Tensor:
    """The log-probability f32[n] of each token in its step."""
    return torch.tensor([step[token].logprob for token, step in zip(tokens, steps, strict=True)])


_engines: OrderedDict[tuple[tuple[Any, ...], Room], Any] = OrderedDict()
_requests: dict[str, Any] = {}
_numbers = itertools.count(1)


def _engine(base: Pretrained, config: EngineConfig, room: Room) -> Any:
    """The engine of a base model in this process, with room for an adapter.

    Raises:
        ModelError: if vLLM refuses the model or its settings.
    """
    wanted = (base.hash, *astuple(config))
    for (settings, has), engine in _engines.items():
        if settings == wanted and has.takes(room):
            _engines.move_to_end((settings, has))
            return engine
    while len(_engines) >= KEPT:
        _, old = _engines.popitem(last=False)
        old.llm_engine.engine_core.shutdown()
    log.info("starting vLLM on %s (%s)", base.name, config.dtype)
    _engines[wanted, room] = _start(base, config, room)
    return _engines[wanted, room]


def _require_devices(config: EngineConfig) -> None:
    here = max(1, torch.cuda.device_count())
    if config.tensor_parallel > here:
        raise ModelError(
            f"engine.tensor_parallel={config.tensor_parallel}: this process has {here} device(s); an actor has "
            "metadata.train.gpus_per_worker of cluster.yaml"
        )


def _start(base: Pretrained, config: EngineConfig, room: Room) -> Any:
    _require_devices(config)
    vllm_environment()
    import vllm

    adapters: dict[str, Any] = {}
    if room.rank:
        adapters = {"enable_lora": True, "max_lora_rank": room.rank, "max_loras": ADAPTERS}
        adapters["lora_target_modules"] = sorted(room.layers)
    # On CPUs vLLM takes this function away from all of the process, and seeds every generator of it.
    set_threads, state = torch.set_num_threads, torch.random.get_rng_state()
    try:
        return vllm.LLM(
            model=str(base.folder),
            tokenizer=str(base.tokenizer_folder),
            skip_tokenizer_init=True,
            dtype=config.dtype,
            max_model_len=config.context,
            kv_cache_memory_bytes=round(config.cache_gb * 2**30),
            # Of this share a device must be free even where the size of the cache is given, and others may be on it.
            gpu_memory_utilization=0.01,
            tensor_parallel_size=config.tensor_parallel,
            enforce_eager=not torch.cuda.is_available(),
            logprobs_mode="processed_logprobs",
            generation_config="auto",
            **adapters,
        )
    except (ValueError, OSError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"model {base.name!r}: vLLM does not start ({reason}); or take engine.kind=torch") from error
    finally:
        torch.set_num_threads = set_threads
        torch.random.set_rng_state(state)


def _request(folder: Path) -> Any:
    """An adapter as a request names it: the same files have the same number in this process."""
    from vllm.lora.request import LoRARequest

    name = hash_files(sorted(folder.glob("adapter_*")))
    if name not in _requests:
        _requests[name] = LoRARequest(name, next(_numbers), str(folder))
    return _requests[name]

"""Causal language models: building small ones, opening and adapting pretrained ones, scoring and sampling in batches.

One class for all: a network of transformers with its tokenizer, which is trained, scores and samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from mobula.cluster.resources import process_device
from mobula.models.adapters import Base, LoraConfig, add_lora, load_adapter, read_base, save_adapter
from mobula.models.frozen import leave_out_frozen
from mobula.models.language_model import Continuation, LanguageModel, Sampling, require_prompts
from mobula.models.pretrained import Pretrained, without_progress

if TYPE_CHECKING:
    from mobula.models.pointer import PointerConfig

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
# What stands alone in a text of words: line ends, and the marks of programs and numbered steps.
_MARKS = Regex(r"\n|[()=,:]")
# A vocabulary up to the first size is sorted whole for a draw; of a larger one so many of the likeliest tokens.
SORTED, LIKELIEST = 4096, 256


@dataclass(frozen=True)
class SmallShape:
    """A small GPT-2 trained from scratch: tied embeddings, learned positions."""

    layers: int = 2
    width: int = 96
    heads: int = 4
    positions: int = 256
    dropout: float = 0.0


class CausalModel(LanguageModel):
    """A network of transformers that continues token ids, with the tokenizer that makes them.

    With a ``base``, the network is that one under an adapter, whose low-rank parts alone are trained and saved.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, name: str, base: Base | None = None) -> None:
        generation = getattr(network, "generation_config", None)  # a pretrained model's
        super().__init__(tokenizer, name, getattr(generation, "eos_token_id", None))
        self.network = network.eval()
        self.base = base

    @classmethod
    def small(cls, tokenizer: Any, shape: SmallShape, seed: int) -> CausalModel:
        """A small one with fresh weights."""
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=shape.positions,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            activation_function="gelu_pytorch_tanh",  # as "gelu_new", in one kernel
            resid_pdrop=shape.dropout,
            embd_pdrop=shape.dropout,
            attn_pdrop=shape.dropout,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(GPT2LMHeadModel(config), tokenizer, "small")

    @classmethod
    def pointer(cls, tokenizer: Any, config: PointerConfig, seed: int) -> CausalModel:
        """A small one that copies, with fresh weights."""
        from mobula.models.pointer import PointerLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(PointerLM(config), tokenizer, "pointer")

    @classmethod
    def adapted(cls, base: str, lora: LoraConfig, seed: int) -> CausalModel:
        """A pretrained one, frozen, with fresh low-rank parts on linear layers.

        Raises:
            ModelError: as :meth:`open`, or if it has no such layers.
        """
        pretrained = Pretrained.find(base)
        network = pretrained.load("AutoModelForCausalLM")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_lora(network, lora=lora)
        leave_out_frozen(network)
        return cls(network, pretrained.tokenizer(), base, Base(base, pretrained.hash))

    @classmethod
    def open(cls, name: str) -> CausalModel:
        """A pretrained one, by folder, Hugging Face id or package, or what :meth:`save` wrote.

        Raises:
            ModelError: if there is none, it is not a causal language model, or the model under an adapter is not the
                one that it was trained on.
        """
        folder = Path(name).expanduser()
        base = read_base(folder)
        pretrained = Pretrained.find(name if base is None else base.name)
        network = pretrained.load("AutoModelForCausalLM")
        if base is not None:
            load_adapter(network, folder)
            leave_out_frozen(network)
        return cls(network, pretrained.tokenizer(), pretrained.name, base)

    def save(self, folder: Path) -> None:
        """Write weights (safetensors), configuration and tokenizer as transformers reads them.

        Of a model under an adapter, the adapter is written as PEFT reads it, with the name and hash of its base.
        """
        if self.base is None:
            with without_progress():
                self.network.save_pretrained(folder)  # type: ignore[operator]
            # A chat template is kept in the tokenizer's configuration: an artifact holds no programs.
            self.tokenizer.save_pretrained(folder, save_jinja_files=False)
            return
        save_adapter(self.network, folder, self.base)

    def placed(self) -> CausalModel:
        """Itself, on the device of this process."""
        self.network.to(process_device())
        return self

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @torch.inference_mode()
    def log_probs(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], batch_tokens: int = 8192
    ) -> list[Tensor]:
        """As :class:`LanguageModel`."""
        require_prompts(prompts)
        whole = [(*prompt, *target) for prompt, target in zip(prompts, targets, strict=True)]
        log_probs: list[Tensor] = [torch.empty(0)] * len(whole)
        for rows in _batches([len(ids) for ids in whole], batch_tokens):
            ids, mask = _padded([whole[row] for row in rows], self.pad, left=False)
            logits = self._logits(ids, mask)
            for i, row in enumerate(rows):
                start, stop = len(prompts[row]), len(whole[row])
                scores = torch.log_softmax(logits[i, start - 1 : stop - 1].float(), -1)
                wanted = ids[i, start:stop].to(scores.device)
                log_probs[row] = scores.gather(-1, wanted.unsqueeze(-1)).squeeze(-1).cpu()
        return log_probs

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        batch: int = 64,
        memory: list[Any] | None = None,
    ) -> list[Continuation]:
        """As :class:`LanguageModel`. Networks with a cache of their own that can be kept have a memory."""
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        continuations: dict[int, Continuation] = {}
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            prefixes = None if memory is None else [memory[row] for row in rows]
            group = self._sample([prompts[row] for row in rows], sampling, [seeds[row] for row in rows], prefixes)
            continuations.update(zip(rows, group, strict=True))
            if memory is not None and prefixes is not None:
                for row, kept in zip(rows, prefixes, strict=True):
                    memory[row] = kept
        return [continuations[row] for row in range(len(prompts))]

    def _sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], memory: list[Any] | None
    ) -> list[Continuation]:
        uniform = torch.stack([_uniform(seed, sampling.max_tokens) for seed in seeds])
        cache, known = self._begin(prompts, memory)
        ids, new = _padded([prompt[n:] for prompt, n in zip(prompts, known, strict=True)], self.pad, left=True)
        old = torch.arange(max(known)) >= max(known) - torch.tensor(known).unsqueeze(1)
        mask = torch.cat([old.long(), new], 1)
        positions = ((mask.cumsum(1) - 1).clamp(min=0))[:, -ids.shape[1] :]
        alive, stops = torch.arange(len(prompts)), torch.tensor(sorted(self.stops))
        sampled: list[list[int]] = [[] for _ in prompts]
        scores: list[list[tuple[float, float]]] = [[] for _ in prompts]
        for step in range(sampling.max_tokens):
            logits = self._logits(ids, mask, positions, cache)[:, -1].float()
            if memory is not None and step == 0 and hasattr(cache, "remembered"):
                memory[:] = cache.remembered(mask.to(self.device))
            drawn, log_q = _draw(logits, sampling, uniform[alive, step].to(logits.device))
            chosen = logits.gather(-1, drawn.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
            tokens = drawn.cpu()
            rows = zip(alive.tolist(), tokens.tolist(), chosen.tolist(), log_q.tolist(), strict=True)
            for row, token, *both in rows:
                sampled[row].append(token)
                scores[row].append((both[0], both[1]))
            going = (~torch.isin(tokens, stops)).nonzero().squeeze(-1)
            if len(going) == 0:
                break
            if len(going) < len(alive):
                cache.batch_select_indices(going.to(self.device))
            alive, ids = alive[going], tokens[going].unsqueeze(1)
            mask = torch.cat([mask[going], torch.ones(len(going), 1, dtype=mask.dtype)], 1)
            positions = positions[going, -1:] + 1
        return [self.continuation(tokens, row) for tokens, row in zip(sampled, scores, strict=True)]

    def _begin(self, prompts: Sequence[Sequence[int]], memory: list[Any] | None) -> tuple[Any, list[int]]:
        """A cache, and how many tokens of each prompt it holds already."""
        if memory is None or not hasattr(self.network, "new_cache"):
            return self._new_cache(), [0] * len(prompts)
        rows = [_fitting(kept, prompt) for kept, prompt in zip(memory, prompts, strict=True)]
        network: Any = self.network
        return network.new_cache(rows), [0 if row is None else len(row.ids) for row in rows]

    def _new_cache(self) -> Any:
        """The network's own, where it needs another than that of transformers."""
        from transformers import DynamicCache

        network: Any = self.network
        return network.new_cache() if hasattr(network, "new_cache") else DynamicCache(config=network.config)

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor | None = None, cache: Any = None) -> Tensor:
        """Logits of all tokens; with a cache, of the last one."""
        device = self.device
        position_ids = None if positions is None else positions.to(device)
        return self.network(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=0 if cache is None else 1,
        ).logits


def word_tokenizer(texts: Iterable[str], markers: Sequence[str] = ()) -> Any:
    """A tokenizer of whole words, marks and line ends, with the vocabulary of ``texts``; other words are unknown.

    ``markers`` come first in the vocabulary, behind padding, end and unknown.
    """
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence([pre_tokenizers.Split(_MARKS, "isolated"), pre_tokenizers.Split(" ", "removed")])
    first = [PAD, EOS, UNKNOWN, *markers]
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)}.difference(first))
    vocabulary = {word: i for i, word in enumerate([*first, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )


def _padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids i64[B, n] and their mask i64[B, n], padded on one side."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, span] = torch.tensor(row, dtype=torch.long)
        mask[i, span] = 1
    return ids, mask


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Rows of similar length together, each batch of at most ``most`` padded tokens (one row at least)."""
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if rows and (len(rows) + 1) * lengths[row] > most:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _fitting(kept: Any, prompt: Sequence[int]) -> Any:
    """What is remembered, if the prompt begins with it and goes on."""
    if kept is None or len(kept.ids) >= len(prompt) or kept.ids.tolist() != list(prompt[: len(kept.ids)]):
        return None
    return kept


def _uniform(seed: int, count: int) -> Tensor:
    """Numbers f64[count] in [0, 1) that the seed alone decides."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token i64[B] per row of logits f32[B, V] by inversion of the cumulative distribution at ``uniform`` f64[B].

    And the logarithm f64[B] of the probability that it was drawn with. The likeliest tokens come first, best first, and
    behind them all others as they stand in the vocabulary.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniform)
    likely = torch.softmax(logits.double() / sampling.temperature, -1)
    first, order = _likeliest(likely, sampling.top_p)
    if sampling.top_p < 1:
        first = first.masked_fill(first.cumsum(-1) - first >= sampling.top_p, 0.0)
    elif first.shape[-1] < likely.shape[-1]:
        first = torch.cat([first, likely.scatter(-1, order, 0.0)], -1)
        order = torch.cat([order, torch.arange(likely.shape[-1], device=order.device).expand_as(likely)], -1)
    cumulative = first.cumsum(-1)
    index = torch.searchsorted(cumulative, (uniform * cumulative[:, -1]).unsqueeze(-1), right=True)
    last = first.shape[-1] - 1 - (first > 0).flip(-1).int().argmax(-1, keepdim=True)  # rounding may lead behind it
    index = index.minimum(last)
    share = first.gather(-1, index).squeeze(-1) / cumulative[:, -1]
    return order.gather(-1, index).squeeze(-1), share.log()


def _likeliest(likely: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities f64[B, n] and tokens i64[B, n], best first: of a large vocabulary a few, but all of the nucleus."""
    count = likely.shape[-1]
    kept = count if count <= SORTED else LIKELIEST
    while kept < count:
        first, order = likely.topk(kept)
        if top_p == 1 or bool((first.sum(-1) >= top_p).all()):
            return first, order
        kept *= 8
    return likely.sort(stable=True, dim=-1, descending=True)

"""A small causal language model that can copy: for agents that read passages and are trained from scratch.

A decoder with rotary positions and, beside that, three things without which a network of this size does not learn to
read: a causal depthwise convolution added to queries, keys and values; a copy head, which mixes the vocabulary's
distribution with attention over earlier tokens (See et al. 2017, arXiv 1704.04368); and flags that say whether a token
occurs in the question or in the current sub-query, computed from what stands before it alone.

It is a model of transformers, registered under :data:`MODEL_TYPE`, so that it is saved, opened, scored and sampled like
any other. Its logits are log-probabilities.

Shapes: B rows, M new tokens, N tokens in all, D width, H heads, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

MODEL_TYPE = "mobula_pointer"
KERNEL = 8
FLOOR = 1e-4  # share of a uniform distribution in every prediction: log p stays finite and has a gradient
INITIAL = 0.05
ROOM = 64  # tokens that a cache's buffer has room for at its end
FAR = -1e9


class PointerConfig(PretrainedConfig):
    """Sizes, and the tokens that flags refer to.

    The question ends at the first ``turn_id``; a sub-query stands between ``query_id`` and ``eos_token_id``. Tokens
    below ``words_from`` are markers, which never count as occurring.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        vocab_size: int = 8,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        query_id: int = 3,
        turn_id: int = 4,
        words_from: int = 8,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.width, self.layers, self.heads = width, layers, heads
        self.query_id, self.turn_id, self.words_from = query_id, turn_id, words_from
        super().__init__(**others)

    @classmethod
    def of(cls, tokenizer: Any, query: str, turn: str, last_marker: str, **sizes: int) -> PointerConfig:
        """The config of a tokenizer's words, in which those up to ``last_marker`` are markers."""
        query_id, turn_id, last = tokenizer.convert_tokens_to_ids([query, turn, last_marker])
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        markers = {"query_id": query_id, "turn_id": turn_id, "words_from": last + 1}
        return cls(vocab_size=len(tokenizer), **sizes, **markers, **ends)


@dataclass(frozen=True)
class Remembered:
    """What a cache holds of one row's first tokens: their ids i64[N], parts of layers [..., N, C], tails [K - 1, C]."""

    ids: Tensor
    parts: dict[tuple[int, str], Tensor]
    tails: dict[int, Tensor]


@dataclass
class PointerCache:
    """What of earlier tokens later ones need: ids [B, N], parts of the layers [B, ..., N, C], tails for convolutions.

    Parts lie in buffers with room for more tokens, so that a token does not copy all that came before it.
    """

    ids: Tensor | None = None
    length: int = 0
    parts: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    tails: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[Remembered | None]) -> PointerCache:
        """A cache in which each row begins with what is remembered of it, padded on the left; None: with nothing."""
        known = [row for row in rows if row is not None]
        cache = cls()
        if not known:
            return cache
        cache.length = max(len(row.ids) for row in known)
        cache.ids = known[0].ids.new_zeros(len(rows), cache.length)
        for name, part in known[0].parts.items():
            cache.parts[name] = part.new_zeros(len(rows), *part.shape[:-2], cache.length + ROOM, part.shape[-1])
        for layer, tail in known[0].tails.items():
            cache.tails[layer] = tail.new_zeros(len(rows), *tail.shape)
        for i, row in enumerate(rows):
            if row is not None:
                start = cache.length - len(row.ids)
                cache.ids[i, start:] = row.ids
                for name, part in row.parts.items():
                    cache.parts[name][i, ..., start : cache.length, :] = part
                for layer, tail in row.tails.items():
                    cache.tails[layer][i] = tail
        return cache

    def remembered(self, mask: Tensor) -> list[Remembered]:
        """What it holds of each row, without padding; ``mask`` i64[B, N]."""
        assert self.ids is not None
        rows = []
        for i, real in enumerate(mask.bool()):
            parts = {name: part[i, ..., : self.length, :][..., real, :] for name, part in self.parts.items()}
            tails = {layer: tail[i].clone() for layer, tail in self.tails.items()}
            rows.append(Remembered(self.ids[i, real], parts, tails))
        return rows

    def batch_select_indices(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.ids = None if self.ids is None else self.ids[rows]
        self.parts = {name: part[rows] for name, part in self.parts.items()}
        self.tails = {layer: tail[rows] for layer, tail in self.tails.items()}

    def append(self, ids: Tensor) -> Tensor:
        """All ids, new ones behind those before them."""
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], 1)
        self.length = self.ids.shape[1]
        return self.ids

    def extended(self, layer: int, name: str, new: Tensor) -> Tensor:
        """A part with what is new behind what was there; tokens are its last dimension but one."""
        before = self.length - new.shape[-2]
        part = self.parts.get((layer, name))
        if part is None or part.shape[-2] < self.length:
            room = new.new_empty(*new.shape[:-2], self.length + ROOM, new.shape[-1])
            if part is not None:
                room[..., :before, :] = part[..., :before, :]
            part = self.parts[layer, name] = room
        part[..., before : self.length, :] = new
        return part[..., : self.length, :]

    def widened(self, layer: int, new: Tensor, real: Tensor) -> Tensor:
        """A layer's new states [B, M, C] behind the ``KERNEL - 1`` before them, zeros at the start.

        Where padding stands on the left (``real`` [B, M, 1] is 0), what is before moves up to the first real state.
        """
        before = self.tails.get(layer)
        if before is None:
            before = new.new_zeros(new.shape[0], KERNEL - 1, new.shape[2])
        whole = torch.cat([before, new], 1)
        if new.shape[1] > 1:
            padding = new.shape[1] - real.sum(1, dtype=torch.long)
            index = (padding + torch.arange(KERNEL - 1, device=new.device)).unsqueeze(-1).expand_as(before)
            whole[:, : KERNEL - 1] = 0
            whole.scatter_(1, index, before)
        self.tails[layer] = whole[:, 1 - KERNEL :]
        return whole


class Layer(nn.Module):
    """Attention and feed-forward network, each after a normalisation."""

    def __init__(self, config: PointerConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.conv = nn.Conv1d(3 * width, 3 * width, KERNEL, groups=3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self, x: Tensor, real: Tensor, turns: tuple[Tensor, Tensor], bias: Tensor, cache: Any, i: int
    ) -> Tensor:
        """States [B, M, D]; ``real`` [B, M, 1] is 0 for padding, ``bias`` [B, 1, M, N] hides what may not be read."""
        qkv = self.qkv(self.before(x)) * real
        whole = F.pad(qkv, (0, 0, KERNEL - 1, 0)) if cache is None else cache.widened(i, qkv, real)
        qkv = qkv + self._convolved(whole)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        q, k = _rotated(q, turns), _rotated(k, turns)
        if cache is not None:
            k, v = cache.extended(i, "k", k), cache.extended(i, "v", v)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.after(x)), approximate="tanh"))

    def _convolved(self, whole: Tensor) -> Tensor:
        """The convolution of states [B, KERNEL - 1 + M, C]; of a single token it is a mere product."""
        if whole.shape[1] == KERNEL:
            return (whole * self.conv.weight[:, 0].T).sum(1, keepdim=True)
        return self.conv(whole.transpose(1, 2)).transpose(1, 2)


class PointerLM(PreTrainedModel):
    """The network; see the module's docstring."""

    config_class = PointerConfig
    config: PointerConfig

    def __init__(self, config: PointerConfig) -> None:
        super().__init__(config)
        width = config.width
        self.words = nn.Embedding(config.vocab_size, width)
        self.flags = nn.Parameter(torch.empty(2, width))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.last = nn.LayerNorm(width)
        self.asking, self.offering = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PointerLM):
            nn.init.normal_(module.flags, std=INITIAL)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=INITIAL)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            nn.init.normal_(module.weight, std=1 / math.sqrt(KERNEL))
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def new_cache(self, rows: Sequence[Remembered | None] = ()) -> PointerCache:
        """For tokens that come one after another, behind what is remembered of each row."""
        return PointerCache.of(rows)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PointerCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        learned: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits f32[B, M, V], of the last ``logits_to_keep`` tokens if that is not 0.

        With ``learned`` bool[B, M - 1], the log-probabilities f32[S] of these tokens (the first is none of them) in
        place of logits, see :meth:`learned_log_probs`.
        ``attention_mask`` i64[B, N] and ids of earlier tokens belong together as transformers has it.
        """
        cache = past_key_values
        ids = input_ids if cache is None else cache.append(input_ids)
        new, total = input_ids.shape[1], ids.shape[1]
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        if position_ids is None:
            position_ids = torch.arange(total, device=ids.device)[None, total - new :]
        real = mask[:, total - new :, None].to(self.flags.dtype)
        hidden = self._hidden(mask, new)
        turns = _turns(position_ids, self.config.width // self.config.heads)
        x = self.words(input_ids) + occurring(ids, mask, new, self.config).to(real.dtype) @ self.flags
        for i, layer in enumerate(self.layers):
            x = layer(x, real, turns, hidden.unsqueeze(1), cache, i)
        x = self.last(x)
        offered = self.offering(x)
        if cache is not None:
            offered = cache.extended(len(self.layers), "offered", offered)
        if learned is not None:
            scored = self.learned_log_probs(x[:, :-1], offered, hidden[:, :-1], ids, learned)
            return CausalLMOutputWithPast(logits=scored, past_key_values=None)
        x, hidden = x[:, -logits_to_keep:], hidden[:, -logits_to_keep:]
        return CausalLMOutputWithPast(logits=self._logits(x, offered, hidden, ids), past_key_values=None)

    def _hidden(self, mask: Tensor, new: int) -> Tensor:
        """f32[B, M, N]: 0 where a new token may look, very negative at padding and at what comes later."""
        total = mask.shape[1]
        positions = torch.arange(total, device=mask.device)
        seen = (positions <= positions[total - new :, None]) & mask[:, None].bool()
        return torch.where(seen, 0.0, FAR).to(self.flags.dtype)

    def _logits(self, x: Tensor, offered: Tensor, hidden: Tensor, ids: Tensor) -> Tensor:
        size = self.config.vocab_size
        # Half precision has too few digits for what is a logarithm in the end.
        precise = torch.promote_types(x.dtype, torch.float32)
        generated = torch.softmax(x @ self.words.weight.T, -1, dtype=precise)
        scores = self.asking(x) @ offered.transpose(1, 2) / math.sqrt(x.shape[-1])
        copied = torch.softmax(scores + hidden, -1, dtype=precise)
        index = ids.unsqueeze(1).expand(-1, x.shape[1], -1)
        gate = torch.sigmoid(self.gate(x)).to(precise)
        mixed = (gate * generated).scatter_add(-1, index, (1 - gate) * copied)
        return torch.log((1 - FLOOR) * mixed + FLOOR / size)

    def learned_log_probs(self, x: Tensor, offered: Tensor, hidden: Tensor, ids: Tensor, learned: Tensor) -> Tensor:
        """log p f32[S] of the tokens at ``learned`` bool[B, N - 1] from the states x f[B, N - 1, d] before them.

        As :meth:`_logits`, of the wanted tokens alone: no table of the whole vocabulary for every position.
        """
        targets, rows = ids[:, 1:][learned], learned.nonzero()[:, 0]
        scores = self.asking(x) @ offered.transpose(1, 2) / math.sqrt(x.shape[-1]) + hidden
        x, scores = x[learned], scores[learned]
        precise = torch.promote_types(x.dtype, torch.float32)
        generated = -F.cross_entropy((x @ self.words.weight.T).to(precise), targets, reduction="none")
        copied = torch.softmax(scores, -1, dtype=precise) * (ids[rows] == targets[:, None])
        gate = torch.sigmoid(self.gate(x)).to(precise).squeeze(-1)
        mixed = gate * generated.exp() + (1 - gate) * copied.sum(-1)
        return torch.log((1 - FLOOR) * mixed + FLOOR / self.config.vocab_size)


def occurring(ids: Tensor, mask: Tensor, new: int, config: PointerConfig) -> Tensor:
    """Flags bool[B, M, 2] of the last M tokens: does it occur earlier in the current sub-query, and in the question?"""
    words = (ids >= config.words_from) & mask.bool()
    number = (ids == config.query_id).cumsum(1)
    ends = (ids == config.eos_token_id).cumsum(1)
    # Between a marker and the end of its turn: no turn has ended since the marker.
    at_marker = torch.where(ids == config.query_id, ends, 0).cummax(1).values
    writing = (number > 0) & (ends == at_marker)
    in_question = ((ids == config.turn_id).cumsum(1) == 0) & words
    total = ids.shape[1]
    positions = torch.arange(total, device=ids.device)
    same = (ids[:, total - new :, None] == ids[:, None]) & words[:, total - new :, None]
    same &= positions < positions[total - new :, None]
    current = (number[:, total - new :, None] == number[:, None]) & (writing & words)[:, None]
    return torch.stack([(same & current).any(-1), (same & in_question[:, None]).any(-1)], -1)


def _turns(positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B or 1, 1, M, width / 2] of rotary positions (Su et al. 2021, arXiv 2104.09864)."""
    rates = 10_000 ** (-torch.arange(0, width, 2, device=positions.device).float() / width)
    angles = positions[:, None, :, None].float() * rates
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = (part.to(x.dtype) for part in turns)
    one, other = x.chunk(2, -1)
    return torch.cat([one * cosine - other * sine, other * cosine + one * sine], -1)


AutoConfig.register(MODEL_TYPE, PointerConfig)
AutoModelForCausalLM.register(PointerConfig, PointerLM)

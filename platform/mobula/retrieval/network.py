"""The docid network: one class for masked diffusion and for its autoregressive twin.

A transformer reads the query once into a :class:`Memory` (keys and values per layer) and then maps partially
masked codes to logits over the codes of every level. Both paradigms share every weight shape; they differ in
the attention mask inside the docid, in the input shift and in the objective. The query tower is trained from
scratch (:class:`TokenTower`) or stands on a pretrained sentence encoder (:class:`StateTower`, ours).

Shapes: B queries, G hypotheses a query, L levels, K codes (the largest level), n query positions, h heads,
d width, D size of the sentence embedding. A code of -1 is [MASK].
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobula.models.encoders import TransformerEncoder

T = TypeVar("T")
MASK = -1
NetworkKind = Literal["diffusion", "autoregressive"]  # attention inside the docid is full, or causal
KeysValues = tuple[Tensor, Tensor]
# What a tower makes of a query: positions [B, n, d], their mask [B, n], pooled [B, d], centred embedding [B, D].
Reading = tuple[Tensor, Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class NetworkShape:
    """What fixes every weight's shape; stored with the weights."""

    paradigm: NetworkKind
    sizes: tuple[int, ...]
    width: int
    layers: int
    heads: int
    dropout: float
    tower: Literal["tokens", "states", "encoder"]
    query_len: int
    input_dim: int
    pool_query: bool = True
    query_sees_docid: bool = False
    codeword_dim: int = 0
    token_embed: str = "wordllama"
    encoder: str = ""  # of tower "encoder": its name, and the hash of its files
    encoder_hash: str = ""


@dataclass
class Memory:
    """Encoded queries: keys and values f32[B, h, n, d/h] per layer, mask bool[B, n], pooled f32[B, d].

    ``vector`` f32[B, D] is the centred query embedding the codeword prior compares with; ``embedded``
    f32[B, n, d] is kept only where queries attend to the docid, since then nothing else can be reused.
    """

    mask: Tensor
    pooled: Tensor
    keys_values: tuple[KeysValues, ...] = ()
    vector: Tensor | None = None
    embedded: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of queries."""
        return self.mask.shape[0]

    def rows(self, index: Tensor) -> Memory:
        """The memory of the queries at ``index`` i64[R]."""
        return Memory(
            self.mask[index],
            self.pooled[index],
            tuple((k[index], v[index]) for k, v in self.keys_values),
            None if self.vector is None else self.vector[index],
            None if self.embedded is None else self.embedded[index],
        )

    @classmethod
    def concat(cls, parts: Sequence[Memory]) -> Memory:
        """The memory of all queries of ``parts``, in order."""
        first = parts[0]
        layers = range(len(first.keys_values))
        return cls(
            torch.cat([part.mask for part in parts]),
            torch.cat([part.pooled for part in parts]),
            tuple(tuple(torch.cat([part.keys_values[i][j] for part in parts]) for j in (0, 1)) for i in layers),  # type: ignore[misc]
            None if first.vector is None else torch.cat([part.vector for part in parts if part.vector is not None]),
            None
            if first.embedded is None
            else torch.cat([part.embedded for part in parts if part.embedded is not None]),
        )


@dataclass
class Cache:
    """Autoregressive state of G hypotheses a query after ``position`` codes: own keys and values
    f32[B, G, h, t, d/h] per layer, and the residual f32[B, G, D] of the codeword prior."""

    keys_values: list[KeysValues | None]
    position: int
    width: int
    residual: Tensor | None = None

    def reorder(self, parents: Tensor) -> Cache:
        """The state of hypotheses that continue ``parents`` i64[B, G'] of the present ones."""
        batch = torch.arange(parents.shape[0], device=parents.device).unsqueeze(1)
        kept = [None if kv is None else (kv[0][batch, parents], kv[1][batch, parents]) for kv in self.keys_values]
        residual = None if self.residual is None else self.residual[batch, parents]
        return Cache(kept, self.position, parents.shape[1], residual)


class Layer(nn.Module):
    """Pre-norm transformer layer whose positions attend to a context and, within each hypothesis, to each other."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [..., h, t, d/h], of x [..., t, d]."""
        parts = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.unbind(-3)
        return q.transpose(-2, -3), k.transpose(-2, -3), v.transpose(-2, -3)

    def project_context(self, x: Tensor) -> KeysValues:
        """Keys and values, as :meth:`project` gives them, of positions x [..., t, d] that attend to nothing."""
        width = x.shape[-1]
        parts = F.linear(self.attention_norm(x), self.qkv.weight[width:], self.qkv.bias[width:])
        k, v = parts.unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return k.transpose(-2, -3), v.transpose(-2, -3)

    def encode(self, x: Tensor, mask: Tensor) -> tuple[Tensor, KeysValues]:
        """Self-attention of the query positions x [B, n, d] alone; also their keys and values."""
        q, k, v = self.project(x)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self._finish(x, attended), (k, v)

    def forward(
        self,
        x: Tensor,
        context: KeysValues,
        mask: Tensor,
        own_mask: Tensor | None,
        past: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """x [B, G, t, d] attends to the context [B, h, n, ·] and to ``past`` and itself under ``own_mask`` [t, t']."""
        groups, steps = x.shape[1:3]
        q, k, v = self.project(x)
        if past is not None:
            k, v = torch.cat([past[0], k], -2), torch.cat([past[1], v], -2)
        scale = q.shape[-1] ** -0.5
        # The context is shared by a query's hypotheses: fold them into one long list of positions.
        folded = q.transpose(1, 2).flatten(2, 3)
        to_context = (folded * scale) @ context[0].transpose(-1, -2)
        to_context = to_context.masked_fill(~mask[:, None, None, :], float("-inf"))
        to_context = to_context.unflatten(2, (groups, steps)).transpose(1, 2)
        to_own = (q * scale) @ k.transpose(-1, -2)
        if own_mask is not None:
            to_own = to_own.masked_fill(~own_mask, float("-inf"))
        weights = torch.softmax(torch.cat([to_context, to_own], -1), -1)
        n = context[0].shape[-2]
        from_context = weights[..., :n].transpose(1, 2).flatten(2, 3) @ context[1]
        attended = from_context.unflatten(2, (groups, steps)).transpose(1, 2) + weights[..., n:] @ v
        return self._finish(x, attended), (k, v)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(self.out(attended.transpose(-2, -3).flatten(-2)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class TokenTower(nn.Module):
    """Query positions from token ids: a frozen (or random) embedding table, a projection, learned positions."""

    def __init__(self, shape: NetworkShape, table: Tensor) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", table, persistent=False)
        self.project = nn.Linear(shape.input_dim, shape.width)
        self.positions = nn.Parameter(torch.randn(shape.query_len, shape.width) * 0.02)

    def forward(self, query: dict[str, Tensor]) -> Reading:
        """Query {ids i64[B, n], pad id 0} -> positions [B, n, d], mask [B, n], pooled [B, d], no vector."""
        ids = query["ids"]
        mask = ids != 0
        projected = self.project(self.table[ids])
        pooled = (projected * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return projected + self.positions[: ids.shape[1]], mask, pooled, None


class StateTower(nn.Module):
    """Query positions from the states of a pretrained sentence encoder, which already carry position."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.project = nn.Linear(shape.input_dim, shape.width)
        self.norm = nn.LayerNorm(shape.width)
        self.pool = nn.Linear(shape.input_dim, shape.width)

    def forward(self, query: dict[str, Tensor]) -> Reading:
        """Query {states f[B, n, D], mask bool[B, n], vector f32[B, D]} -> as :meth:`TokenTower.forward`.

        Unit vectors have coordinates of about 1/sqrt(D); scaling brings them to the size of a layer's input.
        """
        scale = query["vector"].shape[-1] ** 0.5
        states = self.norm(self.project(query["states"].to(self.project.weight.dtype)))
        return states, query["mask"], self.pool(query["vector"] * scale), query["vector"].float()


class EncoderTower(nn.Module):
    """Query positions from a sentence encoder that is trained with the rest, read as stored states are.

    ``mean`` f32[D] is what the docid space subtracts from embeddings.
    """

    def __init__(self, shape: NetworkShape, encoder: TransformerEncoder, mean: Tensor) -> None:
        super().__init__()
        self.network = encoder.module.requires_grad_(True)
        self.head = encoder.head
        self.register_buffer("mean", mean)
        self.read = StateTower(shape)
        pooler = getattr(self.network, "pooler", None)
        if pooler is not None:
            # BERT's own pooling, of which sentence encoders make no use.
            pooler.requires_grad_(False)

    def forward(self, query: dict[str, Tensor]) -> Reading:
        """Query {ids i64[B, n], mask bool[B, n]} -> as :meth:`StateTower.forward`."""
        mask = query["mask"]
        states = self.network(input_ids=query["ids"], attention_mask=mask.long()).last_hidden_state
        vector = self.head(states, mask).float() - self.mean
        return self.read({"states": states, "mask": mask, "vector": vector})


class LearnedCodes(nn.Module):
    """Input rows and output rows of codes that mean nothing by themselves: one of each per (level, code)."""

    def __init__(self, levels: int, codes: int, width: int, zero_output: bool) -> None:
        super().__init__()
        self.codes = codes
        self.input = nn.Parameter(torch.randn(levels * codes, width) * 0.02)
        spread = 0.0 if zero_output else width**-0.5
        self.output = nn.Parameter(torch.randn(levels, codes, width) * spread)

    def embed(self, z: Tensor, levels: Tensor) -> Tensor:
        """Rows [..., l, d] for codes z [..., l] (at least 0) that stand at ``levels`` [l]."""
        return F.embedding(z + levels * self.codes, self.input)

    def score(self, hidden: Tensor, levels: slice) -> Tensor:
        """Logits [R, l, K] of hidden [R, l, d]: the softmax at a level sees only that level's codes."""
        return (hidden.transpose(0, 1) @ self.output[levels].transpose(-1, -2)).transpose(0, 1)


class TokenCodes(nn.Module):
    """Codes that are tokens: a frozen table seen through trained projections, so new tokens need no training."""

    def __init__(self, table: Tensor, width: int) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", table, persistent=False)
        self.project_in = nn.Linear(table.shape[1], width)
        self.project_out = nn.Linear(table.shape[1], width)

    def embed(self, z: Tensor, levels: Tensor) -> Tensor:
        """As :meth:`LearnedCodes.embed`; a token means the same at every level."""
        return self.project_in(self.table[z])

    def score(self, hidden: Tensor, levels: slice) -> Tensor:
        """As :meth:`LearnedCodes.score`."""
        return (hidden * hidden.shape[-1] ** -0.5) @ self.project_out(self.table).T

    def grown(self, vectors: Tensor) -> TokenCodes:
        """The same projections over further tokens with vectors f32[m, ·]."""
        codes = copy.copy(self)
        codes._buffers = {**self._buffers, "table": torch.cat([self.table, vectors.to(self.table)])}
        return codes


class CodewordPrior(nn.Module):
    """Logits from the quantiser itself (ours): what asymmetric distance computation knows, given the visible codes.

    The quantiser reconstructs a document as the sum of one codeword v[l, c_l] per level. With r the query vector
    minus the codewords already visible, level l gets a_l (2 r.v[l, k] - |v[l, k]|^2): the part of -|q - e|^2 that
    this level decides. A trained map refines the query vector. At the start the rest of the network adds nothing,
    so an untrained model ranks documents as the codes' own distance does, and training starts from there.
    """

    def __init__(self, codewords: Tensor, sharpness: float) -> None:
        super().__init__()
        levels, _, dim = codewords.shape
        self.codewords: Tensor
        self.squares: Tensor
        self.register_buffer("codewords", codewords)
        self.register_buffer("squares", codewords.square().sum(-1))
        self.log_sharpness = nn.Parameter(torch.full((levels,), sharpness).log())
        self.refine = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.refine.weight)

    def query(self, vector: Tensor) -> Tensor:
        """The refined query vector [B, D]."""
        return vector + self.refine(vector)

    def words(self, z: Tensor, levels: Tensor) -> Tensor:
        """Codewords [..., l, D] of codes z [..., l]; a masked position contributes nothing."""
        codewords = self.codewords[levels, z.clamp(min=0)]
        return codewords * (z >= 0).unsqueeze(-1)

    def score(self, residual: Tensor, levels: slice) -> Tensor:
        """Logits [R, l, K] for residuals [R, l, D]."""
        products = (residual.transpose(0, 1) @ self.codewords[levels].transpose(-1, -2)).transpose(0, 1)
        return self.log_sharpness[levels].exp()[:, None] * (2 * products - self.squares[levels])


class DocidModel(nn.Module, ABC):
    """What decoding and training see of a network: logits over the codes of every level for a partial docid."""

    paradigm: NetworkKind
    sizes: Tensor
    impossible: Tensor
    index: Tensor
    shape: Any  # a dataclass that fixes every weight's shape, stored beside the weights
    # Diffusion models have `unconditional`, autoregressive ones `start` and `step`; see DocidTransformer for each.
    unconditional: Callable[..., Any]
    start: Callable[..., Any]
    step: Callable[..., Any]

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.shape, self.paradigm = shape, shape.paradigm
        self.causal = shape.paradigm == "autoregressive"
        self.levels = len(shape.sizes)
        self.register_buffer("index", torch.arange(self.levels), persistent=False)
        self._size(torch.tensor(shape.sizes))

    def _size(self, sizes: Tensor) -> None:
        """Take sizes i64[L] for those of the levels."""
        self.width, self.uneven = int(sizes.max()), len(set(sizes.tolist())) > 1
        self.register_buffer("sizes", sizes, persistent=False)
        impossible = torch.arange(self.width, device=sizes.device) >= sizes[:, None]
        self.register_buffer("impossible", impossible, persistent=False)

    def forward(self, query: dict[str, Tensor], z: Tensor) -> Tensor:
        """Logits f32[B, L, K] for queries and codes z i64[B, L] (training)."""
        return self.logits(self.memory(query), z)

    @abstractmethod
    def memory(self, query: dict[str, Tensor]) -> Memory:
        """Encode B queries once; every later call reuses the result exactly."""

    @abstractmethod
    def logits(self, memory: Memory, z: Tensor) -> Tensor:
        """Logits [B, L, K] for z i64[B, L], or [B, G, L, K] for z i64[B, G, L].

        Autoregressive: teacher-forced, level l sees the codes before it alone. Codes outside a level are -inf.
        """


class DocidTransformer(DocidModel):
    """The network of ours, trained from scratch over a query tower."""

    def __init__(
        self,
        shape: NetworkShape,
        *,
        table: Tensor | None = None,
        codewords: Tensor | None = None,
        code_table: Tensor | None = None,
        sharpness: float = 40.0,
        tower: nn.Module | None = None,
    ) -> None:
        """``table`` f32[V, input_dim] embeds query tokens; ``codewords`` f32[L, K, D] switch the codeword prior on;
        ``code_table`` f32[K, ·] embeds codes that are tokens; ``tower`` is the :class:`EncoderTower`, if any."""
        super().__init__(shape)
        if shape.tower == "encoder":
            self.tower = required(tower)
        else:
            self.tower = StateTower(shape) if shape.tower == "states" else TokenTower(shape, required(table))
        self.layers = nn.ModuleList(Layer(shape.width, shape.heads, shape.dropout) for _ in range(shape.layers))
        self.codes: LearnedCodes | TokenCodes
        if code_table is None:
            self.codes = LearnedCodes(self.levels, self.width, shape.width, zero_output=codewords is not None)
        else:
            self.codes = TokenCodes(code_table, shape.width)
        self.special = nn.Parameter(torch.randn(shape.width) * 0.02)  # [MASK], or [BOS] for the twin
        self.positions = nn.Parameter(torch.randn(self.levels, shape.width) * 0.02)
        self.norm = nn.LayerNorm(shape.width)
        self.prior = None if codewords is None else CodewordPrior(codewords, sharpness)

    @property
    def stack(self) -> list[Layer]:
        """The layers, typed."""
        return list(self.layers)  # type: ignore[arg-type]

    def grown(self, vectors: Tensor, sizes: Sequence[int]) -> DocidTransformer:
        """The same network over levels of these sizes, for codes that are tokens, with further ones' vectors f32[m, ·].

        Every weight is shared; nothing is trained.

        Raises:
            ValueError: if the codes are not tokens.
        """
        if not isinstance(self.codes, TokenCodes):
            raise ValueError("codes that are not tokens cannot be added without training")
        network = copy.copy(self)
        network._buffers = dict(self._buffers)
        network._modules = {**self._modules, "codes": self.codes.grown(vectors)}
        network._size(torch.tensor(list(sizes), device=self.get_buffer("sizes").device))
        return network

    def memory(self, query: dict[str, Tensor]) -> Memory:
        """As :meth:`DocidModel.memory`."""
        return self._remember(*self.tower(query))

    def unconditional(self, memory: Memory) -> Memory:
        """The memory with the query masked out, for classifier-free guidance.

        One position stays visible, with zero content, so that attention has something to normalise over.
        """
        mask = torch.zeros_like(memory.mask)
        mask[:, 0] = True
        emptied = tuple((torch.zeros_like(k), torch.zeros_like(v)) for k, v in memory.keys_values)
        vector = None if memory.vector is None else torch.zeros_like(memory.vector)
        embedded = None if memory.embedded is None else torch.zeros_like(memory.embedded)
        return Memory(mask, torch.zeros_like(memory.pooled), emptied, vector, embedded)

    def logits(self, memory: Memory, z: Tensor) -> Tensor:
        """As :meth:`DocidModel.logits`."""
        grouped = z.dim() == 3
        codes = z if grouped else z.unsqueeze(1)
        scores = self.codes.score(self.hidden(memory, codes).flatten(0, 1), slice(None))
        if self.prior is not None:
            scores = scores + self.prior.score(self._residuals(memory, codes), slice(None))
        scores = self._possible(scores, slice(None)).unflatten(0, codes.shape[:2])
        return scores if grouped else scores.squeeze(1)

    def hidden(self, memory: Memory, codes: Tensor) -> Tensor:
        """What ``self.codes`` scores, [B, G, L, d], for codes i64[B, G, L]."""
        return self.norm(self._docid_states(memory, self._docid_inputs(memory, codes)))

    def start(self, memory: Memory, width: int = 1) -> Cache:
        """State of ``width`` empty hypotheses for each query (autoregressive).

        They are all equal: a beam starts with one and widens by :meth:`Cache.reorder` after the first step.
        """
        residual = None
        if self.prior is not None:
            residual = self.prior.query(required(memory.vector)).unsqueeze(1).expand(-1, width, -1)
        return Cache([None] * len(self.stack), 0, width, residual)

    def step(self, memory: Memory, cache: Cache, previous: Tensor | None) -> tuple[Tensor, Cache]:
        """Logits [B, G, K] of the next level after ``previous`` i64[B, G] (None at the first), and the new state."""
        level = cache.position
        here = slice(level, level + 1)
        residual = cache.residual
        if previous is None:
            x = self.special.expand(memory.size, cache.width, 1, -1)
        else:
            before = self.index[level - 1 : level]
            x = self.codes.embed(previous.unsqueeze(-1), before)
            if self.prior is not None:
                residual = required(residual) - self.prior.words(previous.unsqueeze(-1), before).squeeze(-2)
        x = x + self.positions[here] + self._pooled(memory)
        kept: list[KeysValues | None] = []
        for layer, context, past in zip(self.stack, memory.keys_values, cache.keys_values, strict=True):
            x, keys_values = layer(x, context, memory.mask, None, past)
            kept.append(keys_values)
        scores = self.codes.score(self.norm(x).flatten(0, 1), here)
        if self.prior is not None:
            scores = scores + self.prior.score(required(residual).reshape(-1, 1, self.prior.codewords.shape[-1]), here)
        scores = self._possible(scores, here).squeeze(1).unflatten(0, (memory.size, cache.width))
        return scores, Cache(kept, level + 1, cache.width, residual)

    def _possible(self, scores: Tensor, levels: slice) -> Tensor:
        """Scores with -inf for codes outside a level, which there are only where levels differ in size."""
        return scores.masked_fill(self.impossible[levels], float("-inf")) if self.uneven else scores

    def _remember(self, x: Tensor, mask: Tensor, pooled: Tensor, vector: Tensor | None) -> Memory:
        if self.shape.query_sees_docid and not self.causal:
            return Memory(mask, pooled, vector=vector, embedded=x)
        keys_values = []
        for layer in self.stack:
            if self.shape.tower != "tokens" and not self.shape.query_sees_docid:
                # The encoder has done the reading: layers look at its states, which no layer changes.
                keys_values.append(layer.project_context(x))
            else:
                x, read = layer.encode(x, mask)
                keys_values.append(read)
        return Memory(mask, pooled, tuple(keys_values), vector)

    def _pooled(self, memory: Memory) -> Tensor | float:
        return memory.pooled[:, None, None, :] if self.shape.pool_query else 0.0

    def _docid_inputs(self, memory: Memory, codes: Tensor) -> Tensor:
        """Input rows [B, G, L, d]; the twin's are shifted right by one behind [BOS]."""
        rows = self.codes.embed(codes.clamp(min=0), self.index)
        if self.causal:
            first = self.special.expand(*codes.shape[:2], 1, -1)
            rows = torch.cat([first, rows[:, :, :-1]], 2)
        else:
            rows = torch.where((codes >= 0).unsqueeze(-1), rows, self.special)
        return rows + self.positions + self._pooled(memory)

    def _docid_states(self, memory: Memory, x: Tensor) -> Tensor:
        if memory.embedded is not None:
            return self._joint_states(memory, x)
        own_mask = (self.index[:, None] >= self.index) if self.causal else None
        for layer, context in zip(self.stack, memory.keys_values, strict=True):
            x, _ = layer(x, context, memory.mask, own_mask)
        return x

    def _joint_states(self, memory: Memory, x: Tensor) -> Tensor:
        """Full attention over [query ; docid], nothing reusable between steps (``query_sees_docid``).

        Diffusion only: the twin's query never sees the docid, so there the layers read it once (:meth:`_remember`).
        """
        batch, groups = x.shape[:2]
        embedded = required(memory.embedded)
        n = embedded.shape[1]
        query = embedded.unsqueeze(1).expand(-1, groups, -1, -1)
        joint = torch.cat([query, x], 2).flatten(0, 1)
        mask = F.pad(memory.mask, (0, self.levels), value=True).repeat_interleave(groups, 0)[:, None, None, :]
        for layer in self.stack:
            q, k, v = layer.project(joint)
            joint = layer._finish(joint, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        return joint[:, n:].unflatten(0, (batch, groups))

    def _residuals(self, memory: Memory, codes: Tensor) -> Tensor:
        """Query vector minus the codewords each level may see, [B*G, L, D]."""
        prior = required(self.prior)
        words = prior.words(codes, self.index)
        # A level's own codeword is excluded: its logits must not depend on its own code.
        seen = (words.cumsum(2) if self.causal else words.sum(2, keepdim=True)) - words
        query = prior.query(required(memory.vector))
        return (query[:, None, None, :] - seen).flatten(0, 1)


def scale_rate(parameters: Iterable[Tensor], share: float) -> None:
    """Let the training loop give ``parameters`` this share of the learning rate."""
    for parameter in parameters:
        parameter.lr_scale = share  # type: ignore[attr-defined]


def required(value: T | None) -> T:
    """``value``, which a network has that was built for the call."""
    if value is None:
        raise ValueError("this network was built without a part that the call needs")
    return value

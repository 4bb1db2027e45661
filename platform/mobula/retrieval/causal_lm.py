"""The autoregressive twin on a pretrained decoder (Qwen2, Llama and their kin): docid tokens continue the prompt.

The prompt but for its last token is read once; its keys and values are the :class:`Memory`. The last token, which is
the same in every prompt, stands where a decoder's start token would, and the state at a token predicts the next one.

Shapes: B queries, G hypotheses a query, R = B * G, n prompt positions, L levels, K codes, d width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mobula.errors import ModelError
from mobula.models.pretrained import Pretrained
from mobula.retrieval.network import Memory, NetworkKind, required
from mobula.retrieval.pretrained_docid import HypothesisCache, PretrainedDocidModel, PretrainedShape, tokens_of_words

LOADER = "AutoModelForCausalLM"


class CausalLM(PretrainedDocidModel):
    """Logits over docid tokens, left to right, from a pretrained decoder.

    A layer of its cache holds keys and values f32[R, h, n - 1 + t, d/h] of the prompt and the docid.
    """

    learned: ClassVar[NetworkKind] = "autoregressive"
    continued: ClassVar[bool] = True

    def __init__(self, shape: PretrainedShape, base: Pretrained, words: Sequence[str] | None = None) -> None:
        """Load ``base`` and give it docid tokens, which start at ``words`` where codes name some.

        Raises:
            ModelError: if its attention is not causal.
        """
        super().__init__(shape)
        network: Any = base.load(LOADER)
        self.embedding = network.get_input_embeddings()
        self.add_tokens(self.embedding.weight, network.get_output_embeddings().weight, tokens_of_words(base, words))
        self.decoder = network.get_decoder()
        self._require_causal_attention()
        self.adapt(self.decoder)

    def memory(self, query: dict[str, Tensor]) -> Memory:
        """Keys and values of the prompts {ids i64[B, n], mask bool[B, n]}, padded on the left, but for the last token.

        ``embedded`` [B, 1, d] is that token's row.
        """
        mask, embedded = query["mask"], self.embedding(query["ids"])
        past = self._decode(embedded[:, :-1], mask[:, :-1]).past_key_values
        keys_values = tuple((layer.keys, layer.values) for layer in past.layers)
        return Memory(mask, embedded.new_zeros(len(embedded), 0), keys_values, embedded=embedded[:, -1:])

    def logits(self, memory: Memory, z: Tensor) -> Tensor:
        """As :meth:`.DocidModel.logits`."""
        grouped = z.dim() == 3
        codes = z if grouped else z.unsqueeze(1)
        before = self.rows(codes[..., :-1].clamp(min=0).flatten(0, 1), self.index[:-1])
        start = self.start(memory, codes.shape[1])
        x = torch.cat([self._last_tokens(memory, codes.shape[1]), before], 1)
        scores = self.head(self._continue(memory, start, x).last_hidden_state)
        scores = scores.masked_fill(self.impossible, float("-inf")).unflatten(0, codes.shape[:2])
        return scores if grouped else scores.squeeze(1)

    def start(self, memory: Memory, width: int = 1) -> HypothesisCache:
        """As :meth:`.DocidTransformer.start`."""
        layers = [tuple(part.repeat_interleave(width, 0) for part in layer) for layer in memory.keys_values]
        return HypothesisCache(layers, 0, width)

    def step(self, memory: Memory, cache: HypothesisCache, previous: Tensor | None) -> tuple[Tensor, HypothesisCache]:
        """As :meth:`.DocidTransformer.step`; the cache given stays as it is."""
        level = cache.position
        here = slice(level, level + 1)
        if previous is None:
            x = self._last_tokens(memory, cache.width)
        else:
            x = self.rows(previous.reshape(-1, 1), self.index[level - 1 : level])
        decoded = self._continue(memory, cache, x)
        scores = self.head(decoded.last_hidden_state, here).masked_fill(self.impossible[here], float("-inf"))
        layers = [(layer.keys, layer.values) for layer in decoded.past_key_values.layers]
        scores = scores.squeeze(1).unflatten(0, (memory.size, cache.width))
        return scores, HypothesisCache(layers, level + 1, cache.width)

    def _last_tokens(self, memory: Memory, width: int) -> Tensor:
        """The rows [R, 1, d] of the prompts' last token, ``width`` for each query."""
        return required(memory.embedded).repeat_interleave(width, 0)

    def _continue(self, memory: Memory, cache: HypothesisCache, x: Tensor) -> Any:
        """The decoder's output for x [R, t, d], which follows what is in the cache."""
        from transformers.cache_utils import DynamicCache

        prompt = memory.mask[:, :-1].repeat_interleave(cache.width, 0)
        mask = F.pad(prompt, (0, cache.position + x.shape[1]), value=True)
        return self._decode(x, mask, DynamicCache(cache.layers))

    def _decode(self, x: Tensor, mask: Tensor, past: Any = None) -> Any:
        """The decoder's output for x [R, t, d], the last of the positions of mask bool[R, n + t]."""
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
        return self.decoder(
            inputs_embeds=x,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=past,
            use_cache=True,
        )

    @torch.no_grad()
    def _require_causal_attention(self) -> None:
        """See with two short sequences that a position does not see the next one, which would give its code away."""
        first, second = self.embedding(torch.tensor([[0, 1], [0, 2]])).unbind(0)
        mask = torch.ones(1, 2, dtype=torch.bool)
        one, other = (self._decode(x[None], mask).last_hidden_state[0, 0] for x in (first, second))
        if not torch.allclose(one, other, atol=1e-5):
            raise ModelError(
                f"model {self.shape.base!r} has full attention: a level sees its own code; "
                "use a model pretrained from left to right"
            )

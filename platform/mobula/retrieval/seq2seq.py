"""The autoregressive twin on a pretrained encoder-decoder (T5 and its kin): prompt in, docid tokens out.

Shapes: B queries, G hypotheses a query, R = B * G, n prompt positions, L levels, K codes, d width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mobula.errors import ModelError
from mobula.models.pretrained import Pretrained
from mobula.retrieval.network import Memory, NetworkKind, required
from mobula.retrieval.pretrained_docid import HypothesisCache, PretrainedDocidModel, PretrainedShape, tokens_of_words

LOADER = "AutoModelForSeq2SeqLM"


class Seq2SeqLM(PretrainedDocidModel):
    """Logits over docid tokens, left to right, from a pretrained encoder-decoder.

    A layer of its cache holds keys and values f32[R, h, t, d/h] of the docid and f32[R, h, n, d/h] of the prompt.
    """

    learned: ClassVar[NetworkKind] = "autoregressive"
    continued: ClassVar[bool] = False

    def __init__(self, shape: PretrainedShape, base: Pretrained, words: Sequence[str] | None = None) -> None:
        """Load ``base`` and give it docid tokens, which start at ``words`` where codes name some.

        Raises:
            ModelError: if it is not an encoder-decoder with a token that starts the decoder.
        """
        super().__init__(shape)
        network: Any = base.load(LOADER)
        self.start_id = network.config.decoder_start_token_id
        if self.start_id is None:
            raise ModelError(f"model {base.name!r}: its configuration has no decoder_start_token_id")
        # T5 divides the decoder's states by sqrt(d) where it ties input and output rows.
        self.scale = network.config.d_model**-0.5 if getattr(network.config, "scale_decoder_outputs", False) else 1.0
        self.embedding = network.get_input_embeddings()
        self.add_tokens(self.embedding.weight, network.get_output_embeddings().weight, tokens_of_words(base, words))
        self.encoder, self.decoder = network.get_encoder(), network.get_decoder()
        self.adapt(self.embedding, self.encoder, self.decoder)

    def memory(self, query: dict[str, Tensor]) -> Memory:
        """The encoder's states of the prompts {ids i64[B, n], mask bool[B, n]}."""
        mask = query["mask"]
        states = self.encoder(input_ids=query["ids"], attention_mask=mask.long()).last_hidden_state
        return Memory(mask, states.new_zeros(len(states), 0), embedded=states)

    def logits(self, memory: Memory, z: Tensor) -> Tensor:
        """As :meth:`.DocidModel.logits`."""
        grouped = z.dim() == 3
        codes = z if grouped else z.unsqueeze(1)
        before = self.rows(codes[..., :-1].clamp(min=0).flatten(0, 1), self.index[:-1])
        x = torch.cat([self._start_row().expand(len(before), 1, -1), before], 1)
        hidden = self._decode(memory, codes.shape[1], x).last_hidden_state
        scores = self.head(hidden * self.scale).masked_fill(self.impossible, float("-inf"))
        scores = scores.unflatten(0, codes.shape[:2])
        return scores if grouped else scores.squeeze(1)

    def start(self, memory: Memory, width: int = 1) -> HypothesisCache:
        """As :meth:`.DocidTransformer.start`."""
        return HypothesisCache([], 0, width)

    def step(self, memory: Memory, cache: HypothesisCache, previous: Tensor | None) -> tuple[Tensor, HypothesisCache]:
        """As :meth:`.DocidTransformer.step`; the cache given stays as it is."""
        level = cache.position
        here = slice(level, level + 1)
        if previous is None:
            x = self._start_row().expand(memory.size * cache.width, 1, -1)
        else:
            x = self.rows(previous.reshape(-1, 1), self.index[level - 1 : level])
        decoded = self._decode(memory, cache.width, x, past_key_values=_past(cache), use_cache=True)
        scores = self.head(decoded.last_hidden_state * self.scale, here).masked_fill(
            self.impossible[here], float("-inf")
        )
        past = decoded.past_key_values
        pairs = zip(past.self_attention_cache.layers, past.cross_attention_cache.layers, strict=True)
        layers = [(own.keys, own.values, prompt.keys, prompt.values) for own, prompt in pairs]
        scores = scores.squeeze(1).unflatten(0, (memory.size, cache.width))
        return scores, HypothesisCache(layers, level + 1, cache.width)

    def _decode(self, memory: Memory, width: int, x: Tensor, **options: Any) -> Any:
        """The decoder's output for x [R, t, d], ``width`` hypotheses of each query."""
        return self.decoder(
            inputs_embeds=x,
            encoder_hidden_states=required(memory.embedded).repeat_interleave(width, 0),
            encoder_attention_mask=memory.mask.repeat_interleave(width, 0).long(),
            **({"use_cache": False} | options),
        )

    def _start_row(self) -> Tensor:
        """The embedding [d] of the token that starts the decoder."""
        return self.embedding(torch.tensor(self.start_id, device=self.index.device))


def _past(cache: HypothesisCache) -> Any:
    """The cache as transformers wants it."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    own, prompt = ([layer[i : i + 2] for layer in cache.layers] for i in (0, 2))
    return EncoderDecoderCache(DynamicCache(own), DynamicCache(prompt))

"""A small LLaDA: module names, weights and habits of the published one, which was written for transformers 4.

Its habits: no ``post_init``, ``tie_weights`` without arguments, ``config.use_cache`` where nothing is said, a rotary
table that is no buffer, and attention that takes no mask, whatever it is given.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import AutoModel

from .configuration_llada import LLaDAConfig


class RMSLayerNorm(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.d_model, device="cpu"))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class LLaDALlamaBlock(nn.Module):
    def __init__(self, config, table) -> None:
        super().__init__()
        self.config, self.table = config, table
        d, inner = config.d_model, config.mlp_hidden_size
        keys = (config.n_kv_heads or config.n_heads) * d // config.n_heads
        self.attn_norm, self.ff_norm = RMSLayerNorm(config), RMSLayerNorm(config)
        self.q_proj, self.attn_out = (nn.Linear(d, d, bias=False, device="cpu") for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(d, keys, bias=False, device="cpu") for _ in range(2))
        self.ff_proj, self.up_proj = (nn.Linear(d, inner, bias=False, device="cpu") for _ in range(2))
        self.ff_out = nn.Linear(inner, d, bias=False, device="cpu")

    def forward(self, x, attention_bias=None):
        normed = self.attn_norm(x)
        q, k, v = (self._heads(layer(normed)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._rotated(q), self._rotated(k)
        attended = self._scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(2))
        normed = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))

    def _scaled_dot_product_attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        shared = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=False)

    def _heads(self, x):
        return x.unflatten(2, (-1, self.config.d_model // self.config.n_heads)).transpose(1, 2)

    def _rotated(self, x):
        angles = self.table[: x.shape[2]]
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class LLaDAModel(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        size = config.d_model // config.n_heads
        frequencies = config.rope_theta ** -(torch.arange(0, size, 2, device="cpu").float() / size)
        table = torch.outer(torch.arange(config.max_sequence_length, device="cpu").float(), frequencies).repeat(1, 2)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model, device="cpu"),
                "ln_f": RMSLayerNorm(config),
                "blocks": nn.ModuleList(LLaDALlamaBlock(config, table) for _ in range(config.n_layers)),
                "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=False, device="cpu"),
            }
        )


class LLaDAModelLM(PreTrainedModel):
    config_class = LLaDAConfig
    base_model_prefix = "model"
    _no_split_modules = ("LLaDALlamaBlock",)

    def __init__(self, config) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)

    def forward(
        self,
        input_ids=None,
        inputs_embeds=None,
        attention_mask=None,
        attention_bias=None,
        use_cache=None,
        return_dict=None,
    ):
        if use_cache is None:
            use_cache = self.config.use_cache
        parts = self.model.transformer
        x = parts.wte(input_ids) if inputs_embeds is None else inputs_embeds
        for block in parts.blocks:
            x = block(x, attention_bias=attention_bias)
        return CausalLMOutputWithPast(logits=parts.ff_out(parts.ln_f(x)))

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def set_input_embeddings(self, value) -> None:
        self.model.transformer.wte = value

    def get_output_embeddings(self):
        return self.model.transformer.wte if self.config.weight_tying else self.model.transformer.ff_out

    def set_output_embeddings(self, value) -> None:
        self.model.transformer.ff_out = value

    def tie_weights(self) -> None:
        if self.config.weight_tying:
            self.model.transformer.ff_out = self.model.transformer.wte


AutoModel.register(LLaDAConfig, LLaDAModelLM)

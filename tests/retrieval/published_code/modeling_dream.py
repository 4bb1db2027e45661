"""A small Dream: module names, weights and habits of the published one, which was written for transformers 4.

Its habits: ``ROPE_INIT_FUNCTIONS["default"]``, rotary frequencies in a buffer that is not saved, classes of attention
by ``config._attn_implementation``, a mask [B, 1, 1, S] that goes straight into attention.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel

from .configuration_dream import DreamConfig


class DreamRMSNorm(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.variance_epsilon = config.rms_norm_eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class DreamRotaryEmbedding(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        scaling = config.rope_scaling
        self.rope_type = "default" if scaling is None else scaling.get("rope_type", scaling.get("type"))
        self.rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = self.rope_init_fn(config, None)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.original_inv_freq = self.inv_freq

    def forward(self, x, position_ids):
        angles = (position_ids[:, :, None].float() * self.inv_freq[None, None, :].float()).repeat(1, 1, 2)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def rotated(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)


class DreamSdpaAttention(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        d, self.size = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj, self.o_proj = nn.Linear(d, d, bias=True), nn.Linear(d, d, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(d, d // self.groups, bias=True) for _ in range(2))
        self.rotary_emb = DreamRotaryEmbedding(config)

    def forward(self, x, attention_mask, position_embeddings):
        q, k, v = (
            layer(x).unflatten(2, (-1, self.size)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, *position_embeddings), rotated(k, *position_embeddings)
        k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=False)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


ATTENTION = {"sdpa": DreamSdpaAttention}


class DreamMLP(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(d, inner, bias=False), nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DreamDecoderLayer(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.self_attn = ATTENTION[config._attn_implementation](config)
        self.mlp = DreamMLP(config)
        self.input_layernorm, self.post_attention_layernorm = DreamRMSNorm(config), DreamRMSNorm(config)

    def forward(self, x, attention_mask, position_embeddings):
        x = x + self.self_attn(self.input_layernorm(x), attention_mask, position_embeddings)
        return x + self.mlp(self.post_attention_layernorm(x))


class DreamPreTrainedModel(PreTrainedModel):
    config_class = DreamConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_cache_class = True

    def _init_weights(self, module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=0.02)


class DreamBaseModel(DreamPreTrainedModel):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DreamDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = DreamRMSNorm(config)
        self.rotary_emb = DreamRotaryEmbedding(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        position_embeddings = self.rotary_emb(x, position_ids)
        for layer in self.layers:
            x = layer(x, attention_mask, position_embeddings)
        return BaseModelOutput(last_hidden_state=self.norm(x))


class DreamModel(DreamPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]  # noqa: RUF012

    def __init__(self, config) -> None:
        super().__init__(config)
        self.model = DreamBaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        num_logits_to_keep=0,
        **loss_kwargs,
    ):
        hidden = self.model(input_ids, attention_mask, position_ids, inputs_embeds).last_hidden_state
        return MaskedLMOutput(logits=self.lm_head(hidden[:, -num_logits_to_keep:, :]))

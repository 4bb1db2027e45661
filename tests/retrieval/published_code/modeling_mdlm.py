"""A small MDLM: module names, weights and habits of the published one, which was written for transformers 4.

Its habits: ``flash_attn`` at the top of the file, no ``post_init``, token ids and times as its only inputs, token rows
in a bare parameter, rotary frequencies in a buffer that is saved.
"""

import math

import flash_attn
import flash_attn.layers.rotary
import torch
import transformers
from torch import nn
from transformers import modeling_outputs

from .configuration_mdlm import MDLMConfig


class Rotary(nn.Module):
    def __init__(self, size) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, size, 2).float() / size))

    def forward(self, length):
        angles = torch.outer(torch.arange(length, device=self.inv_freq.device).float(), self.inv_freq)
        return angles.cos(), angles.sin()


class LayerNorm(nn.Module):
    def __init__(self, d) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones([d]))

    def forward(self, x):
        with torch.cuda.amp.autocast(enabled=False):
            x = nn.functional.layer_norm(x.float(), x.shape[-1:])
        return x * self.weight[None, None, :]


class TimestepEmbedder(nn.Module):
    def __init__(self, d, sines=256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(sines, d), nn.SiLU(), nn.Linear(d, d))
        self.sines = sines

    def forward(self, t):
        half = self.sines // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device).float() / half)
        angles = t[:, None].float() * frequencies[None]
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], -1))


@torch.jit.script
def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale) + shift


class DDiTBlock(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        d, self.n_heads = config.hidden_dim, config.n_heads
        self.norm1, self.norm2 = LayerNorm(d), LayerNorm(d)
        self.attn_qkv, self.attn_out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))
        self.dropout = nn.Dropout(config.dropout)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * d)
        self.adaLN_modulation.weight.data.zero_()

    def forward(self, x, cos, sin, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        batch, length = x.shape[:2]
        qkv = self.attn_qkv(modulate(self.norm1(x), shift1, scale1)).unflatten(2, (3, self.n_heads, -1))
        qkv = flash_attn.layers.rotary.apply_rotary_emb_qkv_(qkv, cos.to(qkv.dtype), sin.to(qkv.dtype))
        starts = torch.arange(0, (batch + 1) * length, step=length, dtype=torch.int32, device=x.device)
        attended = flash_attn.flash_attn_interface.flash_attn_varlen_qkvpacked_func(
            qkv.flatten(0, 1), starts, length, 0.0, causal=False
        )
        x = x + gate1 * self.dropout(self.attn_out(attended.unflatten(0, (batch, length)).flatten(2)))
        return x + gate2 * self.dropout(self.mlp(modulate(self.norm2(x), shift2, scale2)))


class EmbeddingLayer(nn.Module):
    def __init__(self, d, vocabulary) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty((vocabulary, d)))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, x):
        return self.embedding[x]


class DDitFinalLayer(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.norm_final = LayerNorm(config.hidden_dim)
        self.linear = nn.Linear(config.hidden_dim, config.vocab_size)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 2 * config.hidden_dim)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DITBackbone(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        self.vocab_embed = EmbeddingLayer(config.hidden_dim, config.vocab_size)
        self.sigma_map = TimestepEmbedder(config.cond_dim)
        self.rotary_emb = Rotary(config.hidden_dim // config.n_heads)
        self.blocks = nn.ModuleList(DDiTBlock(config) for _ in range(config.n_blocks))
        self.output_layer = DDitFinalLayer(config)

    def forward(self, indices, sigma):
        if not self.config.time_conditioning:
            sigma = torch.zeros_like(sigma)
        x = self.vocab_embed(indices)
        c = nn.functional.silu(self.sigma_map(sigma))
        cos, sin = self.rotary_emb(x.shape[1])
        with torch.cuda.amp.autocast(dtype=torch.bfloat16):
            for block in self.blocks:
                x = block(x, cos, sin, c)
            return self.output_layer(x, c)


class MDLM(transformers.PreTrainedModel):
    config_class = MDLMConfig
    base_model_prefix = "mdlm"

    def __init__(self, config) -> None:
        super().__init__(config)
        self.backbone = DITBackbone(config)

    def forward(self, input_ids=None, timesteps=None, return_dict=None):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        logits = self.backbone(indices=input_ids, sigma=timesteps)
        return modeling_outputs.MaskedLMOutput(logits=logits) if return_dict else logits

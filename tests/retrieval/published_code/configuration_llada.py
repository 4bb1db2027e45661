"""LLaDA's configuration as it was published for transformers 4: all keys go to the base class, ``use_cache`` too."""

from transformers import AutoConfig, PretrainedConfig

DEFAULTS = {"weight_tying": False, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "n_kv_heads": None}


class LLaDAConfig(PretrainedConfig):
    model_type = "llada"

    def __init__(self, use_cache: bool = False, **kwargs) -> None:
        super().__init__(**{**DEFAULTS, **kwargs, "use_cache": use_cache})

    @property
    def num_attention_heads(self) -> int:
        return self.n_heads

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layers

    @property
    def hidden_size(self) -> int:
        return self.d_model


AutoConfig.register("llada", LLaDAConfig)

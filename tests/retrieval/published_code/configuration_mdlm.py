"""MDLM's configuration as it was published for transformers 4."""

import transformers


class MDLMConfig(transformers.PretrainedConfig):
    model_type = "mdlm"

    def __init__(
        self,
        vocab_size=50258,
        model_length=1024,
        hidden_dim=768,
        cond_dim=129,
        n_blocks=12,
        n_heads=12,
        dropout=0.1,
        time_conditioning=False,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.model_length, self.hidden_dim, self.cond_dim = (
            vocab_size,
            model_length,
            hidden_dim,
            cond_dim,
        )
        self.n_blocks, self.n_heads, self.dropout = n_blocks, n_heads, dropout
        self.time_conditioning = time_conditioning

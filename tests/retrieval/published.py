"""Tiny random checkpoints of LLaDA, Dream and MDLM in a hub cache of a test's own, as the hub's would lie there."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers.modeling_utils  # noqa: F401 (looks for flash_attn, which must not be the one below)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mobula.models.pretrained import REVISIONS, TOKENIZERS

CODE = Path(__file__).parent / "published_code"
IDS = {
    "llada": "GSAI-ML/LLaDA-8B-Base",
    "dream": "Dream-org/Dream-v0-Base-7B",
    "mdlm": "kuleshov-group/mdlm-owt",
}
CLASSES = {"llada": "LLaDAModelLM", "dream": "DreamModel", "mdlm": "MDLM"}
LOADERS = {"llada": "AutoModel", "dream": "AutoModel", "mdlm": "AutoModelForMaskedLM"}
SPECIAL = ["[PAD]", "[UNK]", "query", "docid", ":"]
WORDS = [f"w{i}" for i in range(60)]

# The published config.json files, with small sizes; vocabularies keep theirs, for the ids in them are asserted.
LLADA = {
    "model_type": "llada",
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0.0,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "layer_norm_type": "rms",
    "mask_token_id": 126336,
    "max_sequence_length": 256,
    "mlp_hidden_size": 64,
    "n_heads": 2,
    "n_kv_heads": 1,
    "n_layers": 2,
    "pad_token_id": 126081,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_theta": 500000.0,
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
DREAM = {
    "model_type": "Dream",
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_size": 32,
    "intermediate_size": 64,
    "mask_token_id": 151666,
    "max_position_embeddings": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 152064,
}
MDLM = {
    "model_type": "mdlm",
    "cond_dim": 16,
    "dropout": 0.1,
    "hidden_dim": 32,
    "model_length": 256,
    "n_blocks": 2,
    "n_heads": 2,
    "return_dict": False,
    "time_conditioning": False,
    "vocab_size": 50258,
}
CONFIGS = {"llada": LLADA, "dream": DREAM, "mdlm": MDLM}


@contextmanager
def hub(root: Path) -> Iterator[Path]:
    """Let the hub's client know what lies in ``root`` alone, and copy models' code to a folder beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "hub"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(root / "modules"))
        patch.setattr(sys, "path", [*sys.path])
        yield root / "hub"


def snapshot(hub: Path, name: str) -> Path:
    """The folder of a model of the hub, at its pinned revision if it has one."""
    revision = REVISIONS.get(name, "0" * 40)
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots" / revision).mkdir(parents=True, exist_ok=True)
    return folder / "snapshots" / revision


def write_checkpoint(hub: Path, kind: str, **sizes: int) -> nn.Module:
    """Write a random model of a kind; gives its network, which was made without the code under test."""
    network = published_network(kind, CONFIGS[kind] | sizes)
    folder = snapshot(hub, IDS[kind])
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / "model.safetensors"
    )
    references = {"AutoConfig": f"configuration_{kind}.{type(network.config).__name__}"}
    references[LOADERS[kind]] = f"modeling_{kind}.{CLASSES[kind]}"
    facts = CONFIGS[kind] | sizes | {"architectures": [CLASSES[kind]], "auto_map": references}
    (folder / "config.json").write_text(json.dumps(facts | {"transformers_version": "4.46.3"}))
    for part in ("configuration", "modeling"):
        shutil.copy(CODE / f"{part}_{kind}.py", folder)
    save_tokenizer(snapshot(hub, TOKENIZERS.get(IDS[kind], IDS[kind])))
    return network


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


def published_network(kind: str, values: dict) -> nn.Module:
    """A network by the published code with random weights, what that code lacks being given by the plain formulas."""
    with _transformers4():
        module = importlib.import_module(f"tests.retrieval.published_code.modeling_{kind}")
        CONFIG_MAPPING._extra_content.pop("llada", None)  # LLaDA's code registers itself
        network_class = getattr(module, CLASSES[kind])
        torch.manual_seed(0)
        network = network_class(network_class.config_class(**values)).eval()
    network.config.use_cache = False
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)  # words as far apart as a trained model's, no gate closed
    return network


@contextmanager
def _transformers4() -> Iterator[None]:
    def inverse_frequencies(config, device):
        size = config.hidden_size // config.num_attention_heads
        return torch.tensor([config.rope_theta ** (-2 * i / size) for i in range(size // 2)]), 1.0

    flash = {name: ModuleType(name) for name in ("flash_attn", "flash_attn.layers", "flash_attn.layers.rotary")}
    flash["flash_attn"].layers = flash["flash_attn.layers"]
    flash["flash_attn"].flash_attn_interface = ModuleType("interface")
    flash["flash_attn"].flash_attn_interface.flash_attn_varlen_qkvpacked_func = plain_attention
    flash["flash_attn.layers"].rotary = flash["flash_attn.layers.rotary"]
    flash["flash_attn.layers.rotary"].apply_rotary_emb_qkv_ = complex_rotation
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ROPE_INIT_FUNCTIONS, "default", inverse_frequencies)
        for name, module in flash.items():
            patch.setitem(sys.modules, name, module)
        yield


def plain_attention(qkv: Tensor, starts: Tensor, length: int, dropout: float, causal: bool) -> Tensor:
    rows = []
    for start in starts[:-1].tolist():
        q, k, v = qkv[start : start + length].unbind(1)
        weights = (torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        rows.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(rows)


def complex_rotation(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = (
        torch.view_as_complex(torch.stack(qkv[:, :, :2].float().chunk(2, -1), -1))
        * torch.complex(cos, sin)[None, :, None, None, :]
    )
    return torch.cat([torch.cat([turned.real, turned.imag], -1), qkv[:, :, 2:]], 2)

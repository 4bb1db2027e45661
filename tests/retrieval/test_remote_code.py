"""Models whose published code was written for transformers 4, on tiny checkpoints: LLaDA, Dream, MDLM."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mobula.config import build
from mobula.data.records import Document, Query, RetrievalData
from mobula.errors import ModelError
from mobula.models.adapters import LoraConfig
from mobula.models.pretrained import Pretrained
from mobula.retrieval.arms import parse
from mobula.retrieval.build import ModelConfig, build_model, load_model, save_model
from mobula.retrieval.config import Config
from mobula.retrieval.decoding import Decoder
from mobula.retrieval.diffusion_lm import KINDS
from mobula.retrieval.docids.space import DocidSpace
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.prepare import make_inputs, prepare
from mobula.retrieval.search import DECODERS, SearchOptions
from mobula.retrieval.train_arms import docid_task, load_arm
from mobula.training import TrainingConfig, fit
from tests.retrieval import published
from tests.retrieval.published import IDS, LOADERS, WORDS

DIFFUSION = parse("diffusion/rq")
EACH = pytest.mark.parametrize("kind", IDS)
LEVELS, CODES = 3, 4


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub that has the three models, and their networks made without the code under test."""
    with published.hub(tmp_path_factory.mktemp("hub")) as folder:
        yield folder, {kind: published.write_checkpoint(folder, kind) for kind in IDS}


@pytest.fixture
def networks(hub):
    return hub[1]


@pytest.fixture
def folders(hub):
    return {kind: published.snapshot(hub[0], name) for kind, name in IDS.items()}


@pytest.fixture(scope="module")
def table() -> DocidTable:
    codes = np.random.default_rng(0).integers(0, CODES, (12, LEVELS)).astype(np.int32)
    sizes = np.full(LEVELS, CODES, np.int32)
    names = [f"d{i}" for i in range(12)]
    return DocidTable(DocidSpace("random", sizes, {}, {"seed": 0}), codes, names, np.ones(12, bool), sizes)


def config_of(kind: str, **changes) -> ModelConfig:
    return ModelConfig(backbone=kind, base=IDS[kind], query_len=6, lora=LoraConfig(4, 128.0), **changes)


def features(config: ModelConfig, texts: list[str]) -> dict[str, torch.Tensor]:
    return make_inputs(config, [DIFFUSION], np.zeros(1))["main"].features(texts)


# What the shims are for


@EACH
def test_without_the_shims_none_opens(hub, folders, kind) -> None:
    """Once a model opens by itself, its shims can go."""
    with pytest.raises((AttributeError, TypeError, KeyError, ImportError)):
        getattr(transformers, LOADERS[kind]).from_pretrained(folders[kind], trust_remote_code=True)


@EACH
def test_logits_are_those_of_the_published_network(networks, table, kind) -> None:
    """Docid rows put at those of words: their logits are the words', Dream's from one position before.

    The published network sees every prompt alone, without padding.
    """
    config, published_network = config_of(kind), networks[kind]
    model = build_model(config, DIFFUSION, table).eval()
    words = torch.randperm(50, generator=torch.Generator().manual_seed(0))[: LEVELS * CODES] + 5
    inner = published_network.backbone if kind == "mdlm" else published_network
    rows_in = inner.vocab_embed.embedding if kind == "mdlm" else inner.get_input_embeddings().weight
    rows_out = inner.output_layer.linear if kind == "mdlm" else inner.get_output_embeddings()
    with torch.no_grad():
        if rows_out.bias is not None:
            rows_out.bias.zero_()  # docid tokens have none
        model.rows.weight.copy_(rows_in[words])
        model.head.weight.copy_(rows_out.weight[words])
    texts = ["w1", "w2 w3 w4 w5 w6", "w7 w8"]
    query = features(config, texts)
    z = torch.tensor([[1, -1, 2], [-1, -1, 0], [3, 3, -1]])
    logits = model.logits(model.memory(query), z)
    words = words.view(LEVELS, CODES)
    for i, codes in enumerate(z):
        docid = [KINDS[kind].mask if c < 0 else int(words[level, c]) for level, c in enumerate(codes)]
        ids = torch.tensor([[*query["ids"][i][query["mask"][i]].tolist(), *docid]])
        times = {"timesteps": torch.rand(1), "return_dict": True} if kind == "mdlm" else {}
        with torch.no_grad():
            full = published_network(input_ids=ids, **times).logits[0]
        end = len(full) - (kind == "dream")
        expected = torch.stack([full[end - LEVELS + level, words[level]] for level in range(LEVELS)])
        assert torch.allclose(logits[i], expected, atol=1e-4)


@EACH
def test_padding_and_company_change_nothing(hub, table, kind) -> None:
    torch.manual_seed(1)
    config = config_of(kind)
    model = build_model(config, DIFFUSION, table).eval()
    with torch.no_grad():
        for row in {model.rows.weight, model.head.weight}:
            row.add_(torch.randn_like(row) * 0.3)
    z = torch.tensor([[1, -1, 2]])
    alone = model.logits(model.memory(features(replace(config, query_len=1), ["w1"])), z)
    together = features(replace(config, query_len=14), ["w1", "w2 w3 w4 w5 w6 w7 w8 w9", "w5"])
    assert torch.allclose(alone[0], model.logits(model.memory(together), z.expand(3, -1))[0], atol=1e-5)
    together["ids"][~together["mask"]] = 9  # another token where there is none
    assert torch.allclose(alone[0], model.logits(model.memory(together), z.expand(3, -1))[0], atol=1e-5)


# From text to hits


@pytest.fixture(scope="module")
def corpus() -> RetrievalData:
    documents = [Document(f"d{i}", "", " ".join(WORDS[2 * i : 2 * i + 2])) for i in range(12)]
    queries = [Query(f"q{i}", WORDS[2 * (i % 12) + i // 12], (f"d{i % 12}",)) for i in range(24)]
    return RetrievalData("words", "made", "0", documents, dict.fromkeys(("train", "dev", "test"), queries))


@EACH
@pytest.mark.parametrize("finetune", [False, True])
def test_a_published_model_trains_saves_and_decodes(hub, corpus, tmp_path, kind, finetune) -> None:
    model = {
        "backbone": kind,
        "base": IDS[kind],
        "query_len": 6,
        "lora": {"rank": 4},
        "finetune": finetune,
        "base_lr": 1.0,
    }
    docid = {"family": "rq", "levels": 3, "codes": 4, "encoder": "wordllama", "min_entropy": 0.1}
    pseudo = {"kinds": ["keyphrase"], "per_document": 2, "real_share": 0.9}
    values = {"docid": docid, "model": model, "pseudo_queries": pseudo, "arms": ["diffusion/rq"]}
    config = build(Config, values)
    material = prepare(config, corpus, tmp_path / "prepared")
    task = docid_task(config, material.prepared, DIFFUSION)
    steps = TrainingConfig(steps=2, batch=8, lr=1e-2, workers=0, eval_every=2, report_every=1)
    trained = load_arm(task, fit(task, steps, tmp_path / "fit", seed=0, name=kind))
    before = task.build()
    assert not trained.rows.weight.equal(before.rows.weight)
    changed = zip(trained.pretrained(), before.pretrained(), strict=True)
    assert sum(not one.equal(other) for one, other in changed) > 3

    save_model(tmp_path / "model", trained, task.table.hash)
    again = load_model(tmp_path / "model", task.table)
    query = material.inputs["main"].features([q.text for q in corpus.queries["dev"][:3]])
    z = torch.zeros(3, 3, dtype=torch.long)
    assert again.logits(again.memory(query), z).equal(trained.logits(trained.memory(query), z))
    for name in DECODERS:
        for result in Decoder(again, task.table).search(query, [SearchOptions(k=5, decoder=name)] * 3):
            assert len({hit.doc_id for hit in result.hits}) == 5


# What cannot be opened says so


@pytest.fixture
def copy(folders, tmp_path):
    """LLaDA's files, to be spoilt."""
    folder = tmp_path / "spoilt"
    shutil.copytree(folders["llada"], folder)
    return Pretrained(IDS["llada"], folder)


def fails(base: Pretrained) -> str:
    from mobula.retrieval.remote_code import load_published

    with pytest.raises(ModelError) as caught:
        load_published(base, "AutoModel")
    assert f"model '{base.name}'" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import no_such_package", "no_such_package"),
        ("raise AttributeError('gone in transformers 5')", "AttributeError: gone in transformers 5"),
        ("raise RuntimeError('no GPU')", "RuntimeError: no GPU"),
    ],
)
def test_code_that_fails_is_named(copy, line, reason) -> None:
    path = copy.folder / "modeling_llada.py"
    path.write_text(f"{line}\n{path.read_text()}")
    message = fails(copy)
    assert reason in message
    assert "commit 0f2787f2d87e; install what it imports" in message


def test_configuration_code_that_fails_is_named(copy) -> None:
    (copy.folder / "configuration_llada.py").write_text("raise TypeError('no such field')")
    assert "TypeError: no such field" in fails(copy)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_are_named(copy, change) -> None:
    """Anything else would leave random weights behind."""
    weights = load_file(copy.folder / "model.safetensors")
    name = "model.transformer.blocks.1.up_proj.weight"
    changed = weights.pop(name)
    if change == "unknown":
        weights |= {name: changed, "model.transformer.blocks.9.up_proj.weight": changed.clone()}
    if change == "shape":
        weights[name] = changed[:-1].contiguous()
    save_file(weights, copy.folder / "model.safetensors")
    message = fails(copy)
    assert "up_proj" in message
    assert "fetch the folder anew" in message


def test_a_model_and_its_backbone_go_together(hub, table) -> None:
    with pytest.raises(
        ModelError, match=r"is not for backbone masked_lm; set model.backbone to llada or dream or mdlm"
    ):
        build_model(replace(config_of("mdlm"), backbone="masked_lm"), DIFFUSION, table)
    with pytest.raises(ModelError, match="vocab_size=126464, expected 50258"):
        build_model(replace(config_of("llada"), backbone="mdlm"), DIFFUSION, table)


def test_a_copy_of_the_code_stays_refused(hub, copy, table) -> None:
    """Also once the hub's own has been opened, which registers its architecture with transformers."""
    build_model(config_of("llada"), DIFFUSION, table)
    with pytest.raises(ModelError, match="runs only for GSAI-ML/LLaDA-8B-Base"):
        Pretrained.find(str(copy.folder))


@EACH
def test_nothing_of_the_stand_ins_stays_behind(hub, table, kind) -> None:
    """Models of transformers itself would find them: Llama's rotary frequencies, for one."""
    build_model(config_of(kind), DIFFUSION, table)
    assert not [name for name in sys.modules if name.startswith("flash_attn")]
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **sizes))


def test_mdlm_takes_the_tokenizer_of_gpt2_and_hashes_it(hub) -> None:
    base = Pretrained.find(IDS["mdlm"])
    assert base.tokenizer_folder == published.snapshot(hub[0], "openai-community/gpt2")
    assert base.tokenizer()("w1")["input_ids"] == [published.SPECIAL.index(":") + 2]
    assert base.hash != Pretrained(str(base.folder), base.folder).hash

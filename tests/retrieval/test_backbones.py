"""Pretrained backbones on tiny random models saved to disk: BERT, ModernBERT, T5, BART, Qwen2, Llama, an encoder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from mobula.config import build, load
from mobula.data.records import Document, Query, RetrievalData
from mobula.errors import ArtifactError, ConfigError, ModelError
from mobula.models.adapters import LoraConfig
from mobula.models.pretrained import REVISIONS, Pretrained
from mobula.models.text import load_static
from mobula.retrieval.arms import parse
from mobula.retrieval.build import ModelConfig, base_hash, build_model, code_words, load_model, save_model
from mobula.retrieval.config import Config
from mobula.retrieval.decoding import ArDecoder, Decoder
from mobula.retrieval.diffusion_lm import KINDS, mask_id
from mobula.retrieval.docids.config import DocidConfig
from mobula.retrieval.docids.space import DocidSpace, fit_space
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.inputs import EmptyQuery, EncoderInputs, PromptInputs, StateInputs
from mobula.retrieval.prepare import make_inputs, prepare
from mobula.retrieval.pretrained_docid import DocidHead
from mobula.retrieval.search import AR_DECODERS, DECODERS, SearchOptions
from mobula.retrieval.tasks import DocidTask
from mobula.retrieval.train_arms import docid_task, load_arm
from mobula.training import TrainingConfig, fit
from mobula.training.engine import _groups

ROOT = Path(__file__).parents[2]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "query", "docid", ":"]
WORDS = [f"w{i}" for i in range(24)]
VOCABULARY = len(SPECIAL) + len(WORDS)
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"initializer_range": 0.2}  # words as far apart as a trained model's
DIFFUSION, TWIN = parse("diffusion/rq"), parse("autoregressive/rq")
ENCODER_DECODERS, DECODERS_ONLY = ("t5", "bart"), ("qwen2", "llama")
TWINS = (*ENCODER_DECODERS, *DECODERS_ONLY)
TEXTS = ["w1 w2", "w3 w4 w5 w6 w7 w8 w9 w10 w11"]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if name in ("bert", "causal"):
        causal = name == "causal"
        return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, num_hidden_layers=2, is_decoder=causal))
    if name == "modernbert":
        untied = {"cls_token_id": 2, "sep_token_id": 3, "tie_word_embeddings": False}
        return transformers.ModernBertForMaskedLM(
            transformers.ModernBertConfig(**SMALL, num_hidden_layers=2, **ids, **untied)
        )
    if name == "t5":
        t5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCABULARY, **t5))
    if name == "bart":
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
        sizes = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 2}
        bart = transformers.BartConfig(vocab_size=VOCABULARY, d_model=32, **heads, **sizes, **ids)
        return transformers.BartForConditionalGeneration(bart)
    if name in DECODERS_ONLY:
        sizes = SMALL | ids | {"num_hidden_layers": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
        if name == "qwen2":
            return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes | {"vocab_size": 300}))
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))
    return transformers.BertModel(transformers.BertConfig(**SMALL, num_hidden_layers=2))


def save_tokenizer(folder: Path) -> None:
    if folder.name == "qwen2":  # transformers knows no other tokenizer for it: bytes, and " flow" as one token
        steps = [("Ġ", "f"), ("Ġf", "l"), ("Ġfl", "o"), ("Ġflo", "w")]
        units = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in steps)]
        vocabulary = {unit: i for i, unit in enumerate(units)}
        transformers.Qwen2Tokenizer(vocab=vocabulary, merges=steps).save_pretrained(folder)
        return
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny random models."""
    root = tmp_path_factory.mktemp("bases")
    for name in ("bert", "causal", "modernbert", *TWINS, "encoder"):
        network(name).save_pretrained(root / name)
        save_tokenizer(root / name)
    return {folder.name: str(folder) for folder in root.iterdir()}


@pytest.fixture(scope="session")
def table() -> DocidTable:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (12, 3)).astype(np.int32)
    sizes = np.array([5, 4, 5], np.int32)
    return DocidTable(
        DocidSpace("random", sizes, {}, {"seed": 0}), codes, [f"d{i}" for i in range(12)], np.ones(12, bool), sizes
    )


def config_of(bases: dict[str, str], name: str, **changes) -> ModelConfig:
    backbone = "t5" if name in ENCODER_DECODERS else "causal_lm" if name in DECODERS_ONLY else "masked_lm"
    lora = LoraConfig(4, 128.0, changes.pop("targets", "all-linear"))
    return ModelConfig(backbone=backbone, base=bases[name], query_len=6, lora=lora, **changes)


def built(bases, table, name, **changes):
    """A model, the features of TEXTS, and its configuration."""
    config = config_of(bases, name, **changes)
    arm = TWIN if name in TWINS else DIFFUSION
    torch.manual_seed(1)
    model = build_model(config, arm, table).eval()
    with torch.no_grad():
        for row in {model.rows.weight, model.head.weight}:
            row.add_(torch.randn_like(row) * 0.3)  # at the start all docid tokens are alike
    return model, make_inputs(config, [arm], np.zeros(1))["main"].features(TEXTS), config


# Docid tokens


def test_dream_shift_once() -> None:
    """A planted network whose state at i-1 is the output row of token i: only a shift of one predicts it."""
    levels, codes = 4, 6
    torch.manual_seed(0)
    rows = nn.Parameter(nn.functional.normalize(torch.randn(levels * codes, 64), dim=-1))
    truth = torch.tensor([3, 0, 5, 3])
    of_token = rows.detach()[truth + torch.arange(levels) * codes]
    planted = torch.cat([torch.zeros(2, 64), of_token, torch.zeros(1, 64)])[None]  # 3 prompt tokens, shifted by one
    predicted = {shift: DocidHead(rows, levels, shift)(planted)[0].argmax(-1) for shift in (0, 1, 2)}
    assert predicted[KINDS["dream"].shift].equal(truth)
    assert not predicted[0].equal(truth)
    assert not predicted[2].equal(truth)
    assert KINDS["llada"].shift == KINDS["masked_lm"].shift == 0


def test_a_models_logits_are_shifted_by_its_head_alone(bases, table) -> None:
    model, query, _ = built(bases, table, "modernbert")
    z = torch.full((2, 3), -1)
    hidden = []
    model.head.register_forward_hook(lambda module, inputs, output: hidden.append(inputs[0]))
    logits = model.logits(model.memory(query), z)
    weight = model.head.weight.unflatten(0, (3, 5))
    expected = torch.einsum("bld,lkd->blk", hidden[0][:, -3:], weight)
    assert torch.allclose(logits[logits.isfinite()], expected[logits.isfinite()], atol=1e-5)
    model.head.shift = 1
    shifted = model.logits(model.memory(query), z)
    expected = torch.einsum("bld,lkd->blk", hidden[0][:, -4:-1], weight)
    assert torch.allclose(shifted[shifted.isfinite()], expected[shifted.isfinite()], atol=1e-5)


@pytest.mark.parametrize(("name", "tied"), [("bert", True), ("modernbert", False)])
def test_docid_rows_start_at_the_mean_pretrained_row(bases, table, name, tied) -> None:
    pretrained = Pretrained.find(bases[name]).load("AutoModelForMaskedLM")
    model = build_model(config_of(bases, name), DIFFUSION, table)
    mean_in = pretrained.get_input_embeddings().weight.mean(0)
    mean_out = pretrained.get_output_embeddings().weight.mean(0)
    assert model.rows.weight.shape == (3 * 5, 32)
    assert torch.allclose(model.rows.weight, mean_in.expand(15, -1))
    assert torch.allclose(model.head.weight, mean_out.expand(15, -1))
    assert (model.rows.weight is model.head.weight) == tied
    assert torch.allclose(mean_in, mean_out) == tied


@pytest.fixture(scope="session")
def titles() -> DocidTable:
    """Docids of the tokens flow, heat; z, eb; cool, ing."""
    documents = [Document("a", "flow heat", "x"), Document("b", "zebra flow", "x"), Document("c", "cooling", "x")]
    space = fit_space(
        DocidConfig(family="text.title", levels=2), documents, None, seed=0, tokenizer=load_static("wordllama")
    )
    return DocidTable.build(space, documents)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_tokens_of_text_docids_start_at_their_words(bases, titles, tmp_path, name) -> None:
    """Input and output row, at every level; the end token and what cannot be spelled keep the mean row."""
    shutil.copytree(bases[name], tmp_path / name)
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "flow", "co", "##ol", "heat"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {f"{part}_token": f"[{part.upper()}]" for part in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path / name)
    model = build_model(config_of({name: str(tmp_path / name)}, name), parse("diffusion/text.title"), titles)
    matrices = [layer.weight for layer in (network(name).get_input_embeddings(), network(name).get_output_embeddings())]
    codes = {word.strip(): code for code, word in enumerate(code_words(titles))}
    flow, co, ol, heat = (len(SPECIAL) + i for i in range(4))
    for rows, matrix in zip((model.rows.weight, model.head.weight), matrices, strict=True):
        for level in rows.unflatten(0, (2, -1)):
            assert torch.allclose(level[codes["flow"]], matrix[flow])
            assert torch.allclose(level[codes["heat"]], matrix[heat])
            assert torch.allclose(level[codes["cool"]], (matrix[co] + matrix[ol]) / 2)
            assert torch.allclose(level[[0, codes["eb"]]], matrix.mean(0).expand(2, -1), atol=1e-6)
    assert (model.rows.weight is model.head.weight) == (name == "bert")


@pytest.mark.parametrize("name", ["qwen2", "t5"])
def test_twins_read_text_docids_as_words(bases, titles, name) -> None:
    """Where a word begins is told apart: " flow" is one token of Qwen2's, "flow" is four."""
    model = build_model(config_of(bases, name), parse("autoregressive/text.title"), titles)
    matrix, tokenizer = network(name).get_input_embeddings().weight, Pretrained.find(bases[name]).tokenizer()
    for code, word in enumerate(code_words(titles)):
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        known = ids and tokenizer.unk_token_id not in ids
        expected = matrix[ids].mean(0) if known else matrix.mean(0)
        assert torch.allclose(model.rows.weight[[code, code + titles.width]], expected.expand(2, -1), atol=1e-6)
    if name == "qwen2":
        flow = code_words(titles).index(" flow")
        assert torch.allclose(model.rows.weight[flow], matrix[260])


def test_words_of_codes_stand_as_in_a_text() -> None:
    documents = [Document("a", "cooling transformers", "x")]
    words = load_static("wordllama")
    space = fit_space(DocidConfig(family="text.title", levels=4), documents, None, seed=0, tokenizer=words)
    table = DocidTable.build(space, documents)
    spelled = code_words(table)
    assert spelled[0] == ""
    assert "".join(spelled[code] for code in table.codes[0]) == " cooling transformers"


@pytest.mark.parametrize("name", ["bert", "t5", "qwen2"])
def test_only_codes_of_the_level_can_come_out(bases, table, name) -> None:
    model, query, _ = built(bases, table, name)
    logits = model.logits(model.memory(query), torch.zeros(2, 3, dtype=torch.long))
    assert logits.shape == (2, 3, 5)  # neither words nor [MASK]
    assert logits[:, 1, 4].isneginf().all()
    assert logits.isneginf().sum() == 2


# Attention and padding


@pytest.mark.parametrize("name", ["bert", "modernbert", *TWINS])
def test_attention_of_pretrained_models(bases, table, name) -> None:
    """Diffusion: the first level sees the last; autoregressive: a level sees those before it alone."""
    model, query, _ = built(bases, table, name)
    memory = model.memory(query)
    plain, other = torch.tensor([[1, 2, 3]] * 2), torch.tensor([[1, 2, 0]] * 2)
    first, second = model.logits(memory, plain), model.logits(memory, other)
    changed = ~torch.isclose(first[:, 0], second[:, 0], atol=1e-7).all()
    assert changed == (model.paradigm == "diffusion")


@pytest.mark.parametrize("name", ["bert", "modernbert", *TWINS])
def test_padding_changes_nothing(bases, table, name) -> None:
    model, query, config = built(bases, table, name)
    z = torch.tensor([[1, -1, 2]] if model.paradigm == "diffusion" else [[1, 0, 2]])
    longer = replace(config, query_len=14)
    more = make_inputs(longer, [TWIN if name in TWINS else DIFFUSION], np.zeros(1))["main"].features(TEXTS[:1])
    less = {key: value[:1] for key, value in query.items()}
    assert more["ids"].shape[1] > less["ids"].shape[1]
    short, long = (model.logits(model.memory(one), z) for one in (less, more))
    assert torch.allclose(short, long, atol=1e-5)


def test_causal_models_are_refused(bases, table) -> None:
    with pytest.raises(ModelError, match="causal attention"):
        build_model(config_of(bases, "causal"), DIFFUSION, table)


def test_a_twin_with_full_attention_is_refused(bases, table) -> None:
    """It would see the code that it is asked for."""
    with pytest.raises(ModelError, match="full attention"):
        build_model(replace(config_of(bases, "bert"), backbone="causal_lm"), TWIN, table)


@pytest.mark.parametrize("name", DECODERS_ONLY)
def test_the_decoder_reads_prompt_and_docid_as_one_text(bases, table, name) -> None:
    """Docid rows put at those of words: their logits are the decoder's own for these words, read at once."""
    model, query, _ = built(bases, table, name)
    decoder = network(name).eval()
    words = torch.randperm(15, generator=torch.Generator().manual_seed(0)).view(3, 5) + len(SPECIAL)
    with torch.no_grad():
        model.rows.weight.copy_(decoder.get_input_embeddings().weight[words.flatten()])
        model.head.weight.copy_(decoder.get_output_embeddings().weight[words.flatten()])
    z = torch.tensor([[1, 3, 2], [0, 0, 4]])
    logits = model.logits(model.memory(query), z)
    for i, codes in enumerate(z):
        prompt = query["ids"][i][query["mask"][i]].tolist()
        ids = torch.tensor([[*prompt, *words[range(3), codes].tolist()]])
        full = decoder(input_ids=ids).logits[0, -4:-1]  # a state predicts the token after it
        possible = logits[i].isfinite()
        assert torch.allclose(logits[i][possible], full.gather(1, words)[possible], atol=1e-5)


def test_a_model_that_ignores_its_mask_is_refused(bases, table, monkeypatch) -> None:
    forward = transformers.BertForMaskedLM.forward

    def deaf(self, input_ids=None, attention_mask=None, position_ids=None, **rest):
        return forward(self, input_ids=input_ids, position_ids=position_ids, **rest)

    monkeypatch.setattr(transformers.BertForMaskedLM, "forward", deaf)
    with pytest.raises(ModelError, match="attends to padding"):
        build_model(config_of(bases, "bert"), DIFFUSION, table)


def test_unconditional_forgets_the_query(bases, table) -> None:
    model, _, config = built(bases, table, "bert")
    query = make_inputs(config, [DIFFUSION], np.zeros(1))["main"].features(["w1 w2", "w3 w4"])
    memory, z = model.memory(query), torch.full((2, 3), -1)
    seen, free = model.logits(memory, z), model.logits(model.unconditional(memory), z)
    assert not torch.allclose(seen[0], seen[1])
    assert torch.allclose(free[0], free[1])


# Decoding


@pytest.mark.parametrize("name", ["bert", "t5", "qwen2"])
def test_every_decoder_returns_full_lists(bases, table, name) -> None:
    model, query, _ = built(bases, table, name)
    twin = model.paradigm == "autoregressive"
    decoder = ArDecoder(model, table) if twin else Decoder(model, table)
    options = [SearchOptions(k=7, decoder=one, beam=4, n=3) for one in (AR_DECODERS if twin else DECODERS)]
    for option in options:
        alone, together = decoder.search(query, [option] * 2), decoder.search(query, [option, replace(option, k=3)])
        assert len({hit.doc_id for hit in alone[0].hits}) == 7
        assert alone[0].hits == together[0].hits
    if not twin:
        guided = decoder.search(query, [SearchOptions(k=7, cfg=2.0)] * 2)
        assert len(guided[0].hits) == 7


@pytest.mark.parametrize("name", TWINS)
def test_cached_steps_equal_teacher_forcing(bases, table, name) -> None:
    model, query, _ = built(bases, table, name)
    memory = model.memory(query)
    z = torch.randint(0, 4, (2, 3, 3), generator=torch.Generator().manual_seed(0))  # B, G, L
    whole = model.logits(memory, z)
    cache, previous = model.start(memory, 1), None
    for level in range(3):
        logits, cache = model.step(memory, cache, previous)
        if level == 0:
            logits = logits.expand(-1, 3, -1)
            cache = cache.reorder(torch.zeros(2, 3, dtype=torch.long))
        possible = logits.isfinite()
        assert torch.allclose(logits[possible], whole[:, :, level][possible], atol=1e-5)
        previous = z[:, :, level]


@pytest.mark.parametrize("name", ["t5", "qwen2"])
def test_reordered_hypotheses_continue_their_parents(bases, table, name) -> None:
    model, query, _ = built(bases, table, name)
    memory = model.memory(query)
    _, cache = model.step(memory, model.start(memory, 2), None)
    _, cache = model.step(memory, cache, torch.tensor([[0, 1], [2, 3]]))
    kept, _ = model.step(memory, cache, torch.tensor([[1, 1], [1, 1]]))
    swapped, _ = model.step(memory, cache.reorder(torch.tensor([[1, 0], [0, 0]])), torch.tensor([[1, 1], [1, 1]]))
    assert torch.allclose(swapped[0], kept[0].flip(0), atol=1e-6)
    assert torch.allclose(swapped[1], kept[1, :1].expand(2, -1), atol=1e-6)
    assert not torch.allclose(kept[0, 0], kept[0, 1])


# Queries


def test_prompts_cut_the_query_and_keep_the_rest(bases) -> None:
    tokenizer = Pretrained.find(bases["bert"]).tokenizer()
    words = [*SPECIAL, *WORDS]
    found = PromptInputs(tokenizer, 3, continued=True).features(["w1", "w1 w2 w3 w4"])
    texts = [[words[i] for i in row[mask]] for row, mask in zip(found["ids"], found["mask"], strict=True)]
    assert texts[0] == ["[CLS]", "query", ":", "w1", "docid", ":"]
    assert texts[1] == ["[CLS]", "query", ":", "w1", "w2", "w3", "docid", ":"]
    assert found["mask"][:, -1].all()  # the docid follows at once
    apart = PromptInputs(tokenizer, 3, continued=False).features(["w1"])
    assert apart["mask"][0].tolist() == [True] * 7 + [False] * 2
    assert apart["ids"][0, 6] == words.index("[SEP]")
    with pytest.raises(EmptyQuery):
        PromptInputs(tokenizer, 3, continued=True).features(["w1", "  "])


# What is trained and what is saved


@pytest.mark.parametrize("name", ["bert", "t5", "qwen2"])
def test_lora_is_put_on_what_targets_name(bases, table, name) -> None:
    target = {"bert": "query", "t5": "q", "qwen2": "q_proj"}[name]
    model, _, _ = built(bases, table, name, targets=[target])
    layers = {n.split(".lora_")[0] for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad}
    assert layers
    assert {layer.rsplit(".", 1)[-1] for layer in layers} == {target}
    with pytest.raises(ModelError, match=r"model\.lora\.targets: .* has no linear layer qkv; it has .*" + target):
        built(bases, table, name, targets=[target, "qkv"])


@pytest.mark.parametrize("name", ["bert", "modernbert", "t5", "qwen2", "llama"])
@pytest.mark.parametrize("finetune", [False, True])
def test_models_reopen_equal(bases, table, tmp_path, name, finetune) -> None:
    model, query, _ = built(bases, table, name, finetune=finetune)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    save_model(tmp_path, model, table.hash)
    assert {path.name for path in tmp_path.iterdir()} == {"model.json", "model.safetensors"}
    again = load_model(tmp_path, table)
    z = torch.zeros(2, 3, dtype=torch.long)
    assert again.logits(again.memory(query), z).equal(model.logits(model.memory(query), z))
    with safe_open(tmp_path / "model.safetensors", "pt") as stream:
        stored = sum(stream.get_tensor(name).numel() for name in stream.keys())  # noqa: SIM118
    assert (stored < 0.5 * sum(p.numel() for p in model.parameters())) != finetune  # LoRA: no frozen weight


def test_another_base_model_is_refused(bases, table, tmp_path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases["bert"], folder)
    config = replace(config_of(bases, "bert"), base=str(folder))
    save_model(tmp_path / "model", build_model(config, DIFFUSION, table), table.hash)
    before = base_hash(config)
    facts = tmp_path / "model" / "model.json"
    facts.write_text(facts.read_text().replace(before, "0" * 64))
    with pytest.raises(ArtifactError, match="hash"):
        load_model(tmp_path / "model", table)


def test_pretrained_weights_train_at_their_own_rate(bases, table) -> None:
    model = build_model(config_of(bases, "modernbert", base_lr=0.02), DIFFUSION, table)
    groups = _groups([p for p in model.parameters() if p.requires_grad], 0.01)
    shares = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert shares[id(model.rows.weight)] == shares[id(model.head.weight)] == 1.0
    assert {shares[id(p)] for p in model.pretrained()} == {0.02}
    assert all(group["weight_decay"] == 0.01 for group in groups)  # LoRA has matrices only


# Which models may be opened


def test_code_of_a_model_runs_for_known_ids_alone(tmp_path, bases) -> None:
    assert all(len(revision) == 40 for revision in REVISIONS.values())
    folder = tmp_path / "LLaDA-8B-Base"
    shutil.copytree(bases["bert"], folder)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llada", "auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}})
    )
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="runs only for GSAI-ML/LLaDA-8B-Base"):
        Pretrained.find(str(folder))
    # An architecture that transformers has is opened without the code that lies beside it.
    native = json.loads((Path(bases["bert"]) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(native | {"auto_map": {"AutoModelForMaskedLM": "evil.Model"}}))
    assert isinstance(Pretrained.find(str(folder)).load("AutoModelForMaskedLM"), transformers.BertForMaskedLM)


def test_token_ids_of_a_kind_are_asserted(bases, tmp_path) -> None:
    with pytest.raises(ModelError, match="mask_token_id=None, expected 126336"):
        mask_id(Pretrained.find(bases["bert"]), KINDS["llada"])
    folder = tmp_path / "dream"
    shutil.copytree(bases["bert"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mask_token_id": 151666}))
    assert mask_id(Pretrained.find(str(folder)), KINDS["dream"]) == 151666
    assert mask_id(Pretrained.find(bases["bert"]), KINDS["masked_lm"]) == SPECIAL.index("[MASK]")


def test_weights_that_are_missing_are_named(bases, tmp_path) -> None:
    """transformers would fill them with random ones and go on."""
    folder = tmp_path / "headless"
    shutil.copytree(bases["bert"], folder)
    network("encoder").save_pretrained(folder)
    with pytest.raises(ModelError, match=r"headless.* has no weights for cls.predictions"):
        Pretrained.find(str(folder)).load("AutoModelForMaskedLM")


def test_absent_models_are_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="nobody/nothing"):
        Pretrained.find("nobody/nothing")


# Configuration


@pytest.mark.parametrize(
    ("model", "arms", "expected"),
    [
        ({"backbone": "masked_lm"}, ["diffusion/rq"], "base names the pretrained model"),
        ({"base": "x"}, ["diffusion/rq"], "base names the pretrained model"),
        ({"finetune": True}, ["diffusion/rq"], "has no pretrained network"),
        ({"backbone": "llada", "base": "x"}, ["diffusion/rq", "classifier/rq"], "for diffusion/ arms only"),
        ({"backbone": "llada", "base": "x"}, ["diffusion/rq", "autoregressive/rq"], "for diffusion/ arms only"),
        ({"backbone": "t5", "base": "x"}, ["diffusion/rq"], "for autoregressive/ arms only"),
        ({"backbone": "causal_lm", "base": "x"}, ["diffusion/rq"], "for autoregressive/ arms only"),
        ({"ar_base": "x"}, ["diffusion/rq"], "of which there is none"),
    ],
)
def test_contradictions_are_found_before_training(model, arms, expected) -> None:
    with pytest.raises(ConfigError, match=expected):
        build(Config, {"model": model, "arms": arms})


@pytest.mark.parametrize("name", ["full_llada", "full_dream", "full_t5"])
def test_full_recipes_are_valid(name) -> None:
    config = load(Config, ROOT / "jobs" / "diffugr" / f"{name}.yaml")
    assert config.docid.levels == 16
    assert config.docid.codes == 512
    assert config.evaluation_problems() == []
    assert "never run" in config.about.what
    assert config.model.base in (*REVISIONS, "")


# From text to hits: prepare, train through fit, decode


@pytest.fixture(scope="session")
def corpus() -> RetrievalData:
    """Documents that share no word; a query names words of its document."""
    documents = [Document(f"d{i}", "", " ".join(WORDS[2 * i : 2 * i + 2])) for i in range(12)]
    rng = np.random.default_rng(0)

    def queries(split: str, count: int) -> list[Query]:
        golds = rng.integers(0, 12, count)
        return [Query(f"{split}{i}", WORDS[2 * g + i % 2], (f"d{g}",)) for i, g in enumerate(golds)]

    return RetrievalData("words", "made", "0", documents, {n: queries(n, 24) for n in ("train", "dev", "test")})


TRAINING = TrainingConfig(steps=80, batch=32, lr=1e-2, workers=0, eval_every=80, report_every=10, warmup=0.1)


def experiment(model: dict, arms: list[str], encoder: str) -> Config:
    docid = {"family": "rq", "levels": 3, "codes": 4, "encoder": encoder, "min_entropy": 0.1}
    pseudo = {"kinds": ["keyphrase"], "per_document": 2, "real_share": 0.9}
    model = {"query_len": 6, "lora": {"rank": 8, "alpha": 16.0}, "base_lr": 1.0, **model}
    return build(Config, {"docid": docid, "pseudo_queries": pseudo, "model": model, "arms": arms})


CASES = {
    "masked_lm LoRA": ("diffusion/rq", lambda b: {"backbone": "masked_lm", "base": b["bert"]}),
    "masked_lm full": ("diffusion/rq", lambda b: {"backbone": "masked_lm", "base": b["modernbert"], "finetune": True}),
    "twin": ("autoregressive/rq", lambda b: {"ar_base": b["t5"], "finetune": False}),
    "decoder twin LoRA": ("autoregressive/rq", lambda b: {"ar_base": b["qwen2"], "finetune": False}),
    "decoder twin full": ("autoregressive/rq", lambda b: {"ar_base": b["llama"], "finetune": True}),
    "encoder": (
        "diffusion/rq",
        lambda b: {"backbone": "encoder", "encoder": b["encoder"], "finetune": True, "width": 32, "base_lr": 0.1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_training_lowers_the_loss_and_the_artifact_decodes(bases, corpus, tmp_path, case) -> None:
    arm, model = parse(CASES[case][0]), CASES[case][1](bases)
    arms = [str(arm)] if arm.paradigm == "diffusion" else ["diffusion/rq", str(arm)]
    config = experiment(model, arms, bases["encoder"])
    material = prepare(config, corpus, tmp_path / "prepared")
    task = docid_task(config, material.prepared, arm)
    result = fit(task, TRAINING, tmp_path / "fit", seed=0, name=case)
    rows = [json.loads(line) for line in result.history.read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]

    trained = load_arm(task, result)
    save_model(tmp_path / "model", trained, task.table.hash)
    again = load_model(tmp_path / "model", task.table)
    query = material.inputs[config.model.reader(arm)].features([q.text for q in corpus.queries["dev"][:3]])
    z = torch.zeros(3, 3, dtype=torch.long)
    assert again.logits(again.memory(query), z).equal(trained.logits(trained.memory(query), z))
    kind, names = (ArDecoder, AR_DECODERS) if arm.paradigm == "autoregressive" else (Decoder, DECODERS)
    for name in names:
        assert len(kind(again, task.table).search(query, [SearchOptions(k=5, decoder=name)] * 3)[0].hits) == 5


@pytest.mark.parametrize("case", ["masked_lm LoRA", "twin", "decoder twin LoRA"])
def test_lora_learns_on_a_base_in_bf16(bases, corpus, tmp_path, case) -> None:
    arm, model = parse(CASES[case][0]), CASES[case][1](bases)
    arms = [str(arm)] if arm.paradigm == "diffusion" else ["diffusion/rq", str(arm)]
    config = experiment(model, arms, bases["encoder"])
    task = docid_task(config, prepare(config, corpus, tmp_path / "prepared").prepared, arm)
    result = fit(task, replace(TRAINING, precision="bf16"), tmp_path / "fit", seed=0, name="bf16")
    losses = [json.loads(line).get("loss") for line in result.history.read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < 0.8 * losses[0]
    with safe_open(result.weights, "pt") as stream:
        assert {stream.get_tensor(name).dtype for name in stream.keys()} == {torch.float32}  # noqa: SIM118


def test_lora_training_resumes_where_it_stopped(bases, corpus, tmp_path) -> None:
    """Frozen weights are in no checkpoint; the base model gives them back."""
    config = experiment({"backbone": "masked_lm", "base": bases["bert"]}, ["diffusion/rq"], bases["encoder"])
    task = docid_task(config, prepare(config, corpus, tmp_path / "prepared").prepared, DIFFUSION)
    settings = replace(TRAINING, steps=6, eval_every=3, checkpoint_every=3)
    whole = fit(task, settings, tmp_path / "whole", seed=0, name="whole")

    class Stop(Exception):
        pass

    def stop(row: dict) -> None:
        if row.get("step") == 5:
            raise Stop

    every = replace(settings, report_every=1)
    with pytest.raises(Stop):
        fit(task, every, tmp_path / "cut", seed=0, name="cut", progress=stop)
    resumed = fit(task, every, tmp_path / "cut", seed=0, name="cut")
    with safe_open(whole.last, "pt") as one, safe_open(resumed.last, "pt") as two:
        assert sorted(one.keys()) == sorted(two.keys())
        assert all(one.get_tensor(name).equal(two.get_tensor(name)) for name in one.keys())  # noqa: SIM118
        assert not [name for name in one.keys() if name.endswith("query.weight")]  # noqa: SIM118


@pytest.mark.parametrize("name", ["t5", "qwen2"])
def test_twin_and_main_arm_read_their_own_inputs(bases, corpus, tmp_path, name) -> None:
    config = experiment({"ar_base": bases[name]}, ["diffusion/rq", "autoregressive/rq"], bases["encoder"])
    material = prepare(config, corpus, tmp_path)
    tasks = [DocidTask(material.prepared, arm, config.model, config.loss) for arm in config.parsed_arms]
    batches = [task.batch(torch.arange(3), torch.Generator().manual_seed(0)) for task in tasks]
    assert "mask" not in batches[0]
    assert "mask" in batches[1]
    assert batches[0]["codes"].equal(batches[1]["codes"])
    assert json.loads((tmp_path / "prepared.json").read_text())["base"] == base_hash(config.model)


# The sentence encoder, trained along


def test_a_trained_encoder_starts_as_the_frozen_one(bases, corpus, tmp_path) -> None:
    """Same weights elsewhere: states computed in the model and states stored beforehand give the same logits."""
    model, arm = {"backbone": "encoder", "encoder": bases["encoder"]}, parse("diffusion/pq")
    frozen = experiment(model, [str(arm)], bases["encoder"])
    frozen = replace(frozen, docid=replace(frozen.docid, levels=4))
    trained = replace(frozen, model=replace(frozen.model, finetune=True))
    material = prepare(frozen, corpus, tmp_path)
    task, other = (docid_task(config, material.prepared, arm) for config in (frozen, trained))
    torch.manual_seed(0)
    one, two = task.build().eval(), other.build().eval()
    shared = one.state_dict()
    own = {n: shared[n.replace("tower.read.", "tower.")] for n in two.state_dict() if n.replace(".read", "") in shared}
    assert not two.load_state_dict(own, strict=False).unexpected_keys
    inputs = make_inputs(trained.model, [arm], np.zeros(1))["main"]
    assert isinstance(material.inputs["main"], StateInputs)
    assert isinstance(inputs, EncoderInputs)
    z, texts = torch.full((2, 4), -1), TEXTS
    a = one.logits(one.memory(material.inputs["main"].features(texts)), z)
    b = two.logits(two.memory(inputs.features(texts)), z)
    assert torch.allclose(a, b, atol=2e-2)  # stored states have half precision
    assert one.prior is not None
    assert not [n for n, p in one.named_parameters() if "network" in n]
    learned = {n for n, p in two.named_parameters() if p.requires_grad and n.startswith("tower.network")}
    assert learned
    assert not [n for n in learned if "pooler" in n]

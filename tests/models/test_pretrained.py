"""Which files a pretrained model is: its hash, and where that is remembered."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mobula.errors import ModelError
from mobula.models import pretrained
from mobula.models.adapters import LoraConfig
from mobula.models.causal import CausalModel, word_tokenizer
from mobula.models.pretrained import Pretrained
from tests.models.tiny_llama import save_llama


def hash_of(folder: Path) -> str:
    """As another process would find it."""
    pretrained._hash.cache_clear()
    return Pretrained.find(str(folder)).hash


def test_an_adapter_knows_the_bin_file_of_its_model(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", word_tokenizer(["a", "b"]))
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    CausalModel.adapted(str(base), LoraConfig(2, 4.0), seed=0).save(tmp_path / "adapter")
    CausalModel.open(str(tmp_path / "adapter"))
    torch.save({name: tensor + 1 for name, tensor in weights.items()}, base / "pytorch_model.bin")
    pretrained._hash.cache_clear()
    with pytest.raises(ModelError, match="was trained on other files of"):
        CausalModel.open(str(tmp_path / "adapter"))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that counts as large, and a cache of its own."""
    monkeypatch.setenv("MOBULA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "LARGE", 0)
    monkeypatch.setattr(pretrained, "SETTLED_S", -1.0)
    return save_llama(tmp_path / "base", word_tokenizer(["a", "b"]))


def test_a_large_model_is_hashed_once_for_all_processes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hash_of(base)
    monkeypatch.setattr(pretrained, "LARGE", 2**40)
    assert hash_of(base) == first  # the same without the cache
    monkeypatch.setattr(pretrained, "LARGE", 0)
    monkeypatch.setattr(pretrained, "hash_files", lambda files: pytest.fail("read again"))
    assert hash_of(base) == first


def test_another_file_of_the_same_size_and_time_is_seen(base: Path) -> None:
    first, path = hash_of(base), base / "config.json"
    before, text = path.stat(), path.read_text()
    time.sleep(0.05)  # coarser than the clock of a file system
    path.write_text(text.replace("512", "513"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert hash_of(base) != first


def test_files_that_have_just_changed_are_not_remembered(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "SETTLED_S", 60.0)
    hash_of(base)
    assert not (tmp_path / "cache").exists()

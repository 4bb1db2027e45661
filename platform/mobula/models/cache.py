"""Embeddings and states on disk, so that no text is encoded twice by the same encoder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mobula.config import digest
from mobula.models.encoders import TextEncoder


class EncodingCache:
    """Memory-mapped ``.npy`` files in a folder, keyed by encoder hash, texts and number of tokens."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def embed(self, encoder: TextEncoder, texts: Sequence[str]) -> np.ndarray:
        """As ``encoder.embed``, read-only."""
        return self._fetch(encoder, texts, None, lambda: {"embeddings": encoder.embed(texts)})["embeddings"]

    def states(
        self, encoder: TextEncoder, texts: Sequence[str], max_tokens: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As ``encoder.states``, read-only."""

        def make() -> dict[str, np.ndarray]:
            return dict(zip(("states", "mask", "pooled"), encoder.states(texts, max_tokens), strict=True))

        found = self._fetch(encoder, texts, max_tokens, make)
        return found["states"], found["mask"], found["pooled"]

    def _fetch(
        self,
        encoder: TextEncoder,
        texts: Sequence[str],
        max_tokens: int | None,
        make: Callable[[], dict[str, np.ndarray]],
    ) -> dict[str, np.ndarray]:
        folder = self.directory / digest([encoder.hash, list(texts), max_tokens])
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}.{os.getpid()}")
            partial.mkdir(parents=True, exist_ok=True)
            for name, array in make().items():
                np.save(partial / f"{name}.npy", array, allow_pickle=False)
            _publish(partial, folder)
        return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(folder.glob("*.npy"))}


def _publish(partial: Path, folder: Path) -> None:
    """Move a complete folder into place; another process may have been first with the same contents."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        for path in partial.iterdir():
            path.unlink()
        partial.rmdir()

"""A built index of a corpus: a folder of parts that are opened by memory map, and a manifest that names them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobula.artifacts import sha256, write_json
from mobula.config import digest
from mobula.data.stored_passages import StoredPassages
from mobula.errors import DataError
from mobula.models.encoders import TextEncoder
from mobula.retrieval.stored_bm25 import StoredBm25
from mobula.retrieval.stored_dense import StoredDense

FORMAT = 1
MANIFEST = "index.json"
KINDS = ("bm25", "dense", "hybrid")
PASSAGES, LEXICAL, VECTORS = "passages", "bm25", "dense"  # folders


@dataclass(frozen=True)
class Manifest:
    """What an index was made of, and its files.

    ``corpus``: name, sha256 and passages of the file. ``bm25``, ``dense``: settings and sizes of the parts that it has.
    ``files``: bytes and sha256 of each.
    """

    corpus: dict[str, Any]
    kind: str
    bm25: dict[str, Any] | None
    dense: dict[str, Any] | None
    files: dict[str, dict[str, Any]]
    format: int = FORMAT

    @property
    def hash(self) -> str:
        """Names the index wherever it lies: 16 hexadecimal digits of what it was made of."""
        return identity(self.corpus["sha256"], self.kind, self.bm25, self.dense)


def identity(corpus: str, kind: str, bm25: dict[str, Any] | None, dense: dict[str, Any] | None) -> str:
    """The hash of an index: that of its corpus, and the settings of its parts, of which there may be more."""
    settings = [bm25 and [bm25["k1"], bm25["b"]], dense and [dense["encoder_hash"], dense["faiss"]]]
    return digest([FORMAT, corpus, kind, *settings])[:16]


def has_part(kind: str, part: str) -> bool:
    """Whether an index of a kind ranks by ``part``, BM25 or vectors."""
    return kind in (part, "hybrid")


def write_manifest(folder: Path, corpus: dict[str, Any], kind: str, bm25: dict | None, dense: dict | None) -> Manifest:
    """Complete the folder of an index with what it holds."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }
    manifest = Manifest(corpus, kind, bm25, dense, files)
    write_json(folder / MANIFEST, asdict(manifest))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an index, all of whose files are there in their sizes.

    Raises:
        DataError: if the folder holds none, or one of another format, or is not whole.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise DataError(f"{folder}: not an index (no {MANIFEST}); make one with `mobula index build`")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise DataError(f"{folder}: index format {values['format']}; this version reads {FORMAT}; build it anew")
        manifest = Manifest(**values)
        sizes = {name: facts["bytes"] for name, facts in manifest.files.items()}
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{file}: damaged manifest ({type(error).__name__}); build the index anew") from error
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise DataError(f"{path}: missing, or not of {size} bytes as in the manifest; build the index anew")
    return manifest


def verify(folder: Path) -> Manifest:
    """As :func:`read_manifest`, with every file's checksum compared.

    Raises:
        DataError: also for a file that was changed.
    """
    manifest = read_manifest(folder)
    for name, facts in manifest.files.items():
        if sha256(folder / name) != facts["sha256"]:
            raise DataError(f"{folder / name}: checksum differs from the manifest; build the index anew")
    return manifest


def open_passages(folder: Path) -> StoredPassages:
    """The passages of an index."""
    return StoredPassages(folder / PASSAGES)


def open_parts(folder: Path, kind: str, encoder: TextEncoder | None) -> list[StoredBm25 | StoredDense]:
    """What ranks the passages of an index by ``kind``, for which it has the parts; ``encoder``: of its vectors."""
    ids = open_passages(folder).ids
    parts: list[StoredBm25 | StoredDense] = []
    if has_part(kind, LEXICAL):
        parts.append(StoredBm25(folder / LEXICAL, ids))
    if encoder is not None:
        parts.append(StoredDense(folder / VECTORS, encoder, ids))
    return parts

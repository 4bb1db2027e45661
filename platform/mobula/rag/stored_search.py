"""Searchers over built indexes: opened by memory map, so that the processes of a machine share what they read."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

from mobula.artifacts import sha256
from mobula.cluster.pool import Pool
from mobula.data.jsonl import corpus_file
from mobula.data.stored_passages import PassagesById
from mobula.environment import data_folder
from mobula.errors import ArtifactError, ConfigError, DataError
from mobula.rag.search import Cached, Index, Searcher, encoder_of, self_test
from mobula.retrieval import build_index
from mobula.retrieval.build_index import BuildOptions
from mobula.retrieval.stored_index import VECTORS, Manifest, has_part, open_parts, open_passages, read_manifest

FOLDER = "indexes"  # of MOBULA_DATA


def open_index(folder: Path, kind: str, encoder: str) -> Searcher:
    """The searcher of a built index, which ranks as :func:`mobula.rag.search.open_searcher` over the same passages.

    Raises:
        DataError: if the folder holds no whole index.
        ConfigError: if the index cannot rank by this kind, or its vectors are of another encoder.
    """
    return Cached(_index(folder, read_manifest(folder), kind, encoder))


def _index(folder: Path, manifest: Manifest, kind: str, encoder: str) -> Index:
    if manifest.kind not in (kind, "hybrid"):
        problem = f"kind={kind}: the index is of kind {manifest.kind}; set retrieve.kind={manifest.kind}"
        raise ConfigError([problem], f"retrieve.index={folder}")
    network = encoder_of(encoder) if has_part(kind, VECTORS) else None
    if network and manifest.dense and network.hash != manifest.dense["encoder_hash"]:
        problem = (
            f"encoder={encoder}: the index has vectors of {manifest.dense['encoder']}, with files of hash "
            f"{manifest.dense['encoder_hash'][:16]}; set retrieve.encoder to it"
        )
        raise ConfigError([problem], f"retrieve.index={folder}")
    passages = PassagesById(open_passages(folder))
    return Index(passages, open_parts(folder, kind, network), f"{manifest.hash}-{kind}")


def build(corpus: Path, out: Path, options: BuildOptions, pool: Pool) -> Manifest:
    """Build an index that finds its own passages; raises as :func:`mobula.retrieval.build_index.build`.

    Raises:
        IndexSelfTestError: if passages cannot be found by their own words.
    """

    def check(folder: Path) -> None:
        searcher = _index(folder, read_manifest(folder), options.kind, options.encoder)
        self_test(searcher, open_passages(folder))

    return build_index.build(corpus, out, options, pool, check)


def passages_of(folder: Path, path: str) -> Container[str]:
    """The ids of the passages of an index.

    Raises:
        DataError: if the folder ``path`` has a corpus, and it is not that of the index.
    """
    manifest, file = read_manifest(folder), corpus_file(path)
    if file and sha256(file) != manifest.corpus["sha256"]:
        raise DataError(
            f"{file}: is not the corpus of retrieve.index={folder}, whose sha256 is {manifest.corpus['sha256']}; build "
            "the index of it, or remove the file: the index has passages of its own"
        )
    return PassagesById(open_passages(folder))


def index_facts(folder: str) -> dict[str, Any] | None:
    """What an artifact says of the index that a run searched; None if there was none."""
    if not folder:
        return None
    manifest = read_manifest(Path(folder))
    facts = {"hash": manifest.hash, "kind": manifest.kind, "corpus_sha256": manifest.corpus["sha256"]}
    return {"path": str(Path(folder).resolve()), **facts}


def find_index(facts: dict[str, Any] | None, artifact: Path) -> str:
    """The folder of the index that an artifact names: where it was, or MOBULA_DATA/indexes/HASH; empty for none.

    Raises:
        ArtifactError: if it is in neither place.
    """
    if facts is None:
        return ""
    root = data_folder()
    places = [Path(facts["path"]), *([root / FOLDER / facts["hash"]] if root else [])]
    for folder in places:
        try:
            if read_manifest(folder).hash == facts["hash"]:
                return str(folder)
        except DataError:
            continue
    raise ArtifactError(
        f"{artifact}: searches the index {facts['hash']} (kind {facts['kind']}, of the corpus with sha256 "
        f"{facts['corpus_sha256']}), which is not in {' or '.join(map(str, places))}; build it there with "
        f"`mobula index build`, or copy or link it to {FOLDER}/{facts['hash']} of the folder that MOBULA_DATA names"
    )

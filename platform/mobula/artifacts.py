"""What a run leaves behind for use elsewhere: a directory with a manifest and a checksum for every file.

Only inert formats are allowed (JSON, JSON lines, text, safetensors), so opening an artifact never runs code.
A manifest finds damage and mismatches; it does not protect against someone who can write to the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mobula.config import digest
from mobula.errors import ArtifactError

FORMAT = 1
MANIFEST = "manifest.json"
ALLOWED = {".json", ".jsonl", ".txt", ".md", ".safetensors", ".yaml"}


@dataclass(frozen=True)
class Artifact:
    """An opened artifact: its directory and its manifest, every file verified."""

    directory: Path
    kind: str
    method: str
    meta: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def identity(self) -> str:
        """What it holds, wherever it lies: 16 hexadecimal digits."""
        return digest([self.method, self.files])[:16]

    def path(self, name: str) -> Path:
        """The path of a file named in the manifest.

        Raises:
            ArtifactError: if the manifest does not name it.
        """
        if name not in self.files:
            raise ArtifactError(f"{self.directory}: no file {name!r}; it holds {', '.join(sorted(self.files))}")
        return self.directory / name

    def read_json(self, name: str) -> Any:
        """Parse a JSON file of the artifact."""
        return json.loads(self.path(name).read_text(encoding="utf-8"))


def write(directory: Path, *, kind: str, method: str, meta: dict[str, Any], fill: Callable[[Path], None]) -> Artifact:
    """Write an artifact: ``fill`` puts the files into a fresh folder, which replaces ``directory`` when complete.

    Raises:
        ArtifactError: if ``fill`` wrote a file of a format that is not allowed.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    files = {}
    for path in sorted(p for p in partial.rglob("*") if p.is_file()):
        if path.suffix not in ALLOWED:
            raise ArtifactError(f"{path.name}: {path.suffix or 'no suffix'} is not an allowed artifact format")
        files[path.relative_to(partial).as_posix()] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    manifest = {"format": FORMAT, "kind": kind, "method": method, "meta": meta, "files": files}
    write_json(partial / MANIFEST, manifest)
    _replace(directory, partial)
    return open_artifact(directory)


def open_artifact(directory: Path, *, kind: str | None = None) -> Artifact:
    """Open and verify an artifact.

    Raises:
        ArtifactError: missing or foreign manifest, unknown format, a file that is missing, changed or not
            listed, or another kind than asked for.
    """
    manifest = _manifest(directory)
    if manifest["format"] != FORMAT:
        raise ArtifactError(f"{directory}: artifact format {manifest['format']}; this version reads {FORMAT}")
    if kind is not None and manifest["kind"] != kind:
        raise ArtifactError(f"{directory}: holds a {manifest['kind']}, expected a {kind}")
    for name, facts in manifest["files"].items():
        _verify(directory, name, facts)
    extra = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    extra -= {*manifest["files"], MANIFEST}
    if extra:
        raise ArtifactError(f"{directory}: {min(extra)!r} is not in the manifest; an artifact holds nothing else")
    return Artifact(directory, manifest["kind"], manifest["method"], manifest["meta"], manifest["files"])


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one, also after a crash."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[Any]:
    """What :func:`write_jsonl` wrote."""
    # Not splitlines(): a text may hold a line separator that JSON leaves as it is.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _replace(directory: Path, partial: Path) -> None:
    """Put ``partial`` in the place of ``directory``; the old content goes only after the new one stands there."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            f"{directory}: not an artifact (no {MANIFEST}); a run writes one under its artifact/ folder"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path}: damaged manifest ({error.__class__.__name__})") from error
    required = {"format": int, "kind": str, "method": str, "meta": dict, "files": dict}
    for name, expected in required.items():
        if not isinstance(manifest, dict) or not isinstance(manifest.get(name), expected):
            raise ArtifactError(f"{path}: foreign or damaged manifest, {name!r} is not a {expected.__name__}")
    return manifest


def _verify(directory: Path, name: str, facts: dict[str, Any]) -> None:
    if not isinstance(facts, dict):
        raise ArtifactError(f"{directory}: damaged manifest, the entry of {name!r} is not a mapping")
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or relative.suffix not in ALLOWED:
        raise ArtifactError(f"{directory}: the manifest names {name!r}, which an artifact may not hold")
    path = directory / name
    if not path.is_file():
        raise ArtifactError(f"{path}: named in the manifest but missing")
    if path.resolve() != directory.resolve() / name:
        raise ArtifactError(f"{path}: leads elsewhere by a symbolic link, which an artifact may not hold")
    if path.stat().st_size != facts.get("bytes") or sha256(path) != facts.get("sha256"):
        raise ArtifactError(f"{path}: checksum differs from the manifest; the file is damaged or was changed")

"""Where a set's files come from, and reading them with errors that name the place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobula.data.records import Document, Query
from mobula.environment import data_folder
from mobula.errors import BadRecord, DataError

DATA = "MOBULA_DATA"
UNSPLIT = "all"


@dataclass
class Collection:
    """What a loader returns. Queries that still have to be divided are under the key ``all``."""

    source: str
    documents: list[Document]
    queries: dict[str, list[Query]]
    notes: dict[str, float | str] = field(default_factory=dict)


def find_folder(name: str, path: str, needed: str, *, subfolder: str) -> tuple[Path, str] | None:
    """The folder that holds the file ``needed`` and a sentence saying where it was found.

    A path given in the config must hold it. Without one, ``MOBULA_DATA/subfolder`` is looked at; None means
    that it is not there, and the caller may go on to a package.

    Raises:
        DataError: if the given path does not hold the file.
    """
    if path:
        folder = Path(path).expanduser()
        if not (folder / needed).exists():
            raise DataError(f"data.path={path}: no {needed} there; name the folder that holds the files of {name}")
        return folder, f"path {path}"
    root = data_folder()
    if root is not None and (root / subfolder / needed).exists():
        return root / subfolder, f"{DATA}/{subfolder}"
    return None


def require_folder(name: str, path: str, needed: str, *, subfolder: str) -> tuple[Path, str]:
    """As :func:`find_folder`, for sets that no package provides.

    Raises:
        DataError: naming the set, where it was looked for and what to do.
    """
    folder = find_folder(name, path, needed, subfolder=subfolder)
    if folder is None:
        root = data_folder()
        looked = f"{DATA} is not set" if root is None else f"no {needed} in {root / subfolder}"
        raise DataError(f"data set {name} not found: {looked}; set {DATA} or data.path to a folder that holds it")
    return folder


def hub_rows(name: str, subset: str, split: str) -> Any:
    """The rows of one split of a data set of the Hugging Face hub, or of its cache.

    Raises:
        DataError: if the id is unknown or, without a network, not in the cache.
    """
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name}: cannot load {subset!r} from the Hugging Face hub or its cache ({first}); check the id, or give a "
            "folder"
        ) from error


def read_text(path: Path) -> str:
    """A text file as UTF-8 with universal newlines.

    Raises:
        DataError: if it is missing or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot read ({error.strerror}); is the data set complete?") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); convert the file") from error


def read_jsonl(
    path: Path, start: int = 0, end: int | None = None, first: int = 1
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) for every non-empty line, one after another.

    ``start`` and ``end``: bytes between which lines are read, the first of which has number ``first``; default: all.

    Raises:
        DataError: if the file is missing or is not UTF-8.
        BadRecord: for a line that is not a JSON object.
    """
    number = first
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            for number, line in enumerate(stream, first):
                if line.strip():
                    yield number, _object(line.decode(), f"{path}, line {number}")
                start += len(line)
                if start == end:
                    return
    except OSError as error:
        raise DataError(f"{path}: cannot read ({error.strerror}); is the data set complete?") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 text; convert the file") from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise BadRecord(f"{where}: not JSON ({error}); expected one object per line") from error
    if not isinstance(value, dict):
        raise BadRecord(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def text_field(value: dict[str, Any], names: tuple[str, ...], where: str, *, optional: bool = False) -> str:
    """The first of the fields ``names`` as text; numbers become text.

    Raises:
        BadRecord: if it is absent (unless optional), empty or neither text nor number.
    """
    text = next((value[n] for n in names if value.get(n) is not None), None)
    if text is None and optional:
        return ""
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise BadRecord(f"{where}: field {names[0]} must be text, found {text!r}")
    if not str(text).strip() and not optional:
        raise BadRecord(f"{where}: field {names[0]} is empty")
    return str(text)


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Relevance grades by query and document, from TREC (4 columns) or BEIR (3 columns with a header) files.

    A document judged more than once keeps its highest grade.

    Raises:
        BadRecord: for a line with another number of columns, or a grade that is not an integer.
    """
    qrels: dict[str, dict[str, int]] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        parts = line.split()
        if not parts or (number == 1 and not parts[-1].lstrip("-").isdigit()):
            continue
        if len(parts) not in (3, 4):
            raise BadRecord(f"{path}, line {number}: expected `query 0 document grade`, found {line!r}")
        try:
            grade = int(parts[-1])
        except ValueError as error:
            raise BadRecord(f"{path}, line {number}: field grade must be an integer, found {parts[-1]!r}") from error
        judged = qrels.setdefault(parts[0], {})
        judged[parts[-2]] = max(grade, judged.get(parts[-2], grade))
    return qrels


def judged_query(id: str, text: str, judged: dict[str, int]) -> Query | None:
    """A query with the documents of positive grade, or None if there is none."""
    relevant = {d: g for d, g in judged.items() if g > 0}
    if not relevant:
        return None
    grades = tuple(relevant.values())
    return Query(id, text, tuple(relevant), None if set(grades) == {1} else grades)


def blocks(text: str, tag: str) -> list[str]:
    """What stands between ``<tag>`` and ``</tag>``, for each occurrence (TREC and classic collections)."""
    return re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL | re.IGNORECASE)

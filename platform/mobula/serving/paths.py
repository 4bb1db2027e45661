"""Paths in the arguments of applications: of this machine's file system, and plain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator


def local(value: Any) -> Path:
    """A local path.

    Raises:
        ValueError: for URLs, `..`, NUL and empty text.
    """
    text = str(value)
    if "://" in text or "\0" in text or not text.strip() or ".." in Path(text).parts:
        raise ValueError(f"{text!r} is not a plain local path (no URL, no '..', no NUL)")
    return Path(text)


LocalPath = Annotated[Path, BeforeValidator(local)]

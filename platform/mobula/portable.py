"""Objects that travel to other processes without what they have opened."""

from __future__ import annotations

from functools import cached_property
from typing import Any


class Portable:
    """Pickles without its cached properties, which are opened again on the other side.

    For tasks, workers and studies: small objects of paths and settings, whose models and indexes are slow to send.
    """

    def __getstate__(self) -> dict[str, Any]:
        cls = type(self)
        return {n: v for n, v in vars(self).items() if not isinstance(getattr(cls, n, None), cached_property)}

"""Stopping work that nobody waits for any more.

A thread cannot be stopped from outside. Long computations ask :func:`raise_if_cancelled` between two network
calls; whoever starts them wraps the call in :func:`cancellable`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_cancelled: ContextVar[Callable[[], bool] | None] = ContextVar("mobula_cancelled", default=None)


class Cancelled(Exception):
    """Nobody waits for the result any more."""


@contextlib.contextmanager
def cancellable(cancelled: Callable[[], bool]) -> Iterator[None]:
    """Within, :func:`raise_if_cancelled` raises as soon as ``cancelled()`` is true. Thread-local, as a context is."""
    token = _cancelled.set(cancelled)
    try:
        yield
    finally:
        _cancelled.reset(token)


def raise_if_cancelled() -> None:
    """Give up if the caller has.

    Raises:
        Cancelled: if so.
    """
    cancelled = _cancelled.get()
    if cancelled is not None and cancelled():
        raise Cancelled

"""Blocks that share one Ray."""

from __future__ import annotations

import pytest
import ray

from mobula.cluster import connect as connecting


def test_the_ray_of_an_inner_block_lasts_as_long_as_the_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training group that finds the Ray of an actor pool outlives the pool."""
    events: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: events.count("start") > events.count("shutdown"))
    monkeypatch.setattr(ray, "shutdown", lambda: events.append("shutdown"))
    monkeypatch.setattr(connecting, "_start", lambda cpus: events.append("start"))
    pool, group = connecting.connect(), connecting.connect()
    pool.__enter__()
    group.__enter__()
    pool.__exit__(None, None, None)
    assert events == ["start"]
    group.__exit__(None, None, None)
    assert events == ["start", "shutdown"]


def test_somebody_elses_ray_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: pytest.fail("not ours to end"))
    with connecting.connect():
        pass

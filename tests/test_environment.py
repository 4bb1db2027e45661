"""The one module that touches the environment."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from mobula import environment

ROOT = Path(__file__).parents[1]


def test_no_other_module_touches_the_environment() -> None:
    touching = re.compile(r"os\.environ|os\.getenv|os\.putenv|from os import .*environ")
    guilty = [
        path.relative_to(ROOT).as_posix()
        for folder in ("platform", "jobs", "serve_apps")
        for path in (ROOT / folder).rglob("*.py")
        if touching.search(path.read_text(encoding="utf-8"))
    ]
    assert [name for name in guilty if name != "platform/mobula/environment.py"] == []


def test_workers_get_what_the_driver_has_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBULA_DATA", "/data")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s3cret")
    monkeypatch.setenv("MOBULA_API_KEY", "s3cret")
    settings = environment.worker_environment(gpu=False, threads=2)
    assert settings["MOBULA_DATA"] == "/data"
    assert settings["DS_ACCELERATOR"] == "cpu"
    assert settings["OMP_NUM_THREADS"] == "2"
    assert "s3cret" not in settings.values()
    assert "DS_ACCELERATOR" not in environment.worker_environment(gpu=True)


def test_what_the_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "7"})
    environment.driver_environment()
    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_remote_cluster_is_polled_at_its_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"RAY_ADDRESS": "head:6379"})
    environment.driver_environment()
    assert "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S" not in os.environ


@pytest.mark.parametrize("fresh", [False, True])
def test_a_token_that_others_can_read_is_closed_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fresh: bool
) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    environment.secure_token_file(fresh=fresh)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert ("mode 644 let others read" in caplog.text) == (not fresh)
    assert "s3cret" not in caplog.text

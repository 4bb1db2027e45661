"""``mobula serve`` from the shell: cluster.yaml's application over a real artifact, until it is interrupted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest

from tests import tiny

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
START_S = 400


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def await_answer(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"{url}/healthz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def test_the_command_serves_a_real_artifact_and_ends_when_interrupted(tmp_path: Path) -> None:
    artifact = tiny.trained(tmp_path)
    port, log = free_port(), tmp_path / "serve.log"
    arguments = [f"--artifact={artifact}", f"--port={port}", "--set=retriever.calibration_s=0"]
    command = [sys.executable, "-m", "mobula.cli", "serve", "retriever", *arguments]
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder, log.open("w") as stream:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "RAY_TMPDIR": folder}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
        try:
            url = f"http://127.0.0.1:{port}"
            await_answer(url, process, log)
            found = httpx.post(f"{url}/search", json={"query": "find a hotel", "k": 3, "steps": 2}, timeout=30)
            assert found.status_code == 200
            assert len(found.json()["hits"]) == 3 and found.json()["retriever"] == "diffusion/rq"
            assert httpx.get(f"{url}/console/", timeout=30).status_code == 200
        finally:
            process.send_signal(signal.SIGINT)
            status = process.wait(120)
    assert status == 0, log.read_text()[-3000:]

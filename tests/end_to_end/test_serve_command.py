"""``mobula serve`` from the shell: cluster.yaml's application over a real artifact, until it is interrupted."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests import tiny
from tests.agents.moat import small
from tests.rag.dro import small as rag
from tests.rag.exsearch import small as searching

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
START_S = 400


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether the command's application comes up; False once its process has ended."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/healthz", timeout=5).status_code == 200:
                return True
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    return False


def said(log: Path, text: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether the command comes to say a text; False once its process has ended."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        if text in log.read_text():
            return True
        time.sleep(0.2)
    return False


@contextlib.contextmanager
def serving(app: str, artifact: Path, port: int, log: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command, with a Ray of its own; what is left of it at the end is killed."""
    arguments = [f"--artifact={artifact}", f"--port={port}", *more]
    command = [sys.executable, "-m", "mobula.cli", "serve", app, *arguments]
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder, log.open("w") as stream:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "RAY_TMPDIR": folder}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def test_the_command_serves_a_real_artifact_and_ends_when_interrupted(tmp_path: Path) -> None:
    artifact = tiny.trained(tmp_path)
    port, log = free_port(), tmp_path / "serve.log"
    url = f"http://127.0.0.1:{port}"
    # Ray gives a node 30 s to come up, which a busy machine may miss: then once more.
    for last in (False, True):
        with serving("retriever", artifact, port, log, "--set=retriever.calibration_s=0") as process:
            if not answers(url, process):
                assert not last, log.read_text()[-3000:]
                continue
            found = httpx.post(f"{url}/search", json={"query": "find a hotel", "k": 3, "steps": 2}, timeout=60)
            assert found.status_code == 200, found.text
            assert len(found.json()["hits"]) == 3 and found.json()["retriever"] == "diffusion/rq"
            assert httpx.get(f"{url}/console/", timeout=60).status_code == 200
            # Serve answers a little before the command has seen that it does; until then Ctrl-C is an interruption.
            assert said(log, "press Ctrl-C", process), log.read_text()[-3000:]
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 0, log.read_text()[-3000:]
        return


def test_the_agents_are_served_and_stream(tmp_path: Path) -> None:
    artifact, task = small.trained(tmp_path), small.known_tasks()[2]
    port, log = free_port(), tmp_path / "serve.log"
    url = f"http://127.0.0.1:{port}/agent"
    for last in (False, True):
        with serving("agent", artifact, port, log) as process:
            if not answers(url, process):
                assert not last, log.read_text()[-3000:]
                continue
            request = {"task": task.text, "family": task.family}
            with httpx.stream("POST", f"{url}/solve", json=request, timeout=60) as answer:
                assert answer.status_code == 200
                names = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event: ")]
            calls = len(str(task.gold_actions).splitlines())
            assert names == ["plan", *["call", "result"] * calls, "answer", "done"]
            found = httpx.post(f"{url}/solve", json={**request, "stream": False}, timeout=60).json()
            assert found["answer"] == task.answer
            assert httpx.get(f"{url}/console/agent.html", timeout=60).status_code == 200
        return


def test_questions_are_served_and_answered_from_passages(tmp_path: Path) -> None:
    artifact = rag.trained(tmp_path)
    port, log = free_port(), tmp_path / "serve.log"
    url = f"http://127.0.0.1:{port}/rag"
    for last in (False, True):
        with serving("rag", artifact, port, log) as process:
            if not answers(url, process):
                assert not last, log.read_text()[-3000:]
                continue
            request = {"question": "where was Arlo born"}
            found = httpx.post(f"{url}/answer", json=request, timeout=60).json()
            assert len(found["passages"]) == 2 and found["answer"]
            assert found["flags"] == {"retriever_failed": False, "selection_failed": False}
            with httpx.stream("POST", f"{url}/answer", json={**request, "stream": True}, timeout=60) as answer:
                names = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event: ")]
            assert names == ["candidates", "selected", "answer", "done"]
            assert httpx.get(f"{url}/console/rag.html", timeout=60).status_code == 200
        return


def test_the_searcher_is_served_and_streams(tmp_path: Path) -> None:
    artifact, problem = searching.trained(tmp_path), searching.known()[1]
    port, log = free_port(), tmp_path / "serve.log"
    url = f"http://127.0.0.1:{port}/searcher"
    for last in (False, True):
        with serving("searcher", artifact, port, log) as process:
            if not answers(url, process):
                assert not last, log.read_text()[-3000:]
                continue
            request = {"question": problem.question}
            with httpx.stream("POST", f"{url}/solve", json=request, timeout=60) as answer:
                assert answer.status_code == 200
                names = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event: ")]
            assert names == [*["search", "evidence", "fact"] * len(problem.plan), "answer", "done"]
            found = httpx.post(f"{url}/solve", json={**request, "stream": False}, timeout=60).json()
            assert found["answer"] == problem.answers[0]
            assert httpx.get(f"{url}/console/searcher.html", timeout=60).status_code == 200
        return

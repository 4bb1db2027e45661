"""The retriever endpoint under Ray Serve against the same application under plain uvicorn: R5.

Both arms answer the same searches on this machine in one run and take turns, round by round; the first round of
each is dropped. The reported ratio is the median over pairs of neighbouring rounds, ours over uvicorn's, so it is
not moved by a machine that is slow for a while. What is served is a small trained DiffuGR, or the artifact that
``python -m benchmarks.serving ARTIFACT`` names.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.measuring import ratio
from mobula.artifacts import open_artifact

ROOT = Path(__file__).resolve().parents[1]
CONCURRENCY = (1, 8)
ROUNDS = 8
ROUND_S = 1.5
START_TIMEOUT_S = 240
SEARCH = {"query": "book a table for two in a restaurant", "k": 10, "steps": 2}
RECIPE = ROOT / "jobs" / "diffugr" / "smoke.yaml"
SMALLER = ["arms=[diffusion/rq]", "training.examples=5000", "evaluation.max_queries=20", "evaluation.resamples=100"]


def run(artifact: Path | None = None) -> dict[str, Any]:
    """Ratios of requests per second, and requests per second and latencies of every arm.

    ``default_over_uvicorn_rps`` and ``haproxy_over_uvicorn_rps`` are at 8 clients; ``..._c1`` at one. A mode that
    cannot be started here is left out of them and named under ``errors`` with the end of its log.
    """
    result: dict[str, Any] = {"name": "serving", "ratios": {}, "arms": {}, "errors": {}, "search": SEARCH}
    with tempfile.TemporaryDirectory(prefix="mb") as folder:
        work = Path(folder)
        artifact = artifact or trained(work)
        result["model"] = described(artifact)
        for proxy in ("default", "haproxy"):
            try:
                # Serve reads its mode when it is imported, so each mode gets processes of its own.
                with started("uvicorn", artifact, work) as plain, started(proxy, artifact, work) as served:
                    measure(proxy, served, plain, result)
            except NotStarted as error:
                result["errors"][proxy] = str(error)
    return result


class NotStarted(Exception):
    """An arm that does not answer; the message ends with its log."""


def trained(work: Path) -> Path:
    """The artifact of a small run, trained here in about a minute."""
    from mobula.running import run_experiment

    with contextlib.redirect_stdout(sys.stderr):
        run_experiment(RECIPE, SMALLER, work / "run")
    return work / "run" / "artifact"


def described(artifact: Path) -> dict[str, Any]:
    """What is served."""
    meta = open_artifact(artifact).meta
    return {name: meta[name] for name in ("default", "documents", "docid", "model", "data")}


def measure(proxy: str, served: str, plain: str, result: dict[str, Any]) -> None:
    """Fill in one mode beside uvicorn, at every number of clients."""
    for clients in CONCURRENCY:
        ours, theirs = paired(served, plain, clients)
        suffix = "" if clients == CONCURRENCY[-1] else f"_c{clients}"
        rps = [[r["rps"] for r in arm] for arm in (ours, theirs)]
        result["ratios"][f"{proxy}_over_uvicorn_rps{suffix}"] = ratio(*rps)
        result["arms"][f"{proxy}_c{clients}"] = summary(ours)
        result["arms"][f"uvicorn_beside_{proxy}_c{clients}"] = summary(theirs)


def paired(ours: str, theirs: str, clients: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rounds of both arms in turn, without the first of each."""
    rows = [(asyncio.run(load(ours, clients)), asyncio.run(load(theirs, clients))) for _ in range(ROUNDS + 1)]
    return [a for a, _ in rows[1:]], [b for _, b in rows[1:]]


async def load(url: str, clients: int) -> dict[str, Any]:
    """One round: ``clients`` connections that ask one search after another."""
    times: list[float] = []
    stop = time.perf_counter() + ROUND_S

    async def client(http: httpx.AsyncClient) -> None:
        while time.perf_counter() < stop:
            start = time.perf_counter()
            answer = await http.post(f"{url}/search", json=SEARCH)
            times.append(time.perf_counter() - start)
            answer.raise_for_status()

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(limits=limits, timeout=30) as http:
        start = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        seconds = time.perf_counter() - start
    return {"rps": len(times) / seconds, "times": times}


def summary(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Requests per second (median over rounds) and latencies in ms over all requests."""
    times = 1000 * np.concatenate([r["times"] for r in rounds])
    p50, p95, p99 = np.percentile(times, [50, 95, 99])
    rps = float(np.median([r["rps"] for r in rounds]))
    return {name: round(float(v), 2) for name, v in (("rps", rps), ("p50_ms", p50), ("p95_ms", p95), ("p99_ms", p99))}


@contextlib.contextmanager
def started(arm: str, artifact: Path, work: Path) -> Iterator[str]:
    """The address of an arm that runs in a process of its own, until the block ends.

    Raises:
        NotStarted: if it does not answer.
    """
    port = free_port()
    log = work / f"{arm}-{port}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    if arm == "haproxy":
        # The arm imports ray.serve at once, which reads them then.
        environment |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    command = [sys.executable, "-m", "benchmarks.serving_arm", arm, str(port), str(artifact)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
    url = f"http://127.0.0.1:{port}"
    try:
        _await(url, process, log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _await(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/healthz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    tail = "\n".join(log.read_text().splitlines()[-15:])
    ended = process.poll() is not None
    why = f"the process ended with status {process.returncode}" if ended else f"no answer within {START_TIMEOUT_S} s"
    raise NotStarted(f"{why}:\n{tail}")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    print(json.dumps(run(*map(Path, sys.argv[1:])), indent=2))

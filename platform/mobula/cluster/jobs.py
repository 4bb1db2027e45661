"""Jobs on a running cluster: submit, status, logs, stop.

The job API wants the cluster's token: ``RAY_AUTH_MODE=token`` is set before Ray's client is imported, and the
token itself is found by Ray (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token). It is never passed on.
"""

from __future__ import annotations

import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobula import environment
from mobula.errors import ClusterError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ADDRESS = "http://127.0.0.1:8265"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
POLL_S = 0.5
PATIENCE_S = 30.0


def client(address: str = ADDRESS) -> JobSubmissionClient:
    """A client of a cluster's job API.

    Raises:
        ClusterError: if nothing answers there, or it refuses the token.
    """
    environment.driver_environment()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ClusterError(
            f"the cluster at {address} does not accept this user's token; put its token into "
            f"{environment.token_file()} (mode 600), or name another file in RAY_AUTH_TOKEN_PATH"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ClusterError(
            f"no cluster answers at {address} ({reason}); start one with `ray start --head` under "
            "RAY_AUTH_MODE=token, or give its address"
        ) from error


def submit(
    arguments: Sequence[str],
    *,
    address: str = ADDRESS,
    working_dir: Path = Path(),
    name: str | None = None,
    cpus: float = 0.0,
    start_timeout_s: float = 120.0,
    progress: Callable[[str], None] = print,
) -> str:
    """Submit ``arguments`` (a command line, one entry per argument) and wait until the job runs; its id.

    The working directory is uploaded (.gitignore and .rayignore are honoured). ``cpus`` reserves cores for the
    entrypoint, which runs on the head where it is 0.

    Raises:
        ClusterError: if the name is not allowed, the cluster does not answer, or the job does not start in time
            (it is stopped then, and Ray's message is part of the error).
    """
    if not arguments:
        raise ClusterError("nothing to submit; put a command after --: `mobula submit -- python jobs/train.py X.yaml`")
    if name is not None and not NAME.fullmatch(name):
        raise ClusterError(f"job name {name!r}: expected 1 to 64 of A-Z a-z 0-9 . _ -")
    jobs = client(address)
    deadline = time.monotonic() + start_timeout_s
    request = {
        "entrypoint": shlex.join(arguments),
        # Named here, so that a job whose submission was cut off can be looked up.
        "submission_id": name or f"mobula_{secrets.token_hex(8)}",
        "runtime_env": {"working_dir": str(working_dir.resolve()), "env_vars": environment.job_environment()},
        "entrypoint_num_cpus": cpus or None,
    }
    job_id = _submit(jobs, request, deadline)
    progress(f"submitted {job_id}: {shlex.join(arguments)}")
    _await_start(jobs, job_id, deadline)
    return job_id


def status(job_id: str, address: str = ADDRESS) -> dict[str, Any]:
    """Status, message, entrypoint and times (milliseconds since 1970) of a job.

    Raises:
        ClusterError: if there is no such job.
    """
    info = _info(client(address), job_id)
    names = ("submission_id", "status", "message", "entrypoint", "start_time", "end_time", "driver_exit_code")
    return {name: _plain(getattr(info, name)) for name in names}


def logs(job_id: str, address: str = ADDRESS) -> Iterator[str]:
    """The job's output so far and then as it comes, until the job ends.

    Raises:
        ClusterError: if there is no such job.
    """
    import asyncio

    jobs = client(address)
    _info(jobs, job_id)
    tail = jobs.tail_job_logs(job_id)
    with asyncio.Runner() as runner:
        while True:
            try:
                yield runner.run(anext(tail))  # type: ignore[arg-type]
            except StopAsyncIteration:
                return


def wait(job_id: str, address: str = ADDRESS) -> str:
    """Wait until a job has ended; its status (SUCCEEDED, FAILED or STOPPED)."""
    jobs = client(address)
    while not (info := _info(jobs, job_id)).status.is_terminal():
        time.sleep(POLL_S)
    return info.status.value


def stop(job_id: str, address: str = ADDRESS) -> bool:
    """Stop a job; False if it had ended before.

    Raises:
        ClusterError: if there is no such job.
    """
    jobs = client(address)
    _info(jobs, job_id)
    return jobs.stop_job(job_id)


def _submit(jobs: JobSubmissionClient, request: dict[str, Any], deadline: float) -> str:
    while True:
        try:
            return jobs.submit_job(**request)
        except (RuntimeError, ValueError, OSError) as error:
            if isinstance(error, OSError) and _arrived(jobs, request):
                return request["submission_id"]
            # A head that has just started has no agent yet; a busy one drops a connection now and then.
            passing = isinstance(error, OSError) or "No available agent" in str(error)
            if not passing or time.monotonic() > deadline:
                raise ClusterError(f"the cluster refused the job: {' '.join(str(error).split())[:300]}") from error
        time.sleep(POLL_S)


def _arrived(jobs: JobSubmissionClient, request: dict[str, Any]) -> bool:
    try:
        return _info(jobs, request["submission_id"]).entrypoint == request["entrypoint"]
    except ClusterError:
        return False


def _await_start(jobs: JobSubmissionClient, job_id: str, deadline: float) -> None:
    # A job whose environment cannot be built stays PENDING up to 15 minutes without a word.
    info = _info(jobs, job_id)
    while info.status.value == "PENDING" and time.monotonic() < deadline:
        time.sleep(POLL_S)
        info = _info(jobs, job_id)
    if info.status.value == "PENDING":
        jobs.stop_job(job_id)
        raise ClusterError(f"job {job_id} did not start in time and was stopped: {info.message}")
    if info.status.value == "FAILED":
        raise ClusterError(f"job {job_id} failed: {info.message}; see `mobula job logs {job_id}`")


def _info(jobs: JobSubmissionClient, job_id: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return jobs.get_job_info(job_id)
        except OSError as error:
            # A busy head drops a connection now and then; the job goes on.
            if time.monotonic() > deadline:
                raise ClusterError(f"the cluster no longer answers ({' '.join(str(error).split())[:200]})") from error
            time.sleep(POLL_S)
        except RuntimeError as error:
            if "does not exist" not in str(error) and "404" not in str(error):
                raise
            raise ClusterError(f"no job {job_id!r} on this cluster") from error


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)

"""Every environment variable that Mobula reads, sets or forwards. No other module touches ``os.environ``.

A variable of the driver's shell does not reach Ray's workers by itself: what they need goes through
:func:`worker_environment` into their runtime environment. No secret is ever forwarded.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

# What the user may have set and what workers must see as the driver does.
FORWARDED = ("MOBULA_DATA", "MOBULA_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
# A controller of Ray Train looks at its workers this often. Ray's 2 s delays every report on a small machine.
LOCAL_POLL_S = 0.2
START_TIMEOUT_S = 180


def data_folder() -> Path | None:
    """The folder of data sets that MOBULA_DATA names, or None."""
    value = os.environ.get("MOBULA_DATA")
    return Path(value) if value else None


def cache_folder() -> Path:
    """Where Mobula keeps what it can make again (MOBULA_CACHE, else ~/.cache/mobula)."""
    return Path(os.environ.get("MOBULA_CACHE") or "~/.cache/mobula").expanduser()


def ray_address() -> str | None:
    """The running cluster to attach to (set by the user or, inside a job, by Ray), or None."""
    return os.environ.get("RAY_ADDRESS") or None


def in_job() -> bool:
    """Whether this process is the entrypoint of a Ray job, whose working directory is temporary."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def driver_environment() -> None:
    """Set what Ray and DeepSpeed read from the driver's environment. Call it before either is imported.

    What the user has set already is kept.
    """
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray Train's print patch shows every line of a worker twice.
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_TIMEOUT_S),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if "ray" not in sys.modules:
        # Ray reads this one when it is imported. Set later, only the servers it starts would ask for a token.
        settings["RAY_AUTH_MODE"] = "token"
    if ray_address() is None:
        settings["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(LOCAL_POLL_S)
        # Ray's workers give way to every other process (nice 15) and starve on a busy machine, though they are what
        # the user waits for.
        settings["RAY_worker_niceness"] = "0"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def in_process_environment(gpu: bool) -> None:
    """Set what DeepSpeed reads when a model is trained in this process. Call it before DeepSpeed is imported."""
    # DeepSpeed wants a launcher's variable even where the process group exists; Ray Train sets it in its workers.
    os.environ.setdefault("LOCAL_RANK", "0")
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def worker_environment(gpu: bool, threads: int = 1) -> dict[str, str]:
    """The variables of a worker, for ``runtime_env["env_vars"]``.

    ``threads`` is the number of threads each worker computes with.
    """
    settings = {
        "OMP_NUM_THREADS": str(max(1, threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if not gpu:
        settings["DS_ACCELERATOR"] = "cpu"
    settings.update({name: os.environ[name] for name in FORWARDED if name in os.environ})
    return settings


def vllm_environment() -> None:
    """Set what vLLM reads. Call it before vLLM is imported."""
    settings = {
        # The engine computes in its actor: a process of its own would outlive an actor that is killed.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Actors share a machine, so that none may bind its threads to cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def token_file() -> Path:
    """Where Ray keeps the token of this user's clusters."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def secure_token_file(*, fresh: bool = False) -> None:
    """Make the token file readable by its owner alone, and warn if others could read it before.

    Ray creates the file with the mode that the umask gives, usually readable by everyone; directly after that
    (``fresh``) nobody needs a warning.
    """
    path = token_file()
    if not path.is_file():
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & 0o077:
        return
    try:
        path.chmod(0o600)
    except OSError as error:
        logger.warning("%s: mode %o lets others read the token and cannot be changed (%s)", path, mode, error.strerror)
        return
    if not fresh:
        logger.warning("%s: mode %o let others read the token of this user's clusters; set to 600", path, mode)


def job_environment() -> dict[str, str]:
    """The variables of a submitted job. PYTHONPATH is relative: Ray resolves it in the unpacked working directory."""
    forwarded = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    return {"PYTHONPATH": "platform", "RAY_USAGE_STATS_ENABLED": "0", **forwarded}


def serve_environment(haproxy: bool) -> None:
    """Set what Ray Serve reads when it starts. Call it before ``ray.serve`` is imported and Ray is started."""
    # On a busy machine the proxy's own imports take longer than Serve's 5 s, and Serve then kills it.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", str(START_TIMEOUT_S))
    if haproxy:
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"


def tune_environment() -> None:
    """Set what Ray Tune reads from the driver's environment. Call it before a sweep starts."""
    settings = {
        # Trials keep the driver's working directory, so a relative path means the same everywhere.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        # Seconds between snapshots of a sweep; Ray's 10 s is longer than many of our trials.
        "TUNE_GLOBAL_CHECKPOINT_S": "1",
        # Ctrl-C stops a sweep like any program; Tune would return the trials so far as if they were all.
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        # No CSV and TensorBoard file per trial: a sweep writes its own table.
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    }
    os.environ.update(settings)


def api_key() -> str | None:
    """The key of the HTTP endpoints (MOBULA_API_KEY), or None."""
    return os.environ.get("MOBULA_API_KEY") or None


def secret(variable: str) -> str | None:
    """The key of somebody's endpoint, in the variable that a config names; None if it is not set."""
    return os.environ.get(variable) or None

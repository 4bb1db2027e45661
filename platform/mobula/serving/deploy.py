"""`mobula serve`: deploy applications of cluster.yaml and wait until they answer.

``ray.serve`` reads its settings when it is imported, so it is imported here only after they are set.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from mobula import artifacts, environment
from mobula.cluster.connect import connect
from mobula.cluster.spec import ClusterSpec
from mobula.config import nearest
from mobula.errors import ClusterError, ConfigError

POLL_S = 0.5
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


@dataclass(frozen=True)
class Endpoint:
    """A deployed application."""

    name: str
    url: str
    key_required: bool


def serve(
    spec: ClusterSpec,
    apps: Sequence[str] = (),
    overrides: Sequence[str] = (),
    *,
    host: str | None = None,
    port: int | None = None,
    timeout_s: float = 300.0,
    progress: Callable[[str], None] = print,
) -> list[Endpoint]:
    """Deploy ``apps`` (all of the file if none is named) on the running Ray and wait until they answer.

    ``overrides`` set arguments: ``retriever.artifact=runs/x/artifact``. Relative paths are relative to the
    current directory. Ray must be connected; applications go on after this process only on a cluster that does.

    Raises:
        ConfigError: if the configuration is wrong, or a key is required and there is none.
        ArtifactError: if an artifact is missing, damaged or foreign.
        ClusterError: if an application does not start in time; its message is part of the error.
    """
    config = configuration(spec, apps, overrides, host=host, port=port)
    for application in config["applications"]:
        _check_readable(application["args"])
    _start(config)
    _await_running([a["name"] for a in config["applications"]], timeout_s, progress)
    return [_endpoint(config, application) for application in config["applications"]]


def run(
    spec: ClusterSpec,
    apps: Sequence[str] = (),
    overrides: Sequence[str] = (),
    *,
    host: str | None = None,
    port: int | None = None,
    progress: Callable[[str], None] = print,
) -> None:
    """Connect to Ray, :func:`serve`, and print the addresses.

    Without a cluster (RAY_ADDRESS) a local Ray serves until this process gets SIGINT or SIGTERM; on a cluster the
    applications go on after it returns.

    Raises:
        as :func:`serve`.
    """
    configuration(spec, apps, overrides, host=host, port=port)
    with connect():
        for endpoint in serve(spec, apps, overrides, host=host, port=port, progress=progress):
            key = ", API key required" if endpoint.key_required else ""
            progress(f"{endpoint.name}: {endpoint.url} (console: {endpoint.url}console/{key})")
        if environment.ray_address() is None:
            progress("press Ctrl-C to stop")
            _until_signalled()
            shutdown()


def _until_signalled() -> None:
    stop = threading.Event()
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def configuration(
    spec: ClusterSpec,
    apps: Sequence[str] = (),
    overrides: Sequence[str] = (),
    *,
    host: str | None = None,
    port: int | None = None,
) -> dict[str, Any]:
    """The checked Serve config as it will be deployed from this directory.

    Raises:
        ConfigError: with everything that is wrong in it.
    """
    environment.driver_environment()
    environment.serve_environment(spec.platform.haproxy)
    from mobula.serving import schema

    _check_proxy(spec)
    changed = spec.serve
    http = changed.setdefault("http_options", {})
    http.update({name: value for name, value in (("host", host), ("port", port)) if value is not None})
    schema.override(changed, [_assignment(text) for text in overrides])
    config = schema.check(spec, changed)
    names = [a["name"] for a in config["applications"]]
    for name in apps:
        if name not in names:
            raise ConfigError([f"no application {name!r}{nearest(name, names)}"], str(spec.path))
    config["applications"] = [a for a in config["applications"] if not apps or a["name"] in apps]
    for application in config["applications"]:
        _anchor(application, schema.args_model(application["import_path"]), Path.cwd())
    return config


def shutdown() -> None:
    """Stop Serve and all applications of the connected cluster."""
    from ray import serve as ray_serve

    ray_serve.shutdown()


def _check_proxy(spec: ClusterSpec) -> None:
    """Serve fixes its proxy when it is imported; a file that asks for the other one would be ignored silently."""
    from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY

    if bool(RAY_SERVE_ENABLE_HA_PROXY) != spec.platform.haproxy:
        raise ClusterError(
            f"{spec.path}: metadata.haproxy={str(spec.platform.haproxy).lower()}, but this process loaded Ray Serve "
            f"with RAY_SERVE_ENABLE_HA_PROXY={int(RAY_SERVE_ENABLE_HA_PROXY)}; make them agree and start again"
        )


def _assignment(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError([f"override {text!r} is not of the form APPLICATION.key=value"], "serve")
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError([f"override {text!r}: the value is not valid YAML"], "serve") from error


def _anchor(application: dict[str, Any], model: Any, root: Path) -> None:
    """Make paths absolute and the packages importable: replicas start in a directory of their own."""
    _anchor_paths(application["args"], model, root)
    variables = application.setdefault("runtime_env", {}).setdefault("env_vars", {})
    variables.setdefault("PYTHONPATH", f"{root / 'platform'}:{root}")


def _anchor_paths(values: dict[str, Any], model: Any, root: Path) -> None:
    for name, field in model.model_fields.items():
        kinds = list(_kinds(field.annotation))
        if Path in kinds and values.get(name) is not None:
            values[name] = str(root / values[name])
        for inner in (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)):
            for value in values.get(name) or ():
                _anchor_paths(value, inner, root)


def _kinds(annotation: Any) -> Iterator[Any]:
    """What an annotation is made of: `Annotated[Path, ...] | None` holds a Path."""
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds(inner)


def _check_readable(args: dict[str, Any]) -> None:
    """Find here, in one line, what would otherwise fail inside a replica."""
    from mobula.serving.limits import load_keys

    if "artifact" in args:
        artifacts.open_artifact(Path(args["artifact"]))
    if args.get("key_required"):
        load_keys(True, Path(args["key_file"]) if args.get("key_file") else None)


def _start(config: dict[str, Any]) -> None:
    from ray import serve as ray_serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    ray_serve.start(proxy_location=config.get("proxy_location"), http_options=config["http_options"])
    # What Serve's REST API does with a config; it has no public name in Python (Ray 2.60).
    client = _get_global_client()
    assert client is not None  # it was started above
    running = client.http_config
    wanted = config["http_options"]
    if (running.host, running.port) != (wanted["host"], wanted["port"]):
        raise ClusterError(
            f"Serve runs already on {running.host}:{running.port}, which cannot change while it runs; "
            "stop it with `serve shutdown`, or serve there"
        )
    client.deploy_apps(ServeDeploySchema.model_validate(config))


def _await_running(names: Sequence[str], timeout_s: float, progress: Callable[[str], None]) -> None:
    from ray import serve as ray_serve

    deadline = time.monotonic() + timeout_s
    seen: dict[str, str] = {}
    while True:
        applications = ray_serve.status().applications
        for name in names:
            application = applications.get(name)
            status = application.status.value if application else "NOT_STARTED"
            if seen.get(name) != status:
                progress(f"{name}: {status.lower().replace('_', ' ')}")
                seen[name] = status
            if application and status in FAILED:
                raise ClusterError(f"{name} did not start: {_reason(application)}")
        if all(status == "RUNNING" for status in seen.values()):
            return
        if time.monotonic() > deadline:
            waiting = ", ".join(f"{n} is {s}" for n, s in seen.items() if s != "RUNNING")
            raise ClusterError(f"not running after {timeout_s:g} s: {waiting}; `ray status` shows what it waits for")
        time.sleep(POLL_S)


def _reason(application: Any) -> str:
    """The last line of what Serve says, which names the exception; the rest is a traceback."""
    messages = [d.message for d in application.deployments.values() if d.message] or [application.message]
    lines = [line.strip() for line in messages[0].splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def _endpoint(config: dict[str, Any], application: dict[str, Any]) -> Endpoint:
    http = config["http_options"]
    prefix = (application.get("route_prefix") or "/").rstrip("/")
    url = f"http://{http['host']}:{http['port']}{http.get('root_path') or ''}{prefix}/"
    return Endpoint(application["name"], url, bool(application["args"].get("key_required")))

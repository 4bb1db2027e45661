"""The Serve part of cluster.yaml: Ray's own schema, with the checks that Ray does not make.

Ray ignores unknown keys, binds all interfaces where no host is given and leaves time and queues unbounded
(Ray 2.60), so keys are compared with the schema's fields and these settings must be written out.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import pydantic
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from mobula.cluster.spec import ClusterSpec, is_loopback
from mobula.config import nearest
from mobula.errors import ConfigError


def check(spec: ClusterSpec, changed: dict[str, Any] | None = None) -> dict[str, Any]:
    """The checked Serve config of a cluster file (or what became of it by overrides), ready to deploy.

    Applications that take ``key_required`` get it from the host: a key is wanted unless it is loopback.

    Raises:
        ConfigError: with everything that is wrong in it.
    """
    serve = spec.serve if changed is None else changed
    problems = [f"metadata.serve.{problem}" for problem in _problems(serve)]
    if problems:
        raise ConfigError(problems, str(spec.path))
    try:
        ServeDeploySchema.model_validate(serve)
    except pydantic.ValidationError as error:
        raise ConfigError([f"metadata.serve.{line}" for line in _lines(error)], str(spec.path)) from error
    public = not is_loopback(serve["http_options"]["host"])
    for application in serve["applications"]:
        problems += [f"metadata.serve.{p}" for p in _complete_args(application, public)]
    if problems:
        raise ConfigError(problems, str(spec.path))
    return serve


def override(serve: dict[str, Any], assignments: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Set ``APPLICATION.key`` in the arguments of applications.

    Raises:
        ConfigError: if there is no application of that name.
    """
    applications = {a["name"]: a for a in serve["applications"]}
    for dotted, value in assignments:
        name, _, argument = dotted.partition(".")
        if name not in applications or not argument:
            raise ConfigError([f"{dotted}: expected APPLICATION.key{nearest(name, list(applications))}"], "serve")
        applications[name].setdefault("args", {})[argument] = value
    return serve


def args_model(import_path: str) -> type[pydantic.BaseModel]:
    """The typed arguments of an application's builder.

    Raises:
        ConfigError: if the builder cannot be imported or takes no typed arguments.
    """
    module, _, name = import_path.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        # The `mobula` script starts without it, and serve_apps/ is not an installed package.
        sys.path.append(here)
    try:
        builder = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError([f"import_path {import_path!r} cannot be imported ({error})"], "serve") from error
    hints = [h for k, h in get_type_hints(builder).items() if k != "return"]
    if not hints or not issubclass(hints[0], pydantic.BaseModel):
        raise ConfigError([f"{import_path} takes no typed arguments (a pydantic model)"], "serve")
    return hints[0]


def _problems(serve: dict[str, Any]) -> Iterator[str]:
    yield from _unknown("", serve, ServeDeploySchema)
    http = serve.get("http_options") or {}
    yield from _unknown("http_options.", http, HTTPOptionsSchema)
    for name in ("host", "port", "request_timeout_s"):
        if http.get(name) is None:
            yield f"http_options.{name} is missing; without it Ray {_CONSEQUENCE[name]}"
    applications = serve.get("applications") or []
    if not applications:
        yield "applications is empty; name at least one application"
    for application in applications:
        yield from _application_problems(application)


_CONSEQUENCE = {
    "host": "listens on all interfaces",
    "port": "takes 8000, which may be another program's",
    "request_timeout_s": "waits for ever",
    "max_ongoing_requests": "takes 5 at a time",
    "max_queued_requests": "queues without bound",
}


def _application_problems(application: dict[str, Any]) -> Iterator[str]:
    prefix = f"applications.{application.get('name', '?')}."
    yield from _unknown(prefix, application, ServeApplicationSchema)
    deployments = application.get("deployments") or []
    if not deployments:
        yield f"{prefix}deployments is missing; name the deployment and its limits"
    for deployment in deployments:
        here = f"{prefix}deployments.{deployment.get('name', '?')}."
        yield from _unknown(here, deployment, DeploymentSchema)
        yield from _unknown(f"{here}ray_actor_options.", deployment.get("ray_actor_options"), RayActorOptionsSchema)
        yield from _unknown(f"{here}autoscaling_config.", deployment.get("autoscaling_config"), AutoscalingConfig)
        for name in ("max_ongoing_requests", "max_queued_requests"):
            value = deployment.get(name)
            if value is None or value < 1:
                yield f"{here}{name}={value}: write a positive number; without it Ray {_CONSEQUENCE[name]}"
        if (deployment.get("backpressure_config") or {}).get("status_code") != 429:
            yield f"{here}backpressure_config.status_code must be 429 (too many requests, come back later)"


def _unknown(prefix: str, values: Any, schema: type[pydantic.BaseModel]) -> Iterator[str]:
    valid = list(schema.model_fields)
    for name in values if isinstance(values, dict) else ():
        if name not in valid:
            yield f"{prefix}{name} is not a key of Ray Serve{nearest(name, valid)}"


def _complete_args(application: dict[str, Any], public: bool) -> Iterator[str]:
    model = args_model(application["import_path"])
    args = application.setdefault("args", {})
    if "key_required" in model.model_fields:
        if public and args.get("key_required") is False:
            yield f"applications.{application['name']}.args.key_required=false, but the host is not loopback"
        args.setdefault("key_required", public)
    prefix = f"applications.{application['name']}.args."
    for name in args:
        if name not in model.model_fields:
            yield f"{prefix}{name} is unknown{nearest(name, list(model.model_fields))}"
    try:
        model.model_validate(args)
    except pydantic.ValidationError as error:
        yield from (f"{prefix}{line}" for line in _lines(error) if "Extra inputs" not in line)


def _lines(error: pydantic.ValidationError) -> list[str]:
    return [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False)]

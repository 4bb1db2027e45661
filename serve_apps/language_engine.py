"""The engines of the `language_model` application, and OpenAI's routes over them, by Ray Serve LLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.llm._internal.serve.core.configs.openai_api_models import ModelCard, OpenAIHTTPException
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.llm import LLMConfig, LLMServer, build_llm_deployment
from ray.serve.llm.ingress import OpenAiIngress
from starlette.responses import Response

from mobula.errors import ModelError
from mobula.models.adapters import CONFIG, read_base
from mobula.models.encoders import read_json
from mobula.models.pretrained import Pretrained
from mobula.models.vllm_engine import ADAPTERS, Room
from mobula.serving import errors
from mobula.serving.app import time_limit
from serve_apps.language_model import LanguageModelArgs, ServedModel


class Engine(LLMServer):
    """A base model's engine with its adapters, each of which it serves by name.

    Ray's own way to adapters (2.60) takes them from cloud storage alone.
    """

    async def __init__(self, llm_config: LLMConfig, adapters: Mapping[str, str]) -> None:
        await super().__init__(llm_config)
        for number, (name, folder) in enumerate(adapters.items(), 1):
            adapter = DiskMultiplexConfig(
                model_id=name, max_total_tokens=None, local_path=folder, lora_assigned_int_id=number
            )
            await self.engine.resolve_lora(adapter)


class Ingress(OpenAiIngress):
    """OpenAI's routes; an answer begins within ``seconds``."""

    def __init__(self, engines: Mapping[str, DeploymentHandle], seconds: float) -> None:
        shared = {"object": "model", "owned_by": "mobula", "permission": [], "metadata": {}}
        super().__init__(dict(engines), {name: ModelCard(id=name, **shared) for name in engines})
        self._seconds = seconds

    async def _process_llm_request(self, body: Any, call_method: str, raw_request: Request | None = None) -> Response:
        async with time_limit(self._seconds):
            return await super()._process_llm_request(body, call_method, raw_request)


def add_errors(app: FastAPI) -> None:
    """Give what the engines refuse the shape of every other error here."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, OpenAIHTTPException)
        return errors.response(request.scope, error.status_code, error.type, error.message)

    app.add_exception_handler(OpenAIHTTPException, refused)


def bind(args: LanguageModelArgs) -> dict[str, Application]:
    """The engine of every model by its id: adapters on the same base share one with it.

    Raises:
        ModelError: if a model is not there, or an adapter is none or too large for an engine.
    """
    sources: dict[str, list[ServedModel]] = {}
    for model in args.models:
        sources.setdefault(_source(model), []).append(model)
    engines = {source: _engine(source, models, args) for source, models in sources.items()}
    return {model.id: engines[source] for source, models in sources.items() for model in models}


def _source(model: ServedModel) -> str:
    if model.adapter is None:
        return model.base
    base = read_base(model.adapter)
    if base is None:
        raise ModelError(f"models, {model.id}: {model.adapter} holds no adapter (no adapter_config.json and base.json)")
    return base.name


def _engine(source: str, models: Sequence[ServedModel], args: LanguageModelArgs) -> Application:
    pretrained = Pretrained.find(source)
    adapters = {model.id: model.adapter for model in models if model.adapter is not None}
    plain = next((model.id for model in models if model.adapter is None), f"base of {' '.join(adapters)}")
    rooms = [Room.of(read_json(folder / CONFIG)) for folder in adapters.values()]
    rank = max((room.rank for room in rooms), default=0)
    lora = {"enable_lora": True, "max_lora_rank": rank, "max_loras": ADAPTERS} if rooms else {}
    devices = max(1, args.gpus)
    config = LLMConfig(
        model_loading_config={"model_id": plain, "model_source": str(pretrained.folder)},
        engine_kwargs={
            "tokenizer": str(pretrained.tokenizer_folder),
            "dtype": args.dtype,
            "max_model_len": args.context,
            "kv_cache_memory_bytes": round(args.cache_gb * 2**30),
            "tensor_parallel_size": devices,
            "enforce_eager": not args.gpus,
            **lora,
        },
        placement_group_config={"bundles": [{"CPU": args.cpus, "GPU": min(1, args.gpus)}] * devices},
        # The bundle is all that an engine takes; Ray would add a core for the replica that holds it.
        deployment_config={"num_replicas": args.engines, "ray_actor_options": {"num_cpus": 0}},
        log_engine_metrics=False,
    )
    folders = {name: str(folder.resolve()) for name, folder in adapters.items()}
    return build_llm_deployment(config, bind_kwargs={"adapters": folders}, deployment_cls=Engine)

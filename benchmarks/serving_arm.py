"""One arm of the serving benchmark, in a process of its own: ``python -m benchmarks.serving_arm ARM PORT WORK``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ray import serve
from ray.serve import Application

from mobula import artifacts
from mobula.cluster import spec as specs
from mobula.data.records import Document, RetrievalData
from mobula.models.encoders import load_encoder
from mobula.retrieval.arms import parse
from mobula.retrieval.build import ModelConfig, build_model
from mobula.retrieval.docids.config import DocidConfig
from mobula.retrieval.library import Library
from mobula.retrieval.prepare import corpus_mean, fit_family, make_inputs
from mobula.retrieval.retrievers import DocidRetriever
from mobula.serving import deploy, pages
from serve_apps.retriever import Corpus, Retriever, RetrieverArgs, State, create_app

ROOT = Path(__file__).resolve().parents[1]
ARM = "diffusion/rq"
DOCUMENTS, WORDS = 1000, 40
ADJECTIVES, NOUNS = ("dark", "light", "blue", "warm", "salt"), ("sea", "ray", "reef", "moon", "wave", "school")
VOCABULARY = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
UNLIMITED = {"key_required": False, "requests_per_s": 1e9, "burst": 10**9, "calibration_s": 0, "added": None}


def library() -> Library:
    """A diffusion model with fresh weights over documents of random words."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(VOCABULARY, WORDS)) for _ in range(DOCUMENTS)]
    documents = [Document(f"d{i}", text[:30], text) for i, text in enumerate(texts)]
    data = RetrievalData("words", "generated", "0", documents, {})
    encoder = load_encoder("wordllama")
    embeddings = encoder.embed(texts)
    docid = replace(DocidConfig(), family="rq", levels=8, codes=32, encoder="wordllama")
    table = fit_family(docid, "rq", data, embeddings, encoder, 0)
    config = ModelConfig()
    inputs = make_inputs(config, [parse(ARM)], corpus_mean(embeddings))["main"]
    retriever = DocidRetriever(ARM, build_model(config, parse(ARM), table), table, inputs, encoder)
    return Library(documents, {}, {ARM: retriever}, ARM)


class BenchmarkRetriever(Retriever):
    """The retriever application's replica with that model in place of an artifact's."""

    def __init__(self, args: RetrieverArgs) -> None:
        pages.use_threads(args.threads)
        self.args = args
        self.state = State(Corpus(library(), "benchmark", args))


def build(args: RetrieverArgs) -> Application:
    """The Serve application."""
    return serve.deployment(serve.ingress()(BenchmarkRetriever), name="Retriever").bind(args)


def under_serve(port: int, work: Path, haproxy: bool) -> None:
    """Serve with the settings of cluster.yaml until SIGTERM."""
    artifacts.write(
        work / "artifact",
        kind="model",
        method="diffugr",
        meta={},
        fill=lambda f: artifacts.write_text(f / "none.txt", ""),
    )
    file = specs.load(ROOT / "cluster.yaml")
    file.platform.haproxy = haproxy
    (application,) = file.platform.serve["applications"]
    application["import_path"] = "benchmarks.serving_arm:build"
    application["args"] = {**UNLIMITED, "artifact": str(work / "artifact")}
    deploy.run(file, port=port)


def under_uvicorn(port: int, work: Path) -> None:
    """The same application, one process, no proxy."""
    import uvicorn

    args = RetrieverArgs(artifact=work, **UNLIMITED)  # type: ignore[arg-type]
    pages.use_threads(args.threads)
    app = create_app(State(Corpus(library(), "benchmark", args)), args)
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")


if __name__ == "__main__":
    arm, number, folder = sys.argv[1:]
    if arm == "uvicorn":
        under_uvicorn(int(number), Path(folder))
    else:
        under_serve(int(number), Path(folder), haproxy=arm == "haproxy")

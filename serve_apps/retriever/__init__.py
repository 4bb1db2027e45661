"""The `retriever` application; ``serve_apps.retriever:build`` is what cluster.yaml names."""

from serve_apps.retriever.app import build, create_app
from serve_apps.retriever.corpus import Corpus
from serve_apps.retriever.schema import RetrieverArgs
from serve_apps.retriever.search import State

__all__ = ["Corpus", "RetrieverArgs", "State", "build", "create_app"]

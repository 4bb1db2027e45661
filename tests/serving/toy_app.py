"""The retriever application with the toy method, for tests that drive a real Serve."""

from mobula.serving.application import deployment
from serve_apps.retriever import RetrieverArgs, State, create_app
from serve_apps.retriever.app import Retriever, load
from tests.serving import toy


def opened(args: RetrieverArgs) -> State:
    toy.register()
    return load(args)


build = deployment("Retriever", RetrieverArgs, opened, create_app, Retriever)

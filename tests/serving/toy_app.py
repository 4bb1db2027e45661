"""The retriever application with the toy method, for tests that drive a real Serve."""

from ray import serve
from ray.serve import Application

from serve_apps.retriever import Retriever, RetrieverArgs
from tests.serving import toy


class ToyRetriever(Retriever):
    def __init__(self, args: RetrieverArgs) -> None:
        toy.register()
        super().__init__(args)


def build(args: RetrieverArgs) -> Application:
    return serve.deployment(serve.ingress()(ToyRetriever), name="Retriever").bind(RetrieverArgs.model_validate(args))

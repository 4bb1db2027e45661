"""Measurements of the endpoints. Under Serve they are exported for Prometheus, with Ray's own."""

from __future__ import annotations

from ray.serve import metrics

MS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]
SIZES = [1, 2, 4, 8, 16, 32, 64, 128]


class Metrics:
    """Measures nothing: what an app uses outside Serve."""

    def batch(self, size: int) -> None:
        """A batch of ``size`` requests is computed."""

    def search(self, retriever: str, decoder: str, ms: float) -> None:
        """A search was answered."""

    def answered(self, status: int) -> None:
        """A request was answered."""


class ServeMetrics(Metrics):
    """Histograms and counters of a replica."""

    def __init__(self) -> None:
        self._batch = metrics.Histogram("mobula_batch_size", "requests computed together", boundaries=SIZES)
        tags = ("retriever", "decoder")
        self._search = metrics.Histogram("mobula_search_ms", "time of a search, ms", boundaries=MS, tag_keys=tags)
        self._answered = metrics.Counter("mobula_requests", "requests answered", tag_keys=("status",))

    def batch(self, size: int) -> None:
        """A batch of ``size`` requests is computed."""
        self._batch.observe(size)

    def search(self, retriever: str, decoder: str, ms: float) -> None:
        """A search was answered."""
        self._search.observe(ms, {"retriever": retriever, "decoder": decoder})

    def answered(self, status: int) -> None:
        """A request was answered."""
        self._answered.inc(1, {"status": str(status)})

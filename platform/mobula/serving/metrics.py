"""Measurements of the endpoints. Under Serve they are exported for Prometheus, with Ray's own."""

from __future__ import annotations

from ray.serve import metrics

MS = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0]
SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]


class Metrics:
    """Measures nothing: what an app uses outside Serve."""

    def batch(self, size: int) -> None:
        """A batch of ``size`` requests is computed."""

    def search(self, retriever: str, decoder: str, ms: float) -> None:
        """A search was answered."""

    def solved(self, status: str, ms: float) -> None:
        """A task was solved, or not."""

    def answered(self, status: int) -> None:
        """A request was answered."""


class ServeMetrics(Metrics):
    """Histograms and counters of a replica."""

    def __init__(self) -> None:
        self._batch = metrics.Histogram("mobula_batch_size", "requests computed together", boundaries=SIZES)
        tags = ("retriever", "decoder")
        self._search = metrics.Histogram("mobula_search_ms", "time of a search, ms", boundaries=MS, tag_keys=tags)  # type: ignore[arg-type]
        self._solved = metrics.Histogram("mobula_solve_ms", "time of a task, ms", boundaries=MS, tag_keys=("status",))
        self._answered = metrics.Counter("mobula_requests", "requests answered", tag_keys=("status",))

    def batch(self, size: int) -> None:
        """A batch of ``size`` requests is computed."""
        self._batch.observe(size)

    def search(self, retriever: str, decoder: str, ms: float) -> None:
        """A search was answered."""
        self._search.observe(ms, {"retriever": retriever, "decoder": decoder})

    def solved(self, status: str, ms: float) -> None:
        """A task was solved, or not."""
        self._solved.observe(ms, {"status": status})

    def answered(self, status: int) -> None:
        """A request was answered."""
        self._answered.inc(1, {"status": str(status)})

"""What training asks of a cluster."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerResources:
    """A number of equal training workers and what each of them needs."""

    workers: int
    cpus: float = 1.0
    gpus: float = 0.0

    def bundle(self) -> dict[str, float]:
        """What one worker needs, as Ray names it."""
        return {name: value for name, value in (("CPU", self.cpus), ("GPU", self.gpus)) if value > 0}

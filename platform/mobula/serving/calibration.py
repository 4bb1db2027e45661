"""Which budget fits into a time limit: latencies measured on this host when a deployment starts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

REPEATS = 8


@dataclass(frozen=True)
class Calibration:
    """95th percentile of the time of one request, ms, by decoder and denoising steps (None: it takes no steps)."""

    p95_ms: Mapping[str, Mapping[int | None, float]]

    def steps_within(self, decoder: str, limit_ms: float) -> tuple[int | None] | None:
        """(steps,) for the largest budget that fits; None if none does, or the decoder was not measured."""
        fitting = [steps for steps, p95 in self.p95_ms.get(decoder, {}).items() if p95 <= limit_ms]
        if not fitting:
            return None
        return (max(fitting, key=lambda steps: steps or 0),)

    def rows(self) -> list[dict[str, float | int | str | None]]:
        """For display: one row per decoder and budget."""
        table = self.p95_ms.items()
        return [{"decoder": d, "steps": s, "p95_ms": round(ms, 2)} for d, row in table for s, ms in row.items()]


def measure(
    arms: Sequence[tuple[str, int | None]], run: Callable[[str, int | None, int], object], cap_s: float
) -> Calibration:
    """Time ``run(decoder, steps, repeat)`` for every arm, 8 times after one warm-up.

    Arms are measured in turn (A B C A B C), so a slow moment of the machine does not hit one of them alone. After
    ``cap_s`` seconds the rounds stop; what has no measurement then is left out.
    """
    deadline = time.monotonic() + cap_s
    times: dict[tuple[str, int | None], list[float]] = {arm: [] for arm in arms}
    for repeat in range(-1, REPEATS):
        for decoder, steps in arms:
            if time.monotonic() > deadline:
                break
            start = time.perf_counter()
            run(decoder, steps, repeat)
            if repeat >= 0:
                times[decoder, steps].append(1000 * (time.perf_counter() - start))
    table: dict[str, dict[int | None, float]] = {}
    for (decoder, steps), measured in times.items():
        if measured:
            table.setdefault(decoder, {})[steps] = percentile(measured, 95)
    return Calibration(table)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]

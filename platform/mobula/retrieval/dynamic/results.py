"""What a `dynamic_retrieval` run has measured: P[t, i] of every system, resampled together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from mobula.evaluation.intervals import Estimate, Resampler
from mobula.experiment import Measure
from mobula.retrieval.docids.families import NUMERIC, TEXT
from mobula.retrieval.dynamic import measures
from mobula.retrieval.dynamic.config import NGRAMS, Config, SessionSystem
from mobula.retrieval.dynamic.evaluate_sessions import EvaluationProtocol, SessionResults

KEPT = 32  # resampled tables held at a time: claims ask for those of one measure again and again


@dataclass
class Results:
    """Results by system, with one bootstrap for all of them, so that differences are paired.

    Shapes: T states and as many sessions, S seeds, R resamples; row 0 of R + 1 is the sample itself.
    """

    config: Config
    protocol: EvaluationProtocol
    systems: Mapping[SessionSystem, SessionResults]

    @cached_property
    def labels(self) -> list[list[int]]:
        """The cluster of every row, session by session."""
        return measures.clusters(self.protocol.rows)

    @cached_property
    def resampler(self) -> Resampler:
        """Draws clusters of rows."""
        return Resampler(list(itertools.chain(*self.labels)), resamples=self.config.evaluation.resamples)

    @property
    def primary(self) -> str:
        """The measure of the claims."""
        return self.config.evaluation.primary

    @property
    def rows(self) -> int:
        """Test rows of all sessions."""
        return sum(map(len, self.protocol.rows))

    @property
    def numeric(self) -> list[SessionSystem]:
        """Trained systems of one numeric docid per document."""
        return [system for system in self._plain if system.paradigm != "adc" and system.family in NUMERIC]

    @property
    def texts(self) -> list[SessionSystem]:
        """Trained systems with text docids."""
        return [system for system in self._plain if system.arm in NGRAMS or system.family in TEXT]

    @property
    def _plain(self) -> list[SessionSystem]:
        return [system for system in self.systems if not system.options]

    def p(self, system: SessionSystem, measure: str = "") -> np.ndarray:
        """P f64[T, T] of a measure, the primary one unless named."""
        return measures.means(self.systems[system].values[measure or self.primary])

    @cached_property
    def table(self) -> Callable[[SessionSystem, str], np.ndarray]:
        """P f64[R + 1, S, T, T] of a system and measure."""
        values = {system: results.values for system, results in self.systems.items()}
        return lru_cache(maxsize=KEPT)(lambda system, measure: self._resampled(values[system][measure]))

    def diagonal(self, system: SessionSystem, name: str) -> np.ndarray:
        """A fact of the diagonal f64[R + 1, S, T]."""
        return self._resampled(self.systems[system].diagonal[name])

    def measure(self, system: SessionSystem, statistic: measures.Statistic, measure: str = "") -> Measure:
        """A statistic of P with its interval, of the primary measure unless another is named."""
        return self.estimate(statistic, self.table(system, measure or self.primary)).measure()

    def estimate(self, statistic: Callable[..., np.ndarray], *tables: np.ndarray) -> Estimate:
        """A statistic of tables of all rows, with what its interval needs."""
        return self.resampler.estimate(statistic, *tables, n=self.rows)

    def difference(self, a: SessionSystem, b: SessionSystem, statistic: measures.Statistic) -> Estimate:
        """A statistic of P of the primary measure, a - b, paired."""
        tables = (self.table(system, self.primary) for system in (a, b))
        return self.estimate(lambda ours, theirs: statistic(ours) - statistic(theirs), *tables)

    def _resampled(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """f64[R + 1, S, ..., T] from ``values[i]`` f64[S, ..., rows of session i]."""
        sessions = zip(values, self.labels, strict=True)
        return np.stack([self.resampler.means(session, labels) for session, labels in sessions], axis=-1)

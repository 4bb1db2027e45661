"""DRO, the method: a cold start, every arm's EM, one look at the test questions, report and artifact.

Z. Shi et al., "Direct Retrieval-augmented Optimization: Synergizing Knowledge Selection and Language Models", arXiv
2505.03075. Weights and objective are in :mod:`mobula.rag`, the order of things in :mod:`.loop`.
"""

from __future__ import annotations

from typing import Any

from mobula import artifacts
from mobula.artifacts import Artifact
from mobula.experiment import Report, Run
from mobula.rag.dro.comparison import Comparison
from mobula.rag.dro.config import COLD, VIEWS, Config
from mobula.rag.dro.report import Findings, fill
from mobula.rag.dro.sources import open_predictor
from mobula.rag.dro.trial import train_trial

__all__ = ["Config", "load", "run", "train_trial"]
SAMPLES = (1, 2, 4, 8, 14)


def run(run: Run) -> Report:
    """Train every seed's arms, then look at the test questions once; leaves the first arm's pair as artifact."""
    config: Config = run.config  # type: ignore[assignment]
    comparison = Comparison(config, run.directory, run.cluster)
    source = comparison.source
    facts = source.prepare()
    run.bind("questions", facts.sha256)
    comparison.run()
    rows = {name: [comparison.outcome(name, seed).rows for seed in comparison.seeds] for name in config.arms}
    for name, runs in rows.items():
        for seed, found in zip(comparison.seeds, runs, strict=True):
            for row in found:
                run.log(arm=name, seed=seed, **row)
    views = [name for name, view in VIEWS.items() if view.select in source.views]
    tested = {name: comparison.tested(name) for name in (COLD, *views, *config.arms)}
    first = comparison.first
    variances = comparison.variances(first, SAMPLES)
    report = run.report()
    report.data.append(facts)
    fill(report, Findings(config, source.wording, rows, tested, comparison.distances(first), variances))
    _write(run, config, comparison)
    return report


def load(artifact: Artifact) -> Any:
    """Open the pair of an artifact: what answers questions of its source."""
    return open_predictor(artifact)


def _write(run: Run, config: Config, comparison: Comparison) -> None:
    source, pair = comparison.source, comparison.standing(comparison.first, config.seed)
    artifacts.write(
        run.artifact_directory,
        kind=source.artifact,
        method="dro",
        meta=source.meta(),
        fill=lambda folder: source.export(folder, pair),
    )

"""MOAT, the method: independent agents, every arm's alternation, one look at the test tasks, report and artifact.

Zhu et al., "Bridging the Capability Gap: Joint Alignment Tuning for Harmonizing LLM-based Multi-Agent Systems",
Findings of EMNLP 2025, arXiv 2509.09629. The mathematics is in :mod:`.preference` and :mod:`.workers`, the order of
things in :mod:`.loop`, what is compared in :mod:`.comparison`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from mobula.agents.moat import library
from mobula.agents.moat.comparison import Comparison
from mobula.agents.moat.config import Config
from mobula.agents.moat.report import Findings, fill
from mobula.agents.moat.start import TESTS
from mobula.agents.moat.trial import train_trial
from mobula.agents.worlds import SOURCES, Source, Task
from mobula.config import digest
from mobula.experiment import DataFacts, Report, Run

__all__ = ["Config", "load", "run", "train_trial"]
load = library.load
EXAMPLES = 5  # of each family, for people who want to try the agents


def run(run: Run) -> Report:
    """Train every seed's arms, then read the test tasks once; leaves the agents of the first arm as artifact."""
    config: Config = run.config  # type: ignore[assignment]
    comparison = Comparison(config, run.directory, run.cluster)
    facts = _facts(SOURCES[config.tasks.source], comparison.tasks)
    run.bind("tasks", facts.sha256)
    comparison.run()
    outcomes = [comparison.outcomes(seed) for seed in comparison.seeds]
    for seed, found in zip(comparison.seeds, outcomes, strict=True):
        for name, outcome in found.items():
            for row in outcome.rows:
                run.log(arm=name, seed=seed, **row)
    report = run.report()
    report.data.append(facts)
    tests = {split: comparison.tasks[split] for split in TESTS}
    solved = [comparison.solved(seed) for seed in comparison.seeds]
    fill(report, Findings(config, tests, outcomes, solved))
    final = comparison.standing(comparison.first, config.seed)
    rows = outcomes[0][comparison.first].rows
    library.write(run.artifact_directory, config, comparison.worlds, final, rows, _examples(comparison.tasks["dev"]))
    return report


def _examples(tasks: Sequence[Task]) -> dict[str, list[str]]:
    """The words of some tasks of every family."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        found.setdefault(task.family, []).append(task.text)
    return {family: texts[:EXAMPLES] for family, texts in found.items()}


def _facts(source: Source, tasks: Mapping[str, Sequence[Task]]) -> DataFacts:
    rows = [asdict(task) for found in tasks.values() for task in found]
    return DataFacts(source.title, source.origin, digest(rows), len(rows))

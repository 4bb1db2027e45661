"""DRO, the method: a cold start, every arm's EM, one look at the test questions, report and artifact."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mobula import alternation
from mobula.alternation import Outcome, Row
from mobula.artifacts import read_jsonl
from mobula.cluster.spec import ClusterSpec
from mobula.config import digest
from mobula.data.jsonl import JSONL
from mobula.evaluation import tables
from mobula.evaluation.claims import always, holm
from mobula.experiment import Claim, Report, Run
from mobula.locks import alone
from mobula.rag.dro import artifact
from mobula.rag.dro.artifact import load
from mobula.rag.dro.config import ARMS, COLD, FACTS, KINDS, Config
from mobula.rag.dro.data import Questions, questions_of, subset
from mobula.rag.dro.dro import DRO, ROWS, cold_start, posterior_distance
from mobula.rag.dro.networks import Networks
from mobula.rag.em import WEIGH, Checkpoint
from mobula.rag.selections import RANDOM_HIT, cuts
from mobula.rag.variance import GRADIENT, LIKELIHOOD, Variances, gradient_products, variances
from mobula.rag.weights import WeightConfig
from mobula.study import Results, Study, System, arm_directory
from mobula.threads import one_thread

__all__ = ["Config", "load", "run", "train_trial"]
log = logging.getLogger(__name__)
SAMPLES = (1, 2, 4, 8, 14)  # for which the variance of estimates is measured
REDRAWN = 40  # dev questions for which it is
COMPARED = 500  # training questions of which samples are compared with the exact posterior
LEAK = 0.1  # share of questions by which the passages shown first may hold answers more often than others
FALL = 0.02  # nats by which the likelihood of training questions may fall in an iteration
ANSWERS = ("f1", "exact")  # measures of what was answered, whoever chose the passages
NOT_REPRODUCED = "the paper's 8B models and its figures are not reproduced"
FACT_NOTE = "selector and generator of about 0.05 M parameters in a world of generated facts"
PASSAGE_NOTE = "a pointer over sentence vectors and a weak reader of spans, both far below 1 M parameters"
# Title of the table of what varies with the samples, and how a claim calls it.
VARIED = {
    LIKELIHOOD: ("Variance of the likelihood's estimate by samples", "the estimate of the likelihood"),
    GRADIENT: ("Variance of the selector's gradient by samples (trace)", "the selector's gradient"),
}
# Statements of claims that one arm is better than another, where both are there; the first arm is meant by "".
BETTER = [
    ("", COLD, "joint EM beats the cold start"),
    ("", "generator_only", "joint EM beats the generator alone"),
    ("", "selector_only", "joint EM beats the selector alone"),
    ("generator_only", COLD, "the generator alone beats the cold start"),
    ("", "uniform", "weights by likelihood beat uniform ones"),
    ("", "best", "weights by likelihood beat hard EM"),
    ("", "rag_sft", "joint EM beats vanilla RAG"),
    *(("", other, f"joint EM beats {other}") for other in ("reward", "reinforce", "distillation")),
]


def run(run: Run) -> Report:
    """Train every seed's arms, then look at the test questions once; leaves the first arm's pair as artifact."""
    config: Config = run.config  # type: ignore[assignment]
    arms = Arms(config, run.directory, run.cluster)
    facts = arms.questions.prepare()
    run.bind("questions", facts.sha256)
    systems = [System(COLD), *config.passage_baselines().values(), *map(System, config.arms)]
    results = Study(run, [[COLD], config.arms], systems, arms.train, arms.evaluate, arms.curve, config.arms).execute()
    report = run.report()
    report.data.append(facts)
    first, exact = config.arms[0], arms.questions.enumerable
    distances = [arms.distances(first, seed) for seed in config.seeds] if exact else []
    fill(report, results, distances, arms.variances(first, config.seed) if exact else [])
    artifact.write(run, arms.questions, arms.checkpoint(first, config.seed))
    return report


@dataclass(frozen=True)
class Arms:
    """How an arm of a seed is trained and evaluated in a run's directory. What is finished there is not done again."""

    config: Config
    directory: Path
    cluster: ClusterSpec | None = None

    @property
    def questions(self) -> Questions:
        """Those of the run."""
        return questions_of(self.config, self.directory)

    def train(self, arm: str, seed: int, directory: Path) -> None:
        """Train an arm, or the cold start of a seed."""
        with one_thread():
            self.checkpoint(arm, seed)

    def evaluate(self, system: System, seed: int, directory: Path) -> list[Row]:
        """A row a test question, null where a measure does not apply to it."""
        questions = self.questions
        queries = questions.queries("test")
        how = dict(system.options).get("passages") or (ARMS[system.arm].select if system.arm in ARMS else "selector")
        with one_thread():
            networks = Networks.of(questions, **self.checkpoint(system.arm, seed))
            rows = networks.evaluate(questions.take("test", queries), how)
        return [{"query": query, **row} for query, row in zip(queries, rows, strict=True)]

    def curve(self, arm: str, seed: int) -> list[Row]:
        """Metrics by iteration."""
        return self.outcome(arm, seed).rows

    def em(self, arm: str, seed: int) -> DRO:
        """An arm from its seed's cold start."""
        return DRO(self.config, ARMS[arm], self.questions, self.start(seed), seed)

    def start(self, seed: int) -> Checkpoint:
        """The cold start of a seed."""
        directory = arm_directory(self.directory, COLD, seed)
        return cold_start(self.config, self.questions, directory, seed, self.cluster)

    def outcome(self, arm: str, seed: int) -> Outcome:
        """An arm's alternation."""

        def progress(row: Row) -> None:
            log.info("%s, seed %d, iteration %d: dev EM %.3f", arm, seed, row["iteration"], row["dev_em"])

        loop, config = self.em(arm, seed).loop(), self.config.alternation_of(ARMS[arm])
        directory = arm_directory(self.directory, arm, seed)
        return alternation.run(loop, config, directory, seed=seed, cluster=self.cluster, progress=progress)

    def checkpoint(self, arm: str, seed: int) -> Checkpoint:
        """The weights of an arm's best iteration by its monitored metric, of the last one without it."""
        if arm == COLD:
            return self.start(seed)
        outcome = self.outcome(arm, seed)
        return self.em(arm, seed).current_checkpoint(outcome.history.until(outcome.best))

    def past(self, arm: str, seed: int) -> list[Networks]:
        """The networks of an arm by iteration."""
        em, outcome = self.em(arm, seed), self.outcome(arm, seed)
        past = [em.current_checkpoint(outcome.history.until(row["iteration"])) for row in outcome.rows]
        return [Networks.of(self.questions, **checkpoint) for checkpoint in past]

    def distances(self, arm: str, seed: int) -> list[float]:
        """By iteration, how far weighted samples are from the exact posterior of the networks that they are from."""
        history = self.outcome(arm, seed).history
        weighed = [path for _, phase, path in history.finished if phase == WEIGH]
        pairs = zip(self.past(arm, seed), weighed, strict=False)  # the last networks have sampled nothing
        return [posterior_distance(networks, read_jsonl(path / ROWS)[:COMPARED]) for networks, path in pairs]

    def variances(self, arm: str, seed: int) -> list[Variances]:
        """By iteration, how much estimates from m samples vary."""
        weights, redraws = self.config.em_of(ARMS[arm]).weights, self.config.evaluation.redraws
        with one_thread():
            return [redrawn(networks, weights, redraws) for networks in self.past(arm, seed)]


def redrawn(networks: Networks, weights: WeightConfig, redraws: int) -> Variances:
    """As :func:`mobula.rag.variance.variances`, of the first dev questions."""
    data, selector, every = networks.questions, networks.selector, networks.questions.permutations()
    queries = data.queries("dev")[:REDRAWN]
    questions, listed = data.take("dev", queries), [every] * len(queries)
    priors = selector.log_prob(questions, listed).exp().numpy()
    scores = [
        {name: np.array(column) for name, column in asdict(one).items()}
        for one in networks.generator.score(questions, listed)
    ]
    rows = [{"permutations": every, "weights": [1.0] * len(every)}]
    module = selector.build(0).eval()  # the selector's own was opened without gradients
    batches = (selector.batch(subset(questions, [i]), rows) for i in range(len(queries)))
    products = [gradient_products(module, selector.log_probs(module, batch).sum(-1)) for batch in batches]
    return variances(priors, scores, products, weights, SAMPLES, redraws)


def train_trial(config: Config, directory: Path, report: Callable[[dict[str, Any]], None]) -> None:
    """A sweep's trial: alternate the first arm, and report {iteration, dev_...} after each iteration and the start.

    Trials that differ in the alternation alone share questions and cold start, in a folder beside theirs. Test
    questions are never looked at.
    """
    names = ("data", "retrieve", "select", "model", "cold")
    decides = [*(asdict(getattr(config, name)) for name in names), config.fit.identity(), config.seed]
    shared = directory.parent / "prepared" / digest(decides)[:16]
    arm, questions = ARMS[config.arms[0]], questions_of(config, shared)

    def of_dev(row: Row) -> Row:
        return {name: value for name, value in row.items() if name == "iteration" or name.startswith("dev_")}

    with one_thread():
        with alone(shared):
            questions.prepare()
            start = cold_start(config, questions, shared / COLD, config.seed, None)
        loop = DRO(config, arm, questions, start, config.seed).loop()
        alternated = config.alternation_of(arm)
        alternation.report_iterations(loop, alternated, directory / "loop", config.seed, of_dev, report)


def fill(report: Report, results: Results, distances: Sequence[Sequence[float]], varied: Sequence[Variances]) -> None:
    """Measures, tables, plots and claims; ``distances`` and ``varied`` are those of the first arm."""
    config: Config = results.config  # type: ignore[assignment]
    facts, shown = config.data.source == FACTS, metrics(config)
    note = FACT_NOTE if facts else PASSAGE_NOTE
    if config.model.base:
        note = f"selector and generator are {config.model.base}, {config.model.tuning}"
    report.notes += [f"{note}; {NOT_REPRODUCED}", f"test questions: {len(results.runs(results.first)[0])}"]
    report.notes += warnings(results)
    labels = {f"dev_{'em' if name == 'exact' else name}": f"{title}, dev" for name, title in shown.items()}
    followed = {"train_log_p": "log p(y|x), train", "dev_log_p": "log p(y|x), dev"}
    plotted = {**labels, **followed, "dev_iwae_bound": "estimate of log p(y|x), dev (IWAE bound)"}
    results.report(report, shown, plotted, examples="Test questions")
    others = {name: title for name, title in OTHERS.items() if name in results.runs(results.first)[0][0]}
    measured = {f"{arm}/{name}": results.measure(arm, name) for arm in results.rows for name in others}
    report.measures |= {name: measure for name, measure in measured.items() if measure is not None}
    if others:
        report.tables["Test questions, not in per cent"] = tables.measures(
            map(str, results.rows), others, lambda arm, name: measured[f"{arm}/{name}"], scale=1.0
        )
    every = dict.fromkeys(name for runs in results.curves.values() for run in runs for row in run for name in row)
    columns = [name for name in every if name not in ("iteration", "seconds")]
    report.tables["Iterations, mean of seeds"] = tables.iterations(results.curves, columns, digits=4)
    sized = {arm: runs for arm, runs in results.curves.items() if arm == config.arms[0] or "m_" in arm}
    if len(sized) > 1:
        main = next(iter(plotted))
        report.plots["samples"] = tables.curves_plot(sized, main, plotted[main])
    if distances:
        means = [[i, round(float(np.mean(seeds)), 4)] for i, seeds in enumerate(zip(*distances, strict=False), 1)]
        title = "Weighted samples and the exact posterior"
        report.tables[title] = [["iteration", "total variation, mean of seeds"], *means]
    for what, (title, _) in VARIED.items() if varied else ():
        head = ["samples", *(f"iteration {i}" for i in range(len(varied)))]
        report.tables[title] = [head, *([m, *(f"{one[what][m].mean():.2e}" for one in varied)] for m in SAMPLES)]
    report.claims += claims(results, varied)


OTHERS = {"log_p": "log p(y|x)", "tau": "agreement with the retriever's order (tau)"}


def metrics(config: Config) -> dict[str, str]:
    """What is measured of test questions, in per cent, the main metric first."""
    if config.data.source == FACTS:
        return {"exact": "exact match", "gold": "both gold facts chosen"}
    shown = {f"hit@{cut}": f"answer_hit@{cut}" for cut in cuts(config.retrieve.choose)}
    shown |= {"exact": "exact match", "f1": "F1", "acc": "accuracy", RANDOM_HIT: "answer_hit@1 of a random passage"}
    if config.data.source in ("hotpotqa", JSONL):  # says, or may say, which passages support an answer
        shown |= {"recall": "supporting passages chosen", "all_gold": "all supporting passages chosen"}
    if config.select.decode == "free":
        shown["repaired"] = "lists that had to be filled"
    return shown


def warnings(results: Results) -> Iterator[str]:
    """What a reader must know before the numbers."""
    config: Config = results.config  # type: ignore[assignment]
    for arm in config.arms:
        em, monitor = config.em_of(ARMS[arm]), config.alternation_of(ARMS[arm]).monitor
        if em.samples == 1 and em.weights.rule == "snis":
            yield f"{arm}: no signal, one sample has weight 1 whatever its likelihood"
        if monitor != config.alternation.monitor:
            yield f"{arm}: its best iteration is chosen by {monitor}, since it trains no selector"
    yield from _overfitted(results.curves)
    first = config.passage_baselines().get("first")
    if first is not None and results.has(first):
        shown, random = (results.values(first, name).mean() for name in ("hit@1", RANDOM_HIT))
        if shown - random > LEAK:
            yield (
                f"where passages are shown gives the answer away: the first of them holds it in {shown:.0%} of the "
                f"questions, one at random in {random:.0%}; use retrieve.order=shuffled"
            )


def _overfitted(curves: Mapping[str, Sequence[Sequence[Row]]]) -> Iterator[str]:
    """Arms whose likelihood rises on training questions, while that of dev questions falls below where it began.

    Samples of training questions are those of the networks before the row's M-step, all else of those behind it.
    """
    for name, runs in curves.items():
        for train, dev, later in (("train_log_p", "dev_log_p", 0), ("iwae_bound", "dev_iwae_bound", 1)):
            both = [[(a, b) for a, b in zip(run[later:], run, strict=False) if train in a and dev in b] for run in runs]
            pairs = [[(a[train], b[dev]) for a, b in run] for run in both]
            if all(len(run) > 1 for run in pairs):
                learned, held_out = np.mean([np.subtract(run[-1], run[0]) for run in pairs], 0).tolist()
                if learned > 0 > held_out:
                    yield f"{name}: over-fitted, {train} rose by {learned:.3f} nats and {dev} fell by {-held_out:.3f}"


def claims(results: Results, varied: Sequence[Variances]) -> Iterator[Claim]:
    """Those of the paper that can be checked at this scale."""
    config: Config = results.config  # type: ignore[assignment]
    yield from _monotone(results)
    yield from _gains(results)
    for what, (_, called) in VARIED.items() if varied else ():
        few, many = (np.mean([one[what][m] for one in varied], 0) for m in (min(SAMPLES), max(SAMPLES)))
        statement = f"{called} varies less with {max(SAMPLES)} samples than with {min(SAMPLES)} (fall of its variance)"
        yield results.compare(f"variance, {what}", statement, few, many)
    for metric in ("exact",) if config.data.source == FACTS else dict.fromkeys([*_hits(config), *ANSWERS]):
        named = "" if config.data.source == FACTS else f", {metric}"
        pairs = [
            (one, results.claim(f"{one} - {other}{named}", statement, one, other, metric))
            for one, other, statement in _pairs(config)
            if results.has(one) and results.has(other) and metric in _compared_by(config, other)
        ]
        yield from holm([claim for one, claim in pairs if one == results.first])
        yield from (claim for one, claim in pairs if one != results.first)


def _hits(config: Config) -> list[str]:
    every = [f"hit@{cut}" for cut in cuts(config.retrieve.choose)]
    return [every[0], every[-1]]


def _compared_by(config: Config, other: System) -> Sequence[str]:
    """What a system is compared by: its answers where it trains no selector, for then its passages are another's."""
    if config.data.source == FACTS:
        return ["exact"]
    return ANSWERS if other.arm in ARMS and "selector" not in ARMS[other.arm].train else _hits(config)


def _pairs(config: Config) -> Iterator[tuple[System, System, str]]:
    first, passage_baselines = config.arms[0], config.passage_baselines()
    for one, other, statement in BETTER:
        yield System(one or first), System(other), statement
    for prefix in ("m_", "unnormalised_m_"):
        for fewer, more in pairwise(name for name in (f"{prefix}{m}" for m in (1, 2, 4, 14)) if name in config.arms):
            yield System(more), System(fewer), f"{more} beats {fewer}"
    if passage_baselines:
        yield System(first), passage_baselines["retriever"], "the selector beats the retriever's order"
        yield System("supervised"), passage_baselines["retriever"], "a selector with labels beats the retriever's order"


def _monotone(results: Results) -> Iterator[Claim]:
    """The exact likelihood of training questions never falls by more than it may, in any seed and iteration."""
    runs = results.curves[results.first.arm]
    steps = [step for run in runs for step in pairwise(run) if "train_log_p" in step[1]]
    changes = [after["train_log_p"] - before["train_log_p"] for before, after in steps]
    if changes:
        statement = f"log p(y|x) of training questions never falls by {FALL} nats (smallest and largest change)"
        yield always("monotone", statement, changes, least=-FALL, decisive=results.config.evaluation.decisive)


def _gains(results: Results) -> Iterator[Claim]:
    """Every training of the first arm has raised the objective that it was given."""
    rows = [row for run in results.curves[results.first.arm] for row in run]
    for kind in KINDS:
        gains = [row[f"q_gain_{kind}"] for row in rows if f"q_gain_{kind}" in row]
        if gains:
            statement = f"every M-step raises the {kind}'s own objective Q (nats a question; smallest and largest)"
            yield always(f"q_gain, {kind}", statement, gains, decisive=results.config.evaluation.decisive)

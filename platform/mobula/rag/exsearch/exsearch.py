"""EXSEARCH, in the order of the paper: sample, score, weigh, fit.

Z. Shi et al., "Iterative Self-Incentivization Empowers Large Language Models as Agentic Searchers", NeurIPS 2025, arXiv
2505.20128. The latent of a question x is a search trajectory z = (x_1, d_1, e_1), ..., (x_n, d_n, e_n): sub-queries,
the passages that they show, and the evidence that is recorded. Retrieval is deterministic, so

    p(z|x) = prod_i p(x_i | x, z_<i) p(e_i | x, z_<i, x_i, d_i),        p(y,z|x) = p(z|x) p(y|x,z)

and one model has all three. An iteration draws z_1 .. z_m from p(z|x), weighs them by self-normalised importance,

    w_k = p(y|x,z_k) / sum_j p(y|x,z_j),

since the prior cancels, and trains on sum_k w_k [log p(z_k|x) + log p(y|x,z_k)]. Weights and their rules are in
:mod:`mobula.rag.weights`, the loss in :mod:`mobula.rag.objective`, phases and checks in :mod:`mobula.rag.em`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from mobula.alternation import Context, History, Phase, Row, Sharded, seed_of
from mobula.artifacts import read_jsonl
from mobula.config import digest
from mobula.evaluation.answers import holds
from mobula.experiment import identity
from mobula.models.finetune import MODEL, TokenRow, finetune
from mobula.rag.em import EM, FIT, Q_GAIN, WEIGH, Checkpoint, Weighted, column_mean
from mobula.rag.exsearch.agent import Agent, SolveWorker
from mobula.rag.exsearch.config import Arm, Config, SearchEmConfig
from mobula.rag.exsearch.data import Problem, corpus_of, problems_of
from mobula.rag.exsearch.measures import SCORES, SEARCHES, SHARES, means
from mobula.rag.exsearch.trajectory import Trajectory, own_rows, rows
from mobula.rag.exsearch.warm_up import warm_up_rows
from mobula.rag.weighted_rows import DATA, QueryRows, RowsTask, log_joint, q_gains, write_rows
from mobula.threads import one_thread

SOLVE, DEV_SAMPLE, DEV_SCORE = "solve", "dev_sample", "dev_score"


@dataclass
class Trajectories:
    """Search trajectories of an agent, m a question: the latent variable (:class:`mobula.rag.em.Latent`).

    ``reward``: by which of :data:`SCORES` a sampled answer is rewarded.
    """

    agent: Agent
    samples: int
    reward: str = "f1"

    @property
    def snapshot(self) -> str:
        """Identity of the agent's weights."""
        return self.agent.snapshot

    def sample(self, questions: Sequence[Row], seed: int) -> list[Row]:
        """z_1 .. z_m from p(z|x): questions ``{query, question}`` to ``{query, trajectories}``, by the agent itself."""
        keys = [(question["query"], k) for question in questions for k in range(self.samples)]
        texts = [question["question"] for question in questions for _ in range(self.samples)]
        with one_thread():
            trajectories = self.agent.rollouts(greedy=False).run(texts, [seed_of(seed, *key) for key in keys])
        records = [trajectory.to_dict() for trajectory in trajectories]
        starts = range(0, len(records), self.samples)
        return [
            {"query": question["query"], "trajectories": records[start : start + self.samples]}
            for question, start in zip(questions, starts, strict=True)
        ]

    def score(self, samples: Sequence[Row]) -> list[Row]:
        """l_k = log p(y|x,z_k) of the gold answer and log p(z_k|x), of samples with ``answers``.

        ``log_lik`` is null where a row is longer than the agent's chats may be. The sampled answer is not in the
        context of the gold one.
        """
        groups = [[Trajectory.read(row) for row in sample["trajectories"]] for sample in samples]
        golds = [self.agent.gold(sample["answers"]) for sample in samples]
        parts = [[rows(z, gold, 1.0) for z in group] for group, gold in zip(groups, golds, strict=True)]
        with one_thread():
            joint = log_joint(self.agent.opened, [row for group in parts for part in group for row in part])
        scores = []
        for sample, group, gold, split in zip(samples, groups, golds, parts, strict=True):
            sums = [[next(joint) for _ in part] for part in split]
            fits = [all(len(row.ids) <= self.agent.rollout.seq_len for row in part) for part in split]
            scores.append(
                {
                    "query": sample["query"],
                    "log_lik": [sum(y for _, y in s) if fit else None for s, fit in zip(sums, fits, strict=True)],
                    "log_prior": [sum(z for z, _ in s) for s in sums],
                    "answer_tokens": len(gold),
                    "distinct": len({tuple(z.queries) for z in group}),
                    "log_ratio": [sum(z for z, _ in s) - k.log_q for s, k in zip(sums, group, strict=True)],
                    **self._columns(group, sample["answers"]),
                }
            )
        return scores

    def _columns(self, group: Sequence[Trajectory], answers: Sequence[str]) -> Row:
        """Of each sample: its own answer, and its evidence."""
        score = SCORES[self.reward]
        return {
            "em": [SCORES["em"](z.prediction, answers) for z in group],
            "reward": [score(z.prediction, answers) for z in group],
            "in_facts": [float(holds(" ".join(z.facts), answers)) for z in group],
            "mean_nll": [-sum(z.sampled) / max(1, len(z.sampled)) for z in group],
            "empty_facts": [z.flags.empty_facts for z in group],
        }


@dataclass
class ExSearch(EM):
    """EXSEARCH of one arm and seed. ``warm``: the model after the warm-up."""

    config: Config
    arm: Arm
    warm: Path
    seed: int

    longer = "em.epochs"

    @property
    def em(self) -> SearchEmConfig:
        """The E-step of the arm."""
        return self.config.of(self.arm)

    @property
    def start(self) -> Checkpoint:
        """The warm-up's model."""
        return {MODEL: self.warm}

    def identity(self) -> str:
        """Config, arm and seed."""
        return digest([identity(self.config), asdict(self.arm), self.seed])

    def agent(self, model: Path, split: str) -> Agent:
        """A model in the corpus of a split."""
        config, corpus = self.config, corpus_of(self.config.data, split)
        return Agent(model, corpus, config.retrieve, config.rollout, self.arm.mode, engine=config.model.sampler)

    def _current(self, context: Context, split: str) -> Agent:
        return self.agent(self.current_checkpoint(context.history)[MODEL], split)

    def problems(self, split: str) -> list[Problem]:
        """The questions of a split, with answers."""
        return problems_of(self.config.data, split)

    # Sample and score.

    def questions(self, split: str) -> list[Row]:
        """Ids and texts: no answer reaches the sampler."""
        return [{"query": problem.id, "question": problem.question} for problem in self.problems(split)]

    def latent(self, checkpoint: Checkpoint, split: str) -> Trajectories:
        """The trajectories of the agent with a checkpoint's model."""
        return Trajectories(self.agent(checkpoint[MODEL], split), self.em.samples, self.em.reward)

    def with_answers(self, samples: list[Row], split: str) -> list[Row]:
        """The samples, with the answers of their questions."""
        answers = {problem.id: list(problem.answers) for problem in self.problems(split)}
        return [{**sample, "answers": answers[sample["query"]]} for sample in samples]

    # Weigh.

    def accepted(self, score: Row) -> list[bool]:
        """Samples that recorded enough."""
        most = self.em.max_empty_facts
        return [most is None or empty <= most for empty in score["empty_facts"]]

    def facts(self, scores: Sequence[Row]) -> Row:
        """How many samples are too long, how often facts hold the answer, how unlikely samples are, and KL(q || p)."""
        return {
            "too_long": sum(value is None for score in scores for value in score["log_lik"]),
            "sample_in_facts": column_mean(scores, "in_facts"),
            "sample_mean_nll": column_mean(scores, "mean_nll"),
            "sampler_kl": -column_mean(scores, "log_ratio"),
        }

    # Fit.

    def rows(self, weighted: Sequence[Weighted], checkpoint: Checkpoint, directory: Path) -> None:
        """w_k log p(z_k,y|x) as rows of tokens, samples of weight 0 left out; oracle rows beside it if configured."""
        agent = self.agent(checkpoint[MODEL], "train")
        golds = {problem.id: agent.gold(problem.answers) for problem in self.problems("train")}
        queries = [self._query_rows(each, golds[each.score["query"]]) for each in weighted if not each.weights.skipped]
        more = round(len(queries) * self.em.mix_warm_up)
        oracle = warm_up_rows(self.config, self.warm, self.seed, self.arm.mode)[:more] if more else []
        write_rows(directory / DATA, [*queries, *oracle])

    def _query_rows(self, weighted: Weighted, gold: list[int]) -> QueryRows:
        score, learned, before = weighted.score, [], 0.0
        for k, weight in enumerate(weighted.weights.values.tolist()):
            if weight:
                trajectory = Trajectory.read(weighted.sample["trajectories"][k])
                policy = self.arm.learns == "policy"
                learned += own_rows(trajectory, weight) if policy else rows(trajectory, gold, weight)
                before += weight * (score["log_prior"][k] + score["log_lik"][k])
        return QueryRows(learned, before)

    def fit(self, data: Path, checkpoint: Checkpoint, context: Context) -> tuple[Checkpoint, Row]:
        """Train on the weighted rows, from the current model or from the warm-up's."""
        em = self.em
        start = checkpoint if em.start_from == "previous" else self.start
        task = RowsTask(start[MODEL], data / DATA, em.answer_coef, em.clip if self.arm.learns == "policy" else None)
        if not task.examples:
            return checkpoint, {"steps": 0}
        config = replace(self.config.fit, steps=steps_of(self.config, task.examples))
        result = finetune(task, config, context.directory, seed=context.seed, name=FIT, cluster=context.cluster)
        facts = {"steps": result.steps, "tokens": task.tokens, "learned_share": task.learned_share}
        return {MODEL: context.directory / MODEL}, facts

    def q_gain(self) -> Phase | None:
        """Q after the M-step minus before: sum_k w_k log p(z_k,y|x) of every question that was learned from."""
        if self.arm.learns != "em":
            return None

        def items(context: Context) -> list[Row]:
            data = context.history.latest(WEIGH)
            assert data is not None
            trained = context.history.facts(FIT)["steps"]
            return [row for row in read_jsonl(data / DATA) if trained and row["before"] is not None]

        return Sharded(Q_GAIN, items, lambda context: QGainWorker(self._current(context, "train")), self.shard)

    def gains(self, history: History) -> Row:
        """The mean over questions."""
        gains = [row["q_gain"] for row in history.rows(Q_GAIN)]
        return {"q_gain": float(np.mean(gains))} if gains else {}

    # Evaluate.

    def evaluation(self) -> list[Phase]:
        """Dev questions, greedily; and the bound on their samples."""

        def items(context: Context) -> list[Row]:
            return [asdict(problem) for problem in self.problems("dev")]

        solve = Sharded(SOLVE, items, lambda context: SolveWorker(self._current(context, "dev")), self.shard)
        sample = self.sampling(DEV_SAMPLE, "dev", seeded_as="held_sample")
        return [solve, sample, self.scoring(DEV_SCORE, sample, "dev")]

    def measures(self, history: History) -> Row:
        """The means of answers, and bound, exact match and failures of samples."""
        solved, samples = history.rows(SOLVE), self.sample_facts(history.rows(DEV_SCORE))
        bounds = {f"dev_{name}": samples[name] for name in ("iwae_bound", "sample_em", "all_fail")}
        return {**{f"dev_{name}": value for name, value in means(solved, [*SHARES, *SEARCHES]).items()}, **bounds}


@dataclass
class QGainWorker:
    """Items ``{rows, before}`` to rows ``{q_gain}``: the weighted log p(z,y|x) of the rows, minus ``before``."""

    agent: Agent

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.cluster.pool.Worker`; nothing is drawn."""
        queries = [([TokenRow(**row) for row in item["rows"]], item["before"]) for item in items]
        with one_thread():
            return [{"q_gain": gain} for gain in q_gains(self.agent.opened, queries)]


def steps_of(config: Config, queries: int) -> int:
    """The steps of an M-step over so many questions."""
    return max(1, round(config.em.epochs * queries / config.fit.batch))

"""Weights of a query's sampled latents: the E-step of Monte-Carlo EM.

A latent z (a search trajectory, a permutation of passages) is sampled from p(z|x), and l = log p(y|x,z) says how likely
it makes the gold answer y. Since z comes from the model's own prior, p(z|x,y) / p(z|x) is proportional to p(y|x,z): the
prior cancels (Shi et al., arXiv 2505.20128 and 2505.03075). A query's weights use that query's samples alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mobula.config import key

GATES = ("none", "skip", "scale")
CORRECTIONS = ("none", "exact")


@dataclass(frozen=True)
class Sampled:
    """A query's m samples, those that a filter rejected left out.

    ``log_lik`` f64[m]: l, the sum over the ``answer_tokens`` tokens of the gold answer, end of turn included.
    ``log_ratio`` f64[m]: log p(z|x) minus the log-probability that z was drawn with; zeros where they are the same.
    ``reward`` and ``exact`` f64[m]: how good the sample's own prediction is, and whether it is the answer.
    """

    log_lik: np.ndarray
    answer_tokens: int
    log_ratio: np.ndarray
    reward: np.ndarray
    exact: np.ndarray


@dataclass(frozen=True)
class Weights:
    """A query's weights f64[m], zero where a sample has no finite likelihood.

    ``ess``: effective sample size, 1 / sum of the squared normalised weights, from 1 to m. ``log_mean_lik``: log of the
    mean likelihood, a lower bound of log p(y|x) in expectation. ``all_fail``: even the best sample makes the answer
    unlikely. ``skipped``: why the query has no weights, or nothing.
    """

    values: np.ndarray
    ess: float
    log_mean_lik: float
    all_fail: bool
    skipped: str = ""


@dataclass
class WeightConfig:
    """How samples are weighed."""

    rule: str = key("snis", "how likelihoods or rewards become weights; both papers: snis, self-normalised importance")
    tau: float = key(1.0, "rule=snis_len: temperature", gt=0)
    correction: str = key("none", "exact: correct for sampling at another temperature", choices=CORRECTIONS)
    gate: str = key("none", "queries that all samples fail: kept, skipped, or scaled by the best", choices=GATES)
    fail_eps: float = key(0.05, "a query fails if no sample gives the answer's tokens this much each", gt=0, lt=1)

    def problems(self) -> list[str]:
        """Values that are not known."""
        if self.rule in RENAMED_RULES:
            return [f"rule={self.rule} was renamed: use {RENAMED_RULES[self.rule]}"]
        return [] if self.rule in RULES else [f"rule={self.rule} is unknown; expected {', '.join(RULES)}"]


Rule = Callable[[Sampled, float], np.ndarray]


def weigh(sampled: Sampled, config: WeightConfig) -> Weights:
    """The weights of one query's samples, in float64.

    Samples without a finite likelihood leave before normalisation. A query is skipped, never weighed uniformly, if
    none is left, if every reward is 0, or if the gate skips it.
    """
    finite = np.isfinite(sampled.log_lik)
    zeros = np.zeros(len(finite))
    if not finite.any():
        return Weights(zeros, 0.0, -np.inf, True, "no sample has a finite likelihood")
    kept = Sampled(
        sampled.log_lik[finite],
        sampled.answer_tokens,
        sampled.log_ratio[finite] if config.correction == "exact" else zeros[finite],
        sampled.reward[finite],
        sampled.exact[finite],
    )
    best = float(np.max(kept.log_lik)) / kept.answer_tokens
    log_mean_lik = float(np.logaddexp.reduce(kept.log_lik) - np.log(len(kept.log_lik)))
    failed = best < np.log(config.fail_eps)
    values = RULES[config.rule](kept, config.tau)
    if not values.any():
        return Weights(zeros, 0.0, log_mean_lik, failed, "no sample has a reward")
    if failed and config.gate == "skip":
        return Weights(zeros, 0.0, log_mean_lik, failed, "every sample fails")
    if config.gate == "scale":
        values = values * np.exp(best)
    whole = zeros.copy()
    whole[finite] = values
    return Weights(whole, float(values.sum() ** 2 / (values**2).sum()), log_mean_lik, failed)


def _softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max())
    return shifted / shifted.sum()


def _share(values: np.ndarray) -> np.ndarray:
    total = values.sum()
    return values / total if total > 0 else np.zeros_like(values)


def _one_hot(scores: np.ndarray) -> np.ndarray:
    """The first of the largest."""
    return np.eye(len(scores))[int(scores.argmax())]


def _leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """Each reward minus the mean of the others, over m; one sample has nothing to be compared with."""
    m = len(rewards)
    return np.zeros(1) if m == 1 else (rewards - rewards.mean()) / (m - 1)


def _advantage(rewards: np.ndarray) -> np.ndarray:
    """Rewards standardised within the group (Shao et al. 2024, arXiv 2402.03300), over its size; zeros if all equal."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6) / len(rewards)


RULES: dict[str, Rule] = {
    # Self-normalised importance weights: consistent for the gradient of log p(y|x); no signal with one sample.
    "snis": lambda s, tau: _softmax(s.log_lik + s.log_ratio),
    # Flatter for long answers.
    "snis_len": lambda s, tau: _softmax((s.log_lik + s.log_ratio) / (tau * s.answer_tokens)),
    # Unbiased for the gradient of p(y|x) instead of its logarithm.
    "unnormalised": lambda s, tau: np.exp(s.log_lik + s.log_ratio) / len(s.log_lik),
    "lik_mean_exp": lambda s, tau: 4 * np.exp(s.log_lik / s.answer_tokens) / len(s.log_lik),
    "reward": lambda s, tau: _share(s.reward),
    "binary": lambda s, tau: _share(s.exact),
    "uniform": lambda s, tau: np.full(len(s.log_lik), 1 / len(s.log_lik)),
    # Policy gradient with exact match as reward and a leave-one-out baseline; weights may be negative, and sum to 0.
    "reinforce": lambda s, tau: _leave_one_out(s.exact),
    # Group-relative policy gradient; weights may be negative, and sum to 0.
    "advantage": lambda s, tau: _advantage(s.reward),
    # Hard EM.
    "best": lambda s, tau: _one_hot(s.log_lik),
}
RENAMED_RULES = {"lik_softmax": "snis", "lik_softmax_len": "snis_len", "lik_raw": "unnormalised"}
# Rules under which samples of different likelihood have different weights.
BY_LIKELIHOOD = frozenset({"snis", "snis_len", "unnormalised", "lik_mean_exp", "best"})

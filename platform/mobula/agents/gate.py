"""The gate that accepts or rolls back a step of training: nothing that makes an agent worse goes on.

Both sides are measured on the same tasks with the same decoding, and compared task by task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mobula.config import key
from mobula.evaluation.intervals import paired_difference

# With a fifth of the tasks decided differently by chance, a smaller tolerance rejects nearly every neutral change.
DISCORDANT = 0.2
LEAST, LEAST_FAMILY = 0.05, 0.15


@dataclass
class GateConfig:
    """When a stage is accepted."""

    enabled: bool = key(True, "false: every stage is accepted, as in the paper")
    delta: float | None = key(None, "loss of dev success that is tolerated; null: what this many tasks can tell", gt=0)
    delta_family: float | None = key(None, "the same within a family", gt=0)
    j_slack_se: float = key(2.0, "standard errors by which the surrogate may fall", ge=0)
    max_leak: float = key(0.2, "largest share of plans that give the solution away", ge=0, le=1)
    min_parsed: float = key(0.5, "smallest share of plans that are plans", ge=0, le=1)
    retries: int = key(1, "times that a rejected stage is trained again, each at a third of the learning rate", ge=0)


@dataclass(frozen=True)
class AgentScores:
    """The surrogate f[P] by probe task, success f[D] by dev task, and how many plans leak the solution and parse."""

    surrogate: np.ndarray
    success: np.ndarray
    leak_rate: float
    parse_rate: float


@dataclass(frozen=True)
class Decision:
    """Whether a stage is accepted, and every reason against it."""

    accepted: bool
    reasons: list[str]


def tolerance(given: float | None, tasks: int, least: float) -> float:
    """The loss of success that ``tasks`` paired tasks can tell from chance, or ``given``.

    Raises:
        ValueError: if ``given`` is smaller than that.
    """
    detectable = max(least, 1.96 * math.sqrt(DISCORDANT / tasks))
    if given is not None and given < detectable:
        raise ValueError(
            f"gate: a tolerance of {given:g} cannot be told from chance with {tasks} tasks; {detectable:.3f} can"
        )
    return detectable if given is None else given


def decide(config: GateConfig, before: AgentScores, after: AgentScores, families: Sequence[str]) -> Decision:
    """Compare agents before and after a stage; ``families`` aligns with ``success``.

    Rejected is a surrogate that falls by more than ``j_slack_se`` standard errors of the paired difference, a success
    whose 95 % interval reaches below the tolerance, overall or in a family, and plans that leak or do not parse.

    Raises:
        ValueError: for a tolerance that so few tasks cannot tell.
    """
    if not config.enabled:
        return Decision(True, [])
    reasons = []
    change = after.surrogate - before.surrogate
    slack = config.j_slack_se * float(change.std(ddof=1)) / math.sqrt(len(change))
    if change.mean() < -slack:
        reasons.append(f"surrogate fell by {-change.mean():.4f}, more than {slack:.4f}")
    names = np.array(families)
    groups = [("dev success", np.ones(len(names), bool), tolerance(config.delta, len(names), LEAST))]
    for family in dict.fromkeys(families):
        rows = names == family
        most = tolerance(config.delta_family, int(rows.sum()), LEAST_FAMILY)
        groups.append((f"success in {family}", rows, most))
    for name, rows, most in groups:
        effect = paired_difference(after.success[rows], before.success[rows])
        if effect.low < -most:
            reasons.append(
                f"{name} {effect.value:+.3f} [{effect.low:+.3f}, {effect.high:+.3f}] may fall below -{most:.3f}"
            )
    if after.leak_rate > config.max_leak:
        reasons.append(f"{after.leak_rate:.0%} of the plans leak, more than {config.max_leak:.0%}")
    if after.parse_rate < config.min_parsed:
        reasons.append(f"{after.parse_rate:.0%} of the plans parse, fewer than {config.min_parsed:.0%}")
    return Decision(not reasons, reasons)

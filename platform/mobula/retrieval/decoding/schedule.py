"""How many positions each denoising step commits, and how likely each is to be revealed or masked again.

L positions, T steps, s = 1..T the present step.
"""

from __future__ import annotations

import itertools
import math


def blocks(levels: int, block: int | None) -> list[range]:
    """The runs of positions that are finished one after the other, left to right."""
    size = block or levels
    return [range(start, start + size) for start in range(0, levels, size)]


def commits(length: int, steps: int, kind: str) -> list[int]:
    """k_s, the positions step s commits. They sum to ``length``; a step with 0 needs no network call.

    ``linear`` spreads them evenly, the first steps taking the remainder; ``cosine`` (MaskGIT) starts slowly.
    """
    if kind == "linear":
        each, rest = divmod(length, steps)
        return [each + (s < rest) for s in range(steps)]
    # The margin keeps rounding from turning an exact integer (0 at the end) into the one below.
    masked = [math.floor(length * math.cos(math.pi * s / (2 * steps)) + 1e-9) for s in range(steps + 1)]
    return [before - after for before, after in itertools.pairwise(masked)]


def kept(length: int, steps: int, step: int) -> int:
    """m_s = ceil(L s / T), the positions that stay committed after a step of ``remask: low_conf``."""
    return -(-length * step // steps)


def ancestral_reveal(steps: int, step: int) -> float:
    """Probability (t_{s-1} - t_s) / t_{s-1} of revealing a masked position, t_s = 1 - s/T (MDLM)."""
    return 1 / (steps - step + 1)


def remdm_rates(steps: int, step: int, cap: float) -> tuple[float, float]:
    """(reveal, sigma) of ReMDM with alpha_s = s/T.

    ``reveal`` is the probability of revealing a masked position; ``sigma`` = min(cap, (1 - alpha_s) /
    alpha_{s-1}) the mean probability of masking a committed one again, 0 in the last step.
    """
    before, after = (step - 1) / steps, step / steps
    sigma = cap if step == 1 else min(cap, (1 - after) / before)
    if step == steps:
        return 1.0, 0.0
    return (after - (1 - sigma) * before) / (1 - before), sigma

import numpy as np
import pytest

from mobula.retrieval.dynamic import measures
from mobula.retrieval.dynamic.measures import Resampler

NAN = np.nan
P = np.array([[0.8, NAN, NAN], [0.6, 0.5, NAN], [0.7, 0.4, 0.3]])


def test_statistics_of_a_hand_made_matrix() -> None:
    assert measures.initial(P) == pytest.approx(0.8)
    assert measures.generalisation(P) == pytest.approx((0.5 + 0.3) / 2)
    assert measures.forgetting(P) == pytest.approx(0.8 - 0.7)
    assert measures.average(P) == pytest.approx((0.7 + 0.4 + 0.3) / 3)
    assert measures.backward(P) == pytest.approx(((0.8 - 0.7) + (0.5 - 0.4)) / 2)
    assert measures.spread(P) == pytest.approx(0.8 - 0.3)


def test_forgetting_may_be_negative_and_backward_transfer_may_not() -> None:
    improving = np.array([[0.5, NAN], [0.9, 0.4]])
    assert measures.forgetting(improving) == pytest.approx(-0.4)
    assert measures.backward(improving) == 0.0


def test_statistics_work_on_stacks_of_matrices() -> None:
    stack = np.stack([P, P - 0.1])
    assert measures.generalisation(stack) == pytest.approx([0.4, 0.3])
    assert measures.backward(stack) == pytest.approx([0.1, 0.1])


def _values(seeds: int, rows: tuple[int, int], random: np.random.Generator) -> list[np.ndarray]:
    values = [random.integers(0, 2, (seeds, 2, n)).astype(float) for n in rows]
    values[1][:, 0] = NAN
    return values


def test_means_and_resamples_agree() -> None:
    values = _values(2, (60, 50), np.random.default_rng(0))
    p = measures.means(values)
    assert p[1, 0] == values[0][:, 1].mean()
    assert np.isnan(p[0, 1])
    drawn = Resampler([range(60), range(50)], 4000).cells(values)
    assert drawn.shape == (4000, 2, 2)
    assert drawn[:, 1, 0].mean() == pytest.approx(p[1, 0], abs=0.01)
    # The spread of a mean of independent rows is known: sqrt(var / n), with the seeds' own on top.
    assert drawn[:, 1, 1].std() == pytest.approx(values[1][:, 1].mean(0).std() / 50**0.5, rel=0.5)


def test_rows_of_one_document_are_drawn_together() -> None:
    values = [np.tile([0.0, 1.0], 20)[None, None], np.ones((1, 1, 4))]
    apart = Resampler([range(40), range(4)], 2000).cells(values)[:, 0, 0].std()
    together = Resampler([[row % 2 for row in range(40)], range(4)], 2000).cells(values)[:, 0, 0].std()
    assert together > 3 * apart


def test_differences_are_paired() -> None:
    random = np.random.default_rng(1)
    values = _values(1, (40, 40), random)
    better = [found.copy() for found in values]
    better[1] = better[1] + 0.05  # the same on every row: no row decides, so the interval is a point
    resampler = Resampler([range(40), range(40)], 500)
    difference = measures.generalisation(resampler.cells(better)) - measures.generalisation(resampler.cells(values))
    assert np.ptp(difference) < 1e-12


def test_a_claim_needs_its_whole_interval() -> None:
    effect = measures.interval(0.1, np.linspace(-0.1, 0.3, 100), 10)
    assert measures.claim("a", "b", effect).verdict == "undecided"
    assert measures.claim("a", "b", measures.interval(0.1, np.linspace(0.05, 0.3, 100), 10)).verdict == "holds"
    assert measures.claim("a", "b", effect, decisive=False).verdict == "undecided"

import numpy as np
import pytest

from mobula.data.records import Query
from mobula.data.sessions import SessionRow
from mobula.evaluation.intervals import Resampler
from mobula.experiment import Measure
from mobula.retrieval.dynamic import measures
from mobula.retrieval.dynamic.measures import clusters

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


def _rows(*sessions: list[tuple[str, str]]) -> list[list[SessionRow]]:
    """Rows from (query id, ids of its relevant documents) by session."""
    return [
        [SessionRow(Query(id, "?", tuple(gold.split())), number, frozenset()) for id, gold in session]
        for number, session in enumerate(sessions)
    ]


def test_a_query_is_one_cluster_in_all_sessions_with_the_rows_that_ask_for_the_same_documents() -> None:
    rows = _rows([("q1", "a"), ("q2", "a"), ("q3", "b c")], [("q2", "d"), ("q4", "d"), ("q5", "c2 b2")])
    (one, two, three), (again, four, five) = clusters(rows)
    assert one == two == again == four  # q1 and q2 ask for a, q2 again and q4 for d
    assert len({one, three, five}) == 3
    # Sharing a document of several is not enough: on CACM nearly all rows would be one cluster.
    assert len({label for session in clusters(_rows([("q1", "a b"), ("q2", "b c")])) for label in session}) == 2


def _ga(cells: list[np.ndarray], labels: list[list[int]], resamples: int = 400) -> Measure:
    """GA with its interval from values[i] f64[S, T, rows of session i]."""
    resampler = Resampler([label for session in labels for label in session], resamples=resamples)
    tables = [resampler.means(session, own) for session, own in zip(cells, labels, strict=True)]
    return resampler.estimate(measures.generalisation, np.stack(tables, axis=-1)).measure()


def _planted(queries: int, seeds: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Every query in three sessions, as hard in each; around 0 in mean, and seeds vary too."""
    hardness = rng.normal(0, 1, queries)
    shift = rng.normal(0, 0.2, (seeds, 1, 1)) if seeds > 1 else 0.0  # of one seed nobody can know it
    cells = [shift + hardness + rng.normal(0, 0.5, (seeds, 3, queries)) for _ in range(3)]
    for session, values in enumerate(cells):
        values[:, :session] = NAN
    return cells


def test_a_query_in_several_sessions_widens_the_interval() -> None:
    cells = _planted(40, 1, np.random.default_rng(0))
    names = [[(f"q{i}", f"{session}-{i}") for i in range(40)] for session in range(3)]
    together = _ga(cells, clusters(_rows(*names)))
    apart = _ga(cells, clusters(_rows(*([(f"{s}{id}", gold) for id, gold in rows] for s, rows in enumerate(names)))))
    assert together.value == apart.value == pytest.approx(float(measures.generalisation(measures.means(cells))))
    # Two sessions of the same hardness have the variance of one.
    assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(2**0.5, rel=0.25)


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_over_sessions_cover_the_truth(seeds: int) -> None:
    """Few queries, each in every session, and few seeds: the truth, 0, is in 95 of 100 intervals."""
    rng = np.random.default_rng(seeds)
    labels = clusters(_rows(*([(f"q{i}", f"{session}-{i}") for i in range(30)] for session in range(3))))
    covered = []
    for _ in range(400):
        measured = _ga(_planted(30, seeds, rng), labels, 300)
        covered.append(measured.low <= 0 <= measured.high)
    assert 0.92 <= np.mean(covered) <= 0.995

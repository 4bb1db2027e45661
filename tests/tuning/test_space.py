"""Spaces: what they accept, and which points they hold."""

import pickle

import pytest

from mobula.errors import ConfigError
from mobula.tuning import space as spaces
from mobula.tuning.search import OptunaPoints

QUALITY = {"r2": "max"}
TERMS = {"decode.terms": {"choice": [1, 2]}}


def problems(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        spaces.load(path, overrides)
    return str(caught.value)


def test_a_key_the_experiment_lacks_names_the_nearest(write):
    path = write({"parameters": {"decode.term": {"choice": [1]}}, "objectives": QUALITY})
    assert "unknown key decode.term (did you mean decode.terms?)" in problems(path)


def test_a_value_the_experiment_refuses_is_an_error_and_no_left_out_point(write):
    path = write({"parameters": {"decode.terms": {"choice": [1, 99]}}, "objectives": QUALITY})
    assert "decode.terms=99: must be at most 9" in problems(path)


def test_both_ends_of_a_range_are_checked(write):
    parameters = {"training.lr": {"uniform": [-1.0, 1.0]}}
    path = write({"parameters": parameters, "objectives": QUALITY, "searcher": "random", "trials": 3})
    assert "training.lr=-1.0: must be more than 0" in problems(path)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"objectives": QUALITY}, "parameters is empty"),
        ({"parameters": TERMS}, "objectives is empty"),
        ({"parameters": TERMS, "objectives": {"r2": "up"}}, "expected max or min"),
        ({"parameters": TERMS, "objectives": QUALITY, "within": [3.0]}, "within limits the second objective"),
        ({"parameters": TERMS, "objectives": QUALITY, "trials": 3}, "leave trials out"),
        ({"parameters": TERMS, "objectives": QUALITY, "searcher": "random"}, "searcher=random needs trials"),
        ({"parameters": TERMS, "objectives": QUALITY, "searcher": "optuma", "trials": 3}, "did you mean optuna?"),
        ({"parameters": TERMS, "objectives": QUALITY, "scheduler": "asha"}, "needs trials that train"),
        ({"parameters": TERMS, "objectives": QUALITY, "mode": "inline", "artifact": "x"}, "artifact is for"),
        ({"parameters": TERMS, "objectives": QUALITY, "mode": "distributed", "cpus": 1.0}, "leave them out"),
        ({"parameters": TERMS, "objectives": QUALITY, "mode": "distributed"}, "training.workers of at least 1"),
        ({"parameters": TERMS, "objectives": QUALITY, "per": "decode.term"}, "did you mean decode.terms?"),
        ({"parameters": TERMS, "objectives": QUALITY, "exclude": [{"terms": 1}]}, "exclude[0]: terms"),
        ({"parameters": TERMS, "objectives": QUALITY, "fixed": {"decode.terms": 1}}, "both in fixed and"),
        ({"parameters": TERMS, "objectives": QUALITY, "fixed": {"decode.foo": 1}}, "unknown key decode.foo"),
        ({"parameters": {"decode.terms": [1, 2]}, "objectives": QUALITY}, "is no domain"),
        ({"parameters": {"decode.terms": {"choice": []}}, "objectives": QUALITY}, "needs a list of values"),
        ({"parameters": {"training.lr": {"uniform": [1, 0]}}, "objectives": QUALITY}, "low < high"),
        ({"parameters": {"training.lr": {"loguniform": [0, 1]}}, "objectives": QUALITY}, "low > 0"),
        ({"parameters": {"decode.terms": {"int": [0.5, 2]}}, "objectives": QUALITY}, "whole numbers"),
        ({"parameters": {"training.lr": {"uniform": [0.1, 1]}}, "objectives": QUALITY}, "searcher=grid needs"),
        ({"parameters": TERMS, "objectives": QUALITY, "method": "diffugr"}, "method='diffugr'"),
    ],
)  # fmt: skip
def test_a_space_that_makes_no_sense_says_why(write, space, message):
    assert message in problems(write(space))


def test_inline_trials_do_not_start_workers(write):
    path = write({"mode": "inline", "parameters": TERMS, "objectives": QUALITY}, {"training": {"workers": 2}})
    assert "set it to 0 in fixed" in problems(path)


BUDGETS = {
    "decode.steps": {"choice": [None, 1, 2]},
    "decode.threshold": {"choice": [None, 0.5]},
    "decode.terms": {"choice": [3, 9]},
}


def test_conflicting_points_are_left_out_and_counted(write):
    space = spaces.load(write({"parameters": BUDGETS, "objectives": QUALITY}))
    points = space.points()
    assert len(points) == 12 - 4
    assert not any(p["decode.steps"] and p["decode.threshold"] for p in points)
    assert dict(space.refused) == {"decode.threshold and steps exclude each other": 4}


def test_excluded_points_are_left_out_and_counted(write):
    exclude = [{"decode.terms": 3, "decode.steps": [1, 2]}]
    space = spaces.load(write({"parameters": BUDGETS, "objectives": QUALITY, "exclude": exclude}))
    assert len(space.points()) == 12 - 4 - 2
    assert space.refused[f"exclude: {exclude[0]}"] == 4


def test_a_space_without_a_point_says_what_refused_it(write):
    path = write({"parameters": TERMS, "objectives": QUALITY, "exclude": [{"decode.terms": [1, 2]}]})
    with pytest.raises(ConfigError, match=r"no point of the space is allowed.*exclude"):
        spaces.load(path).points()


def test_random_points_are_seeded_distinct_and_allowed(write):
    parameters = {**BUDGETS, "training.lr": {"loguniform": [1e-4, 1.0]}, "training.steps": {"int": [1, 5]}}
    path = write({"parameters": parameters, "objectives": QUALITY, "searcher": "random", "trials": 20, "seed": 3})
    first, second = (spaces.load(path).points() for _ in range(2))
    other = spaces.load(path, ["seed=4"]).points()
    assert first == second != other
    assert len(first) == 20
    assert all(1e-4 <= p["training.lr"] <= 1 and 1 <= p["training.steps"] <= 5 for p in first)
    assert not any(p["decode.steps"] and p["decode.threshold"] for p in first)


def test_random_search_of_a_small_space_ends_when_it_is_exhausted(write):
    path = write({"parameters": BUDGETS, "objectives": QUALITY, "searcher": "random", "trials": 50})
    assert len(spaces.load(path).points()) == 8


def test_a_choice_may_be_a_list(write):
    path = write({"parameters": TERMS, "objectives": QUALITY, "exclude": [{"decode.terms": [2]}]})
    assert spaces.load(path).points() == [{"decode.terms": 1}]
    assert spaces._matches({"arms": ["a"]}, {"arms": ["a"]})
    assert spaces._matches({"arms": ["a"]}, {"arms": [["a"], ["b"]]})


def optuna_points(path):
    return OptunaPoints(spaces.load(path), ["metrics/r2"], ["max"])


def test_optuna_never_suggests_a_refused_point_or_one_twice(write):
    path = write({"parameters": BUDGETS, "objectives": QUALITY, "searcher": "optuna", "trials": 50})
    searcher = optuna_points(path)
    found = []
    while (suggestion := searcher.suggest(str(len(found)))) != "FINISHED":
        point = suggestion["point"]
        assert not (point["decode.steps"] and point["decode.threshold"])
        assert point not in found
        searcher.on_trial_complete(str(len(found)), {"metrics/r2": point["decode.terms"]})
        found.append(point)
    assert len(found) == 8


def test_optuna_closes_in_on_the_optimum(write):
    parameters = {"training.lr": {"uniform": [0.001, 1.0]}}
    path = write({"parameters": parameters, "objectives": QUALITY, "searcher": "optuna", "trials": 40})
    searcher = optuna_points(path)
    drawn = []
    for i in range(40):
        drawn.append(searcher.suggest(str(i))["point"]["training.lr"])
        searcher.on_trial_complete(str(i), {"metrics/r2": -abs(drawn[-1] - 0.7)})
    late = [abs(lr - 0.7) for lr in drawn[25:]]
    assert sum(late) / len(late) < 0.2  # uniform draws: 0.29


def test_a_failed_trial_does_not_stop_optuna_and_its_state_survives(write, tmp_path):
    parameters = {"training.lr": {"uniform": [0.001, 1.0]}}
    path = write({"parameters": parameters, "objectives": QUALITY, "searcher": "optuna", "trials": 40})
    first = optuna_points(path)
    first.suggest("a")
    first.on_trial_complete("a", None, error=True)
    first.suggest("b")
    first.save(str(tmp_path / "state"))
    second = optuna_points(path)
    second.restore(str(tmp_path / "state"))
    second.on_trial_complete("b", {"metrics/r2": 1.0})
    assert second.suggest("c") == first.suggest("c") or second.study.best_value == 1.0
    assert pickle.dumps(second.__dict__)

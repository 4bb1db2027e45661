"""Exact match, F1 and accuracy on hand-made cases."""

import pytest

from mobula.evaluation.answers import accuracy, exact_match, f1, holds, is_closed, normal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Beatles!", "beatles"),
        ("A man, an ox and the sea", "man ox and sea"),
        ("U.S.", "us"),
        ("theory", "theory"),
        ("the", ""),
        ("", ""),
    ],
)
def test_normal_form(text, expected):
    assert normal(text) == expected


@pytest.mark.parametrize(
    ("prediction", "golds", "em", "overlap", "acc"),
    [
        ("The Beatles", ["beatles"], 1, 1, 1),
        ("Paul McCartney", ["McCartney", "Paul McCartney"], 1, 1, 1),  # the best of several answers
        ("the band The Beatles", ["the beatles"], 0, 2 / 3, 1),
        ("in 14 December 1972", ["14 December 1972 UTC"], 0, 3 / 4, 0),
        ("red red", ["red blue"], 0, 1 / 2, 0),  # words count as often as they occur
        ("", ["x"], 0, 0, 0),
        ("yes", ["yes"], 1, 1, 1),
        ("yes it is", ["yes"], 0, 0, 1),
        ("no", ["yes"], 0, 0, 0),
        ("party", ["art"], 0, 0, 1),
        ("anything", [], 0, 0, 0),
    ],
)
def test_scores(prediction, golds, em, overlap, acc):
    assert exact_match(prediction, golds) == em
    assert f1(prediction, golds) == pytest.approx(overlap)
    assert accuracy(prediction, golds) == acc


def test_passages_have_answers_as_whole_words():
    assert holds("It was Bob Dylan's song.", ["bob dylans"])
    assert holds("(1972)", ["1971", "1972"])
    assert not holds("a party", ["art"])
    assert not holds("anything", ["the"])


def test_yes_and_no_are_in_no_passage():
    assert is_closed(["Yes"]) and is_closed(["no."]) and not is_closed(["Norway"])

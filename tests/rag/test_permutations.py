"""Lists of passages: what counts as a number, and how lists are filled."""

import pytest

from mobula.rag.permutations import parse_permutation, repaired, written


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("[2] > [1] > [3]", 3, [2, 1, 3]),
        ("1998 [2] > [0] > [2] > [9]", 5, [2]),  # a year, 0-based, named again, out of range
        ("2 > 1", 5, []),
        ("", 5, []),
        ("[ 3 ], then [12]", 12, [3, 12]),
        ("[-1] [1.5] [a] [²]", 5, []),
        ("[" + "9" * 10_000 + "] [1]", 5, [1]),
        ("[1", 5, []),
    ],
)
def test_only_passages_within_brackets_count(text, n, expected):
    assert parse_permutation(text, n) == expected


@pytest.mark.parametrize(
    ("order", "n", "k", "expected"),
    [
        ([1], 4, 3, [1, 2, 3]),
        ([3], 4, 3, [3, 1, 2]),
        ([], 4, 2, [1, 2]),
        ([4, 2, 3], 4, 2, [4, 2]),
        ([2], 2, 3, [2, 1]),
    ],
)
def test_lists_are_filled_in_the_order_shown(order, n, k, expected):
    assert repaired(order, n, k) == expected


def test_what_is_written_is_read():
    assert parse_permutation(written([3, 1, 11]), 20) == [3, 1, 11]

"""What follows what was there before."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from worker.backends.lookup import guess


def tokens(*values: int) -> array[int]:
    return array("i", values)


def test_what_followed_the_same_end_follows_again() -> None:
    assert guess(tokens(1, 2, 3, 4, 5, 9, 1, 2), 3) == tokens(3, 4, 5)


def test_the_longest_end_decides_and_of_its_places_the_last() -> None:
    assert guess(tokens(7, 1, 2, 30, 1, 2, 40, 7, 1, 2), 1) == tokens(30)
    assert guess(tokens(1, 2, 30, 8, 1, 2, 40, 7, 1, 2), 1) == tokens(40)


def test_a_text_that_repeats_one_token_goes_on_so() -> None:
    assert guess(tokens(5, 5, 5, 5), 2) == tokens(5)


def test_without_a_repetition_there_is_no_guess() -> None:
    assert not guess(tokens(), 4)
    assert not guess(tokens(1), 4)
    assert not guess(tokens(1, 2, 3), 4)
    assert not guess(tokens(1, 2, 3, 1, 2), 0)


@given(st.lists(st.integers(0, 3) | st.integers(0, 2**31 - 1), max_size=60), st.integers(1, 8))
def test_a_guess_is_a_piece_of_the_text_after_its_end(values: list[int], limit: int) -> None:
    found = list(guess(tokens(*values), limit))
    ends = {
        tuple(values[at : at + length + len(found)])
        for length in (2, 3, 4)
        for at in range(len(values) - length)
        if values[at : at + length] == values[len(values) - length :]
    }
    assert bool(found) == bool(ends)
    if found:
        assert any(list(end[-len(found) :]) == found for end in ends)
        assert len(found) <= limit

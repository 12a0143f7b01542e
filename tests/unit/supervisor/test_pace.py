"""When a place in a queue is free, from how fast answers end."""

import pytest

from supervisor.pace import DEFAULT_S, MAX_S, MIN_S, Pace


def steady(interval_s: float, answers: int = 5) -> Pace:
    pace = Pace()
    pace.busy(0.0)
    for number in range(1, answers + 1):
        pace.answered(number * interval_s)
    return pace


def test_before_any_answer_a_default_is_said() -> None:
    pace = Pace()
    assert pace.next_place_s(100.0) == DEFAULT_S
    pace.busy(100.0)
    assert pace.next_place_s(100.0) == DEFAULT_S


def test_the_next_place_is_free_when_the_next_answer_is_due() -> None:
    pace = steady(8.0)
    assert pace.next_place_s(40.0) == pytest.approx(8.0)
    assert pace.next_place_s(45.0) == pytest.approx(3.0)


def test_an_answer_that_is_overdue_is_expected_to_take_as_long_again() -> None:
    assert steady(8.0).next_place_s(40.0 + 20.0) == pytest.approx(20.0)


def test_the_time_without_work_does_not_count() -> None:
    pace = steady(8.0)
    pace.idle()
    pace.busy(10_000.0)
    pace.answered(10_008.0)
    assert pace.next_place_s(10_008.0) == pytest.approx(8.0)


def test_only_the_first_call_starts_the_work() -> None:
    pace = Pace()
    pace.busy(0.0)
    pace.busy(9.0)
    pace.answered(10.0)
    assert pace.next_place_s(10.0) == pytest.approx(10.0)


def test_the_mean_follows_a_change() -> None:
    pace = steady(2.0)
    for number in range(1, 41):
        pace.answered(10.0 + number * 20.0)
    assert 19.0 < pace.next_place_s(810.0) <= 20.0


def test_what_is_said_has_bounds() -> None:
    assert steady(0.001).next_place_s(0.005) == MIN_S
    assert steady(5000.0).next_place_s(25_000.0) == MAX_S


def test_an_answer_out_of_nowhere_is_ignored() -> None:
    pace = Pace()
    pace.answered(5.0)
    assert pace.next_place_s(5.0) == DEFAULT_S

"""Failure accounting: the window, the delays, the levels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.quarantine import (
    Account,
    Policy,
    count_in_window,
    record_failure,
    record_health,
    record_routable,
    release,
    restart_delay,
)

POLICY = Policy(threshold=3, window_s=600, delay_cap_s=60, decay_s=600)


def fail_at(*times: float, policy: Policy = POLICY) -> Account:
    account = Account()
    for time in times:
        account = record_failure(record_routable(account), policy, time)
    return account


def test_the_threshold_quarantines() -> None:
    assert not fail_at(0, 1).quarantined
    assert fail_at(0, 1, 2).quarantined


def test_failures_leave_the_window() -> None:
    account = fail_at(0, 1, 601)
    assert not account.quarantined
    assert count_in_window(account, POLICY, 601) == 1
    assert count_in_window(account, POLICY, 1201) == 0


def test_a_failure_exactly_one_window_old_is_out() -> None:
    assert count_in_window(fail_at(0), POLICY, 599.9) == 1
    assert count_in_window(fail_at(0), POLICY, 600) == 0


def test_restart_delays_double_up_to_the_cap() -> None:
    delays = [restart_delay(Account(level=level), POLICY, jitter=1.0) for level in range(1, 12)]
    assert delays == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_a_huge_level_does_not_overflow() -> None:
    assert restart_delay(Account(level=10**9), POLICY, jitter=1.0) == 60


@given(st.integers(2, 50), st.floats(0, 1))
def test_jitter_takes_at_most_half_of_the_delay(level: int, jitter: float) -> None:
    full = restart_delay(Account(level=level), POLICY, jitter=1.0)
    assert full / 2 <= restart_delay(Account(level=level), POLICY, jitter) <= full


def test_healthy_time_decays_the_level() -> None:
    account = Account(level=5)
    assert record_health(account, POLICY, 599).level == 5
    assert record_health(account, POLICY, 1200).level == 3
    assert record_health(account, POLICY, 1e9) == Account(level=0)


@given(st.lists(st.integers(0, 2000), max_size=10), st.integers(0, 8))
def test_healthy_time_counts_in_whatever_pieces_it_comes(pieces: list[int], level: int) -> None:
    account = Account(level=level)
    for piece in pieces:
        account = record_health(account, POLICY, piece)
    assert account == record_health(Account(level=level), POLICY, sum(pieces))


def test_a_failure_begins_a_new_stretch() -> None:
    account = record_failure(record_health(Account(level=2), POLICY, 599), POLICY, 0)
    assert record_health(account, POLICY, 599).level == 3


def test_one_failure_on_probation_quarantines_again() -> None:
    account = fail_at(0, 1, 2)
    again = record_failure(account, POLICY, 5000)
    assert again.quarantined
    assert again.quarantines == 2


def test_failures_in_a_row_quarantine_however_slowly_they_come() -> None:
    account = Account()
    for time in (0, 1000, 2000):
        assert not account.quarantined
        account = record_failure(account, POLICY, time)
    assert account.quarantined
    assert count_in_window(account, POLICY, 2000) == 1


def test_being_routable_ends_a_row() -> None:
    account = Account()
    for time in range(0, 10_000, 1000):
        account = record_failure(account, POLICY, time)
        account = record_failure(record_routable(account), POLICY, time + 700)
        assert account.streak == 1
        assert not account.quarantined


def test_release_empties_the_window_and_keeps_the_history() -> None:
    account = release(fail_at(0, 1, 2))
    assert (account.quarantined, account.times, account.quarantines) == (False, (), 1)


@given(st.lists(st.floats(0, 1e4), max_size=30).map(sorted), st.integers(1, 5))
def test_same_failures_same_account(times: list[float], threshold: int) -> None:
    policy = Policy(threshold=threshold, window_s=100)
    account = fail_at(*times, policy=policy)
    assert account == fail_at(*times, policy=policy)
    recount = [t for t in times if times[-1] - t < 100] if times else []
    assert list(account.times) == recount


@pytest.mark.parametrize("threshold", [1, 2, 5])
def test_the_threshold_is_a_setting(threshold: int) -> None:
    policy = Policy(threshold=threshold)
    assert not fail_at(*range(threshold - 1), policy=policy).quarantined
    assert fail_at(*range(threshold), policy=policy).quarantined

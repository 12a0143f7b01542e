"""What becomes of a request when its worker dies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.resumption import (
    MAX_KEPT_TOKENS,
    MAX_RESUMES,
    MAX_RUNS,
    KeptTokens,
    Lost,
    NextRun,
    next_run,
)

SEEN = Lost(runs=1, made=5, gained=5, kept=True, delivered=True, alone=False)
UNSEEN = Lost(runs=1, made=0, gained=0, kept=False, delivered=False, alone=False)


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        (SEEN, NextRun.RESUMED),
        (SEEN._replace(runs=2), NextRun.RESUMED),
        (SEEN._replace(runs=3), NextRun.NONE),
        # Whatever it was that crashed, this one had company.
        (SEEN._replace(runs=2, gained=0), NextRun.RESUMED),
        (SEEN._replace(runs=2, gained=0, alone=True), NextRun.NONE),
        (SEEN._replace(alone=True), NextRun.RESUMED),
        (SEEN._replace(kept=False), NextRun.NONE),
        (UNSEEN, NextRun.AGAIN),
        (UNSEEN._replace(runs=2), NextRun.NONE),
        (UNSEEN._replace(made=5, gained=5), NextRun.AGAIN),
        (UNSEEN._replace(delivered=True), NextRun.NONE),
        (UNSEEN._replace(kept=True), NextRun.AGAIN),
    ],
)
def test_what_becomes_of_it(lost: Lost, expected: NextRun) -> None:
    assert next_run(lost) is expected


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=5, max_size=8),
    st.booleans(),
)
def test_no_request_is_run_more_often_than_the_bounds_allow(
    deaths: list[tuple[int, bool]], kept: bool
) -> None:
    made = runs = 0
    for gained, alone in deaths:
        runs += 1
        made += gained
        lost = Lost(runs, made, gained, kept and made > 0, delivered=made > 0, alone=alone)
        if next_run(lost) is NextRun.NONE:
            break
    assert runs <= max(MAX_RUNS, MAX_RESUMES + 1)


def test_tokens_are_kept_in_order() -> None:
    kept = KeptTokens()
    kept.add([1, 2])
    kept.add([3])
    assert kept.whole == [1, 2, 3]
    kept.clear()
    assert kept.whole == []


def test_more_tokens_than_the_bound_are_none() -> None:
    kept = KeptTokens()
    kept.add(list(range(MAX_KEPT_TOKENS)))
    assert len(kept.whole) == MAX_KEPT_TOKENS
    kept.add([1])
    assert kept.whole == []
    kept.add([2])
    assert kept.whole == []


@pytest.mark.parametrize("nonsense", [2**31, -(2**40)])
def test_a_worker_that_talks_nonsense_is_not_kept(nonsense: int) -> None:
    kept = KeptTokens()
    kept.add([1])
    kept.add([nonsense])
    assert kept.whole == []

"""Whom to stop when memory runs short."""

from hypothesis import given
from hypothesis import strategies as st

from supervisor.memory import Footprint, judge

GB = 10**9


def worker(name: str, size: int, *, baseline: int = 0, limit: int | None = None) -> Footprint:
    return Footprint(name, 1, size, baseline, limit)


def test_nobody_is_stopped_while_there_is_enough() -> None:
    assert judge([worker("a", 90 * GB)], available=2 * GB, low_water=GB) == []


def test_a_worker_over_its_limit_is_stopped() -> None:
    (verdict,) = judge(
        [worker("a", 3 * GB, limit=2 * GB), worker("b", 9 * GB)], available=50 * GB, low_water=GB
    )
    assert verdict.model_id == "a"
    assert "3.00 GB is over its limit of 2.00 GB" in verdict.reason


def test_below_the_mark_the_one_that_grew_goes_not_the_largest() -> None:
    big_and_steady = worker("big", 60 * GB, baseline=60 * GB)
    grown = worker("grown", 9 * GB, baseline=2 * GB)
    (verdict,) = judge([big_and_steady, grown], available=GB // 2, low_water=GB)
    assert verdict.model_id == "grown"
    assert "by 7.00 GB" in verdict.reason


def test_pressure_from_outside_is_nobodys_fault() -> None:
    steady = worker("steady", 20 * GB, baseline=19 * GB)
    loading = worker("loading", 7 * GB, baseline=8 * GB)
    small = worker("small", GB // 100, baseline=0)
    assert judge([steady, loading, small], available=0, low_water=GB) == []


def test_one_at_a_time_below_the_mark() -> None:
    over = worker("over", 3 * GB, limit=2 * GB)
    grown = worker("grown", 9 * GB, baseline=GB)
    assert [v.model_id for v in judge([over, grown], available=0, low_water=GB)] == ["over"]
    assert judge([], available=0, low_water=GB) == []


@given(
    st.lists(
        st.builds(
            Footprint,
            st.text(max_size=3),
            st.just(1),
            st.integers(0, 100).map(lambda n: n * GB),
            st.integers(0, 100).map(lambda n: n * GB),
            st.none() | st.integers(1, 100).map(lambda n: n * GB),
        )
    ),
    st.integers(0, 100),
    st.integers(0, 100),
)
def test_the_same_figures_give_the_same_answer(
    footprints: list[Footprint], available: int, low_water: int
) -> None:
    verdicts = judge(footprints, available=available, low_water=low_water)
    assert verdicts == judge(footprints, available=available, low_water=low_water)
    over = [f for f in footprints if f.limit is not None and f.size > f.limit]
    short = available < low_water and any(f.has_grown for f in footprints)
    assert len(verdicts) == (len(over) or (1 if short else 0))

"""Who is unloaded for another: as few as it takes, or nobody."""

from hypothesis import given
from hypothesis import strategies as st

from supervisor.eviction import Holder, choose

SIZES = st.integers(0, 1000)
HOLDERS = st.lists(
    st.builds(
        Holder,
        st.text("abcdef", min_size=1, max_size=4),
        SIZES,
        st.none() | st.floats(0, 100, allow_nan=False),
    ),
    max_size=8,
    unique_by=lambda holder: holder.model_id,
)


def names(chosen: list[Holder] | None) -> list[str] | None:
    return None if chosen is None else [holder.model_id for holder in chosen]


def test_nobody_goes_while_there_is_room() -> None:
    assert choose(10, 10, [Holder("a", 5, 100.0)]) == []


def test_the_least_recently_used_goes_first() -> None:
    holders = [Holder("new", 5, 1.0), Holder("old", 5, 9.0), Holder("busy", 50, None)]
    assert names(choose(10, 6, holders)) == ["old"]
    assert names(choose(10, 1, holders)) == ["old", "new"]


def test_nobody_goes_in_vain() -> None:
    assert choose(100, 10, [Holder("a", 5, 1.0), Holder("busy", 500, None)]) is None


def test_who_need_not_go_is_spared() -> None:
    holders = [Holder("oldest", 5, 9.0), Holder("small", 2, 8.0), Holder("large", 50, 7.0)]
    assert names(choose(50, 0, holders)) == ["large"]
    assert names(choose(52, 0, holders)) == ["oldest", "large"]


@given(SIZES, st.integers(-1000, 1000), HOLDERS)
def test_it_fits_afterwards_and_nobody_has_gone_in_vain(
    needed: int, available: int, holders: list[Holder]
) -> None:
    chosen = choose(needed, available, holders)
    able = [holder for holder in holders if holder.idle_s is not None]
    if chosen is None:
        assert available + sum(holder.frees for holder in able) < needed
        return
    assert all(holder in able for holder in chosen)
    freed = sum(holder.frees for holder in chosen)
    assert available + freed >= needed
    assert all(available + freed - holder.frees < needed for holder in chosen)

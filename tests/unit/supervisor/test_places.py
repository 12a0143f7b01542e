"""Places of a model: never more than there are, and something left for the next client."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from supervisor.places import may_enter, most_of_one


def fill(limit: int, order: list[str]) -> Counter[str]:
    taken: Counter[str] = Counter()
    for client in order:
        if may_enter(taken[client], taken.total(), limit):
            taken[client] += 1
    return taken


@given(st.integers(1, 100), st.lists(st.sampled_from("abcdef"), max_size=400))
def test_the_bound_holds_whatever_the_order(limit: int, order: list[str]) -> None:
    assert fill(limit, order).total() <= limit


@given(st.integers(5, 100), st.integers(1, 300))
def test_one_that_always_asks_leaves_a_place_for_another(limit: int, asked: int) -> None:
    taken = fill(limit, ["greedy"] * asked)
    assert may_enter(0, taken.total(), limit)


def test_shares_of_sixty_four() -> None:
    assert fill(64, ["a"] * 100) == {"a": 52}
    two = fill(64, ["a", "b"] * 100)
    assert sorted(two.values()) == [28, 29]
    # Those who came first give way as their requests end, not before.
    assert fill(64, ["a"] * 100 + ["b"] * 100) == {"a": 52, "b": 10}


def test_few_places_are_not_divided() -> None:
    assert [most_of_one(limit) for limit in (1, 2, 3, 4, 5, 12, 64)] == [1, 2, 3, 4, 4, 10, 52]

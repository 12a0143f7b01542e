"""What aliases, presets and ``auto`` stand for, and the order in which candidates are tried."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.names import (
    ANY,
    AUTO,
    MAX_STEPS,
    Known,
    NameConflict,
    Route,
    Standing,
    any_of,
    names,
    next_of,
)
from supervisor.presets import Preset

NAMES = st.sampled_from(["a", "b", "c", "d", "e"])
ENDS = st.sampled_from(["x", "y", "org/z"])
TARGETS = st.lists(NAMES | ENDS, min_size=1, max_size=3)
STANDINGS = st.sampled_from(Standing)


def test_an_alias_stands_for_the_ids_at_its_end() -> None:
    table = names({"fast": "x", "best": ["y", "fast", "x"]}, {}, ()).routes
    assert table["fast"] == Route(("x",))
    assert table["best"] == Route(("y", "x"))
    assert table[AUTO] == Route((ANY,))


def test_a_preset_is_asked_for_with_and_without_its_prefix() -> None:
    preset = Preset(model=("best", "z"))
    table = names({"best": ["y", "x"], "mine": "coder"}, {"coder": preset}, ()).routes
    expected = Route(("y", "x", "z"), preset)
    assert table["coder"] == table["preset:coder"] == table["mine"] == expected


def test_auto_is_the_operators_or_a_models_if_one_is_called_so() -> None:
    assert names({"auto": "x"}, {}, ()).routes[AUTO] == Route(("x",))
    assert AUTO not in names({}, {}, {AUTO}).routes
    assert names({"a": ["x", "auto"]}, {}, ()).routes["a"] == Route(("x", ANY))
    assert names({"a": ["x", "auto"]}, {}, {AUTO}).routes["a"] == Route(("x", AUTO))


@pytest.mark.parametrize(
    ("aliases", "presets", "ids", "said"),
    [
        ({"a": "a"}, {}, (), r"aliases\.a: leads back to itself: a → a"),
        ({"a": "b", "b": ["x", "a"]}, {}, (), r"aliases\.a: leads back to itself: a → b → a"),
        ({"a": "p"}, {"p": Preset(model="a")}, (), r"leads back to itself: a → p → a"),
        ({"a": []}, {}, (), r"aliases\.a: stands for no model"),
        ({}, {"p": Preset(model=())}, (), r"presets\.p: stands for no model"),
        ({"a": ""}, {}, (), r"aliases\.a: '' must not be empty"),
        ({"": "x"}, {}, (), r"must not be empty"),
        ({"a": ["x", "../y"]}, {}, (), r"aliases\.a: '../y' must not contain"),
        ({"a\n": "x"}, {}, (), r"control characters"),
        ({"load": "x"}, {}, (), r"name of a route"),
        ({"x": "y"}, {}, {"x"}, r"aliases\.x: the name is the id of a configured model"),
        ({}, {"x": Preset(model="y")}, {"x"}, r"presets\.x: the name is the id of a configured"),
        ({"p": "x"}, {"p": Preset(model="x")}, (), r"aliases\.p: there is a preset"),
        ({"preset:a": "x"}, {}, (), r"must not begin with 'preset:'"),
        ({"a": "preset:nobody"}, {}, (), r"aliases\.a: 'preset:nobody' is none of the presets"),
        ({"a": ["x", "p"]}, {"p": Preset(model="y")}, (), r"a preset can only stand alone"),
        ({}, {"p": Preset(model="q"), "q": Preset(model="x")}, (), r"cannot be another preset"),
    ],
)
def test_what_cannot_be_is_told_with_its_place(
    aliases: dict[str, str], presets: dict[str, Preset], ids: set[str], said: str
) -> None:
    with pytest.raises(NameConflict, match=said):
        names(aliases, presets, ids)


def test_a_chain_of_names_is_bounded() -> None:
    chain = {f"a{n}": f"a{n + 1}" for n in range(MAX_STEPS)}
    assert names(chain, {}, ()).routes["a0"] == Route((f"a{MAX_STEPS}",))
    with pytest.raises(NameConflict, match="more than"):
        names({"start": "a0", **chain}, {}, ())


def test_many_ways_to_one_id_cost_no_more_than_one() -> None:
    doubled = {f"a{n}": [f"a{n + 1}", f"a{n + 1}"] for n in range(30)}
    assert names(doubled, {}, ()).routes["a0"] == Route(("a30",))


@given(st.dictionaries(NAMES, TARGETS))
def test_every_name_ends_at_ids_or_the_table_is_refused(aliases: dict[str, list[str]]) -> None:
    try:
        table = names(aliases, {}, ()).routes
    except NameConflict:
        assert _has_cycle(aliases)
        return
    assert not _has_cycle(aliases)
    assert table.keys() == {*aliases, AUTO}
    for name in aliases:
        candidates = table[name].candidates
        assert candidates
        assert len(set(candidates)) == len(candidates)
        assert not aliases.keys() & set(candidates)


def _has_cycle(aliases: dict[str, list[str]]) -> bool:
    left = {name: set(targets) & aliases.keys() for name, targets in aliases.items()}
    while ends := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in ends:
            del left[name]
    return bool(left)


@given(st.dictionaries(st.sampled_from("abcdef"), STANDINGS, min_size=1))
def test_the_next_is_the_first_that_nobody_has_to_wait_for(standings: dict[str, Standing]) -> None:
    left = list(standings)
    found = next_of(left, standings.__getitem__)
    routable = [each for each in left if standings[each] is Standing.ROUTABLE]
    if found != left[0]:
        assert standings[left[0]] is Standing.COMING
        assert found == routable[0]
    elif standings[found] is Standing.COMING:
        assert not routable


MODELS = st.lists(
    st.builds(
        Known,
        st.text(min_size=1, max_size=3),
        STANDINGS,
        st.booleans(),
        st.none() | st.floats(1, 1e9),
        st.booleans(),
    ),
    unique_by=lambda model: model.model_id,
)


@given(MODELS)
def test_auto_is_what_was_used_last(models: list[Known]) -> None:
    by_id = {model.model_id: model for model in models}
    found = [by_id[each] for each in any_of(models)]
    routable = [each for each in models if each.suits and each.standing is Standing.ROUTABLE]
    if routable:
        assert sorted(found) == sorted(routable)
        used = [each.last_used_at for each in routable if each.last_used_at is not None]
        if used:
            assert found[0].last_used_at == max(used)
        elif any(each.configured for each in routable):
            assert found[0].configured
    else:
        assert all(each.suits and each.standing is Standing.COMING for each in found)

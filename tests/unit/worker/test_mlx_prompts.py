"""Which snapshots are kept, which are found, and what they are cut to."""

from array import array
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

mx = pytest.importorskip("mlx.core")

from mlx_lm.models.cache import KVCache, RotatingKVCache  # noqa: E402

from worker.backends.mlx_prompts import (  # noqa: E402
    PromptCache,
    Snapshot,
)
from worker.backends.prefixes import MAX_KEPT, Tokens, common_length  # noqa: E402

#: Keys and values of one float32.
BYTES_PER_TOKEN = 8
#: Of the caches that cannot be cut back.
WINDOW = 4


def tokens(text: str) -> Tokens:
    return array("i", list(text.encode()))


def snapshot(text: str, *, trimmable: bool = True) -> Snapshot:
    kind: Any = KVCache if trimmable else partial(RotatingKVCache, WINDOW)
    cache = kind()
    values = mx.arange(len(text), dtype=mx.float32).reshape(1, 1, -1, 1)
    cache.keys = cache.values = values
    cache.offset = len(text)
    return Snapshot.of(list(text.encode()), [cache])


def holding(*texts: str, trimmable: bool = True, **bounds: int) -> PromptCache:
    prompts = PromptCache(**({"max_bytes": 1 << 20} | bounds))
    for text in texts:
        prompts.keep(snapshot(text, trimmable=trimmable))
    return prompts


def found(prompts: PromptCache, prompt: str) -> tuple[str, int] | None:
    best, length = prompts.find(tokens(prompt))
    return None if best is None else (bytes(best.tokens.tolist()).decode(), length)


@given(st.lists(st.integers(0, 1), max_size=3000), st.lists(st.integers(0, 1), max_size=3000))
def test_common_length_of_anything(one: list[int], other: list[int]) -> None:
    expected = next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )
    assert common_length(array("i", one), array("i", other)) == expected


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 1024, 2000])
def test_common_length_of_long_beginnings(length: int) -> None:
    beginning = list(range(length))
    one, other = array("i", [*beginning, -1, 5, 5]), array("i", [*beginning, -2, 5])
    assert common_length(one, other) == common_length(other, one) == length
    assert common_length(one, array("i", beginning)) == length


def test_the_one_that_saves_most_is_found() -> None:
    prompts = holding("abcx", "abcdefx", "zzz")
    assert found(prompts, "abcdefgh") == ("abcdefx", 6)
    assert found(prompts, "abcxyz") == ("abcx", 4)
    assert found(prompts, "q") is None


def test_last_token_of_a_prompt_is_left_to_compute() -> None:
    prompts = holding("abcd")
    assert found(prompts, "abcd") == ("abcd", 3)
    assert found(prompts, "ab") == ("abcd", 1)
    assert found(prompts, "a") is None


def test_without_trimming_only_the_whole_is_found() -> None:
    prompts = holding("abcdef", trimmable=False)
    assert found(prompts, "abcdefg") == ("abcdef", 6)
    assert found(prompts, "abcdef") is None
    assert found(prompts, "abcdeg") is None
    assert prompts.common(tokens("abcdeg")) == 5


def test_what_is_cut_out_leaves_the_kept_one_whole() -> None:
    kept = snapshot("abcdef")
    (cut,) = kept.beginning(2)
    cut.update_and_fetch(mx.full((1, 1, 1, 1), 9.0), mx.full((1, 1, 1, 1), 9.0))
    assert cut.keys_and_values()[0].reshape(-1).tolist() == [0, 1, 9]
    assert kept.caches[0].keys_and_values()[0].reshape(-1).tolist() == [0, 1, 2, 3, 4, 5]


def test_longer_one_replaces_what_it_begins_with() -> None:
    prompts = holding("ab", "abcd", "xy")
    assert len(prompts) == 2
    assert prompts.nbytes == 6 * BYTES_PER_TOKEN


def test_shorter_one_adds_nothing_to_a_longer() -> None:
    prompts = holding("abcd", "xy", "ab", max_entries=2)
    prompts.keep(snapshot("qq"))
    # Asking for the shorter one made the longer one recent.
    assert found(prompts, "abcdef") == ("abcd", 4)
    assert found(prompts, "xyz") is None


def test_without_trimming_both_are_kept() -> None:
    prompts = holding("abcdefgh", "abcdef", "abcdef", trimmable=False)
    assert len(prompts) == 2
    assert found(prompts, "abcdefx") == ("abcdef", 6)


def test_found_ones_are_kept_longest() -> None:
    prompts = holding("aa", "bb", "cc", max_entries=3)
    assert found(prompts, "aax") == ("aa", 2)
    prompts.keep(snapshot("dd"))
    assert found(prompts, "bbx") is None
    assert found(prompts, "aax") == ("aa", 2)


def test_bytes_are_bounded() -> None:
    prompts = holding("aaaa", "bbbb", "cccccc", max_bytes=10 * BYTES_PER_TOKEN)
    assert found(prompts, "aaaax") is None
    assert found(prompts, "bbbbx") == ("bbbb", 4)
    assert prompts.nbytes == 10 * BYTES_PER_TOKEN


def test_one_beyond_the_bound_drives_nothing_out() -> None:
    prompts = holding("aaaa", "bbbbbbbbbbb", max_bytes=10 * BYTES_PER_TOKEN)
    assert found(prompts, "aaaax") == ("aaaa", 4)
    assert len(prompts) == 1


def test_nothing_is_not_kept() -> None:
    assert len(holding("")) == 0


@given(
    st.lists(st.text("ab", max_size=8), max_size=30),
    st.integers(0, 30),
    st.integers(1, 5),
    st.booleans(),
)
def test_bounds_hold_always(texts: list[str], room: int, entries: int, trimmable: bool) -> None:
    prompts = PromptCache(room * BYTES_PER_TOKEN, entries)
    for text in texts:
        prompts.keep(snapshot(text, trimmable=trimmable))
        assert len(prompts) <= entries
        assert prompts.nbytes <= room * BYTES_PER_TOKEN
        if text and len(text) <= room:
            assert found(prompts, text + "!") is not None


def test_small_ones_are_many() -> None:
    texts = [f"{number:04}" for number in range(MAX_KEPT + 1)]
    prompts = holding(*texts)
    assert len(prompts) == MAX_KEPT
    assert prompts.find(tokens(texts[0] + "x"))[1] == 3  # of another one
    assert prompts.find(tokens(texts[1] + "x"))[1] == 4

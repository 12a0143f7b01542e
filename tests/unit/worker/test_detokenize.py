"""Bytes in, text out, never half a character."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from worker.backends.detokenize import ByteDetokenizer


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in pairwise(edges)]


@given(st.text(), st.lists(st.integers(min_value=0)))
def test_any_cut_of_a_text_gives_the_text(text: str, places: list[int]) -> None:
    pieces = cut(text.encode(), places)
    detokenizer = ByteDetokenizer(pieces.__getitem__)
    parts = [detokenizer.add(token) for token in range(len(pieces))]
    assert "".join(parts) + detokenizer.finish() == text
    assert "\ufffd" not in "".join(parts) or "\ufffd" in text


def test_incomplete_character_is_held_back_and_then_replaced() -> None:
    detokenizer = ByteDetokenizer([b"a", "é".encode()[:1]].__getitem__)
    assert detokenizer.add(0) == "a"
    assert detokenizer.add(1) == ""
    assert detokenizer.finish() == "\ufffd"


def test_invalid_bytes_do_not_hold_up_what_follows() -> None:
    detokenizer = ByteDetokenizer([b"\xff", b"ok"].__getitem__)
    assert detokenizer.add(0) + detokenizer.add(1) == "\ufffdok"

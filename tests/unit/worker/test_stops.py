"""Stop strings are found wherever the text is cut, and nothing of them leaks."""

from hypothesis import given
from hypothesis import strategies as st

from worker.stops import StopMatcher

letters = st.text("ab", max_size=12)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """The whole text up to the stop string that begins first."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


@given(st.lists(letters, max_size=8), stop_lists)
def test_any_split_gives_the_result_of_the_whole(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    emitted = "".join(matcher.feed(piece) for piece in pieces) + matcher.flush()
    assert (emitted, matcher.stopped) == expected("".join(pieces), stops)


@given(letters, stop_lists)
def test_text_before_a_possible_stop_is_not_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    emitted = matcher.feed(text)
    if not matcher.stopped:
        held = text[len(emitted) :]
        assert text.startswith(emitted)
        assert len(held) < max(map(len, stops), default=1)
    matcher.flush()


def test_a_stop_string_over_three_tokens() -> None:
    matcher = StopMatcher(["<|end|>"])
    assert [matcher.feed(t) for t in ("Hi <", "|en", "d|> more", " text")] == ["Hi ", "", "", ""]
    assert matcher.stopped
    assert matcher.flush() == ""


def test_what_only_looked_like_a_stop_is_emitted() -> None:
    matcher = StopMatcher(["<|end|>"])
    assert matcher.feed("a <|en") == "a "
    assert matcher.feed("try|>") == "<|entry|>"
    assert matcher.feed("<|") == ""
    assert matcher.flush() == "<|"
    assert not matcher.stopped

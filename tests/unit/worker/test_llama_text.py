"""What llama.cpp's tokenisers would die of is found before they see it."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.backends.base import PromptRefused
from worker.backends.llama_text import MAX_RUN, Alphabet, with_stack_for

MARK = "\N{LOWER ONE EIGHTH BLOCK}"


def stack_for(text: str) -> int | None:
    """Of the thread that tokenises a text; None if it is the caller's own."""
    sizes: list[int] = []
    caller = threading.current_thread()

    class Watched(threading.Thread):
        def start(self) -> None:
            sizes.append(threading.stack_size())
            super().start()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "Thread", Watched)
        ran_in = with_stack_for(text, threading.current_thread, param="prompt")
    assert (ran_in is caller) == (not sizes)
    return sizes[0] if sizes else None


def test_a_short_text_needs_no_thread() -> None:
    assert stack_for("a" * 4096) is None


def test_a_stack_grows_with_what_may_be_matched_in_one_go() -> None:
    default = threading.stack_size()
    # 320 bytes a character are needed on x86-64.
    assert (stack_for("a" * 100_000) or 0) > 2 * 320 * 100_000
    largest = stack_for("a" * MAX_RUN) or 0
    # Of a longer text its longest line counts.
    assert 0 < (stack_for("a line\n" * MAX_RUN) or 0) < largest
    assert threading.stack_size() == default


@pytest.mark.parametrize("run", ["a" * (MAX_RUN + 1), " \n" * MAX_RUN, "\n" * (MAX_RUN + 1)])
def test_a_run_without_end_is_refused(run: str) -> None:
    with pytest.raises(PromptRefused, match="too long to be tokenised") as refusal:
        stack_for(f"a line\n{run}\nanother")
    assert refusal.value.param == "prompt"


def test_what_goes_wrong_on_the_thread_is_told() -> None:
    def fail() -> None:
        raise KeyError("it")

    with pytest.raises(KeyError, match="it"):
        with_stack_for("a" * 5000, fail, param="prompt")


def test_no_memory_for_a_stack_refuses_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(PromptRefused, match="no memory"):
        with_stack_for("a" * 5000, list, param="prompt")


TOKENS = ["<s>", "<mark>", MARK, "a", "b", "ab", "<0x0A>", "<0xC3>", "<0xA9>"]
ALPHABET = Alphabet(TOKENS, special=["<mark>"], control=["<s>"])


@pytest.mark.parametrize("text", ["", "ab ba", "a\nb", "\u00e9", "<s>a<s>", "<mark>"])
def test_what_can_be_written_passes(text: str) -> None:
    ALPHABET.check(text, parse_special=True, param="prompt")


@pytest.mark.parametrize("text", ["abc", "\u00e8", "<s", "\t"])
def test_what_cannot_be_written_is_named(text: str) -> None:
    with pytest.raises(PromptRefused, match="no token for"):
        ALPHABET.check(text, parse_special=True, param="prompt")


def test_a_control_token_is_text_where_it_is_not_asked_for() -> None:
    ALPHABET.check("<mark>", parse_special=False, param="prompt")
    with pytest.raises(PromptRefused, match="no token for '<'"):
        ALPHABET.check("<s>", parse_special=False, param="prompt")


@given(st.text())
def test_with_all_bytes_everything_can_be_written(text: str) -> None:
    every = Alphabet([f"<0x{byte:02X}>" for byte in range(256)], special=[], control=[])
    every.check(text, parse_special=True, param="prompt")

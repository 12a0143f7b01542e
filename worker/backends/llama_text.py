"""Text that libllama's tokenisers would die of.

They are C++ that nobody can catch: what overflows the stack or throws ends the process.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from worker.backends.base import PromptRefused

Result = TypeVar("Result")

#: Pre-tokenisers that the library has no code of its own for run on ``std::regex``, which
#: recurses once for each character that it matches in one go: 320 bytes of stack on x86-64.
_BYTES_PER_CHARACTER = 640
#: Text of so many characters needs no more stack than any thread has.
_SHALLOW = 4096
#: Of a thread that tokenises. Address space, and memory only as far as it is used.
_MAX_STACK_BYTES = 512 * 1024 * 1024
_MIN_STACK_BYTES = 1024 * 1024
#: Characters that may be matched in one go.
MAX_RUN = (_MAX_STACK_BYTES - _MIN_STACK_BYTES) // _BYTES_PER_CHARACTER
#: No pre-tokeniser goes on from one line into what the next one begins with.
_LINE_START = re.compile(r"\n(?=\S)")

#: The size of a stack is set for all threads that are started.
_starting = threading.Lock()

_SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"


def with_stack_for(text: str, work: Callable[[], Result], *, param: str) -> Result:
    """Do ``work``, which tokenises ``text``, where its stack cannot overflow.

    Raises ``PromptRefused`` for what no stack is large enough for.
    """
    if len(text) <= _SHALLOW:
        return work()
    run = len(text) if len(text) <= MAX_RUN else max(map(len, _LINE_START.split(text)))
    if run > MAX_RUN:
        raise PromptRefused(
            f"a line of {run} characters is too long to be tokenised; at most {MAX_RUN} are taken",
            param=param,
        )
    outcome: list[Result | BaseException] = []

    def tell() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=tell, name="tokeniser", daemon=True)
    size = _MIN_STACK_BYTES + run * _BYTES_PER_CHARACTER // 4096 * 4096
    with _starting:
        default = threading.stack_size(size)
        try:
            thread.start()
        except RuntimeError as error:
            raise PromptRefused(
                f"there is no memory to tokenise a text of {len(text)} characters", param=param
            ) from error
        finally:
            threading.stack_size(default)
    thread.join()
    [result] = outcome
    if isinstance(result, BaseException):
        raise result
    return result


class Alphabet:
    """What a SentencePiece vocabulary can write whose tokens do not cover all bytes.

    The library throws at the first character that is no token and has a byte that is none.
    ``tokens`` are the texts of all tokens, ``special`` of those that are found in a text as
    they stand, ``control`` of those that are only where special tokens are asked for.
    """

    def __init__(
        self, tokens: Iterable[str], *, special: Iterable[str], control: Iterable[str]
    ) -> None:
        texts = set(tokens)
        self._characters = {text for text in texts if len(text) == 1}
        self._bytes = {byte for byte in range(256) if f"<0x{byte:02X}>" in texts}
        self._always = _any_of(special)
        self._parsed = _any_of([*special, *control])

    def check(self, text: str, *, parse_special: bool, param: str) -> None:
        """Raise ``PromptRefused`` for a text with a character that cannot be written."""
        pattern = self._parsed if parse_special else self._always
        # A space comes before a text that begins with none.
        rest = " " + (pattern.sub(" ", text) if pattern else text)
        for character in sorted(set(rest.replace(" ", _SPACE_MARK)) - self._characters):
            if not self._bytes.issuperset(character.encode()):
                shown = " " if character == _SPACE_MARK else character
                raise PromptRefused(f"the model has no token for {shown!r}", param=param)


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted({text for text in texts if text}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

"""What prompts begin with in common, and how many of them are remembered."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TypeAlias

import numpy

#: The tokens of a sequence, as a C array: compared by the memory block.
Tokens: TypeAlias = "array[int]"

#: Ended sequences that are kept, however small they are: a look-up compares a prompt with
#: each, in well under a millisecond. What bounds them mostly is their bytes.
MAX_KEPT = 256


def token_array(tokens: Iterable[int]) -> Tokens:
    """Tokens in the form they are compared in."""
    return array("i", tokens)


def common_length(first: Tokens, second: Tokens) -> int:
    """How many tokens two sequences begin with in common."""
    count = min(len(first), len(second))
    if not count or first[0] != second[0]:
        return 0
    differs = numpy.frombuffer(first, numpy.intc, count) != numpy.frombuffer(
        second, numpy.intc, count
    )
    index = int(differs.argmax())
    return index if differs[index] else count

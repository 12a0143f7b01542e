"""Prompt lookup: guesses how an answer goes on from what was there before.

Where a text repeats itself (code that is edited, a document that is quoted), its last
few tokens have been there before, and what followed them then follows again. A guess
costs no model; whether it is right is checked by computing all of it in one step.
Source: A. Saxena, "Prompt Lookup Decoding" (2023).
"""

from __future__ import annotations

from array import array

#: The last tokens of the text that must have been there before: as many as possible.
_LONGEST, _SHORTEST = 4, 2


def guess(tokens: array[int], limit: int) -> array[int]:
    """At most ``limit`` tokens to go on with, none where nothing repeats.

    Takes what followed the last occurrence of the longest repeated end.
    """
    data, width = tokens.tobytes(), tokens.itemsize
    for length in range(min(_LONGEST, len(tokens) - 1), _SHORTEST - 1, -1):
        key = data[-length * width :]
        # Its own occurrence, at the very end, is none.
        end = len(data) - width
        while (at := data.rfind(key, 0, end)) >= 0:
            if at % width == 0:
                after = at // width + length
                return tokens[after : after + limit]
            end = at + len(key) - 1
    return tokens[:0]

"""Which tokens the KV cache holds, and how many cells they take. Plain bookkeeping.

Sequences that begin alike share cells: the cells of a *run* of positions were
computed once, for one sequence, and belong to all that hold them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from worker.backends.prefixes import Tokens

#: Positions ``start`` to ``end`` of a run: (run, start, end).
Span = tuple[int, int, int]


@dataclass(slots=True, eq=False)
class Checkpoint:
    """A copy, in host memory, of the state after ``length`` tokens: of that part of it
    that later tokens change. With the cells of these tokens it is the whole.

    ``used`` tells which of two was used last.
    """

    length: int
    data: memoryview
    used: int


class CachedSequence:
    """One sequence of the KV cache: the first ``length`` of ``tokens`` are in it.

    ``slot`` is its id in the library. Whoever decodes for the sequence appends to
    ``tokens`` and moves ``length`` on; what it adds belongs to a run of its own.
    ``checkpoints`` are where it can be gone on from although it is longer now,
    ``stops`` where others will be taken; the shortest come first. The cells of its first
    ``lined_up`` tokens lie in rows, or belong to others as well.
    """

    __slots__ = (
        "_run",
        "_run_start",
        "_shared",
        "checkpoints",
        "length",
        "lined_up",
        "slot",
        "stops",
        "tokens",
    )

    def __init__(self, slot: int, tokens: Tokens, run: int) -> None:
        self.slot = slot
        self.tokens = tokens
        self.length = 0
        self.lined_up = 0
        self.checkpoints: list[Checkpoint] = []
        self.stops: list[int] = []
        self._shared: list[Span] = []
        self._run = run
        self._run_start = 0

    def spans(self, length: int | None = None) -> list[Span]:
        """The runs its first ``length`` tokens (None: all) lie in."""
        end = self.length if length is None else length
        own = (self._run, self._run_start, self.length)
        return [
            (run, start, min(stop, end)) for run, start, stop in (*self._shared, own) if start < end
        ]

    def checkpoints_within(self, length: int) -> list[Checkpoint]:
        """Those of its first ``length`` tokens, the shortest first."""
        return [each for each in self.checkpoints if each.length <= length]

    def begin_with(self, source: CachedSequence, length: int) -> None:
        """Share the first ``length`` cells of ``source``; what comes next is this one's own."""
        self.checkpoints = source.checkpoints_within(length)
        self._shared = source.spans(length)
        self._run_start = self.length = self.lined_up = length
        source.lined_up = max(source.lined_up, length)


def count_cells(sequences: Iterable[CachedSequence], more: Sequence[Span] = ()) -> int:
    """The cells of all the sequences, and of ``more``, shared ones once."""
    ends: dict[tuple[int, int], int] = {}
    for spans in (*(sequence.spans() for sequence in sequences), more):
        for run, start, end in spans:
            key = (run, start)
            if ends.get(key, 0) < end:
                ends[key] = end
    return sum(end - start for (_, start), end in ends.items())

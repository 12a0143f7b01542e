"""The KV cache: cells for the sequences that run, and what is kept of those that ended.

Where sequences run, a cell that is none of theirs still costs each of their
steps: attention looks at its mask (with SmolLM2-135M a step takes 14 % longer
beside 4,000 such cells). So what is kept of ended sequences moves out of the
cache, to host memory, as soon as anything runs, and back when a prompt begins
alike: that is a copy, hundreds of times faster than computing it again.
"""

from __future__ import annotations

from array import array
from itertools import count
from typing import NamedTuple, Protocol

from worker.backends.llama_cells import CachedSequence, common_length, count_cells

#: What is kept is used up, not copied, if the prompt goes on from its last part.
_LAST_PART = 1 / 8
#: To restore costs less than this share of computing as much.
_RESTORE_COST = 1 / 16


class Memory(Protocol):
    """What the pool asks of the library; sequences go by their slots."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Let ``target``, which is empty, share the first ``length`` cells of ``source``."""

    def trim(self, slot: int, length: int) -> bool:
        """Keep the first ``length`` cells; False if only all can be removed."""

    def first_position(self, slot: int) -> int:
        """The first position that is still there, where a window slides."""

    def size(self, slot: int) -> int:
        """Bytes that a copy of the sequence takes."""

    def save(self, slot: int) -> memoryview:
        """A copy of the sequence in host memory."""

    def restore(self, slot: int, data: memoryview) -> bool:
        """Fill an empty slot from a copy; False, and still empty, if there is no room."""


class Traits(NamedTuple):
    """What the model's kind of memory allows.

    ``window``: tokens that a sliding window sees (0: all). ``divisible``: a sequence
    can be cut anywhere; recurrent state only exists for the whole of it.
    """

    window: int = 0
    divisible: bool = True


class _Prefix:
    """What is kept of an ended sequence: in its cells, or as ``data`` in host memory."""

    __slots__ = ("data", "first", "sequence")

    def __init__(self, sequence: CachedSequence, first: int) -> None:
        self.sequence = sequence
        self.first = first
        self.data: memoryview | None = None


class Match(NamedTuple):
    """How a prompt may begin: with ``length`` tokens of a running or a kept sequence.

    ``promised`` is what it will be once running sequences have computed their prompts.
    """

    running: CachedSequence | None = None
    kept: _Prefix | None = None
    length: int = 0
    promised: int = 0


class KvPool:
    """``cells`` cells for as many sequences at once as there are ``slots``.

    ``keep_bytes`` bounds what is kept of ended sequences in host memory (0: nothing
    is kept, None: as much as all the cells take).
    """

    def __init__(
        self, memory: Memory, cells: int, slots: int, keep_bytes: int | None, traits: Traits
    ) -> None:
        self._memory = memory
        self._cells = cells
        self._slots = slots
        self._free_slots = list(reversed(range(slots)))
        self._keep_bytes = keep_bytes
        self._full_bytes = 0
        self.traits = traits
        self._runs = count()
        self._running: list[CachedSequence] = []
        self._kept: list[_Prefix] = []  # the least recently used first
        self._resident: list[_Prefix] = []  # those of them that are still in their cells

    def find(self, tokens: array[int]) -> Match:
        """The longest beginning of a prompt that is there; never with its last token."""
        limit = len(tokens) - 1
        running, kept, best, promised = None, None, 0, 0
        if self.traits.divisible:
            for sequence in self._running:
                common = min(common_length(tokens, sequence.tokens), limit)
                usable = min(common, sequence.length)
                if usable < common:  # else it is there now, or a window has slid past it
                    promised = max(promised, common)
                first = self._memory.first_position(sequence.slot) if self.traits.window else 0
                if usable > best and self._reaches(first, usable):
                    running, best = sequence, usable
        for prefix in self._kept:
            length = prefix.sequence.length
            usable = min(common_length(tokens, prefix.sequence.tokens), limit)
            if usable < length and not self.traits.divisible:
                continue
            cost = 0.0 if prefix.data is None else length * _RESTORE_COST
            if usable - best > cost and self._reaches(prefix.first, usable):
                running, kept, best = None, prefix, usable
        return Match(running, kept, best, max(best, promised))

    def fits(self, tokens: array[int], match: Match, reserve: int) -> bool:
        """Whether a prompt and ``reserve`` cells have room beside the running sequences."""
        shared = match.length if match.running else 0
        return count_cells(self._running) + len(tokens) - shared + reserve <= self._cells

    def start(self, tokens: array[int], match: Match) -> CachedSequence:
        """Let a sequence run, with as much of its beginning as can be had."""
        length = match.length
        if match.kept is not None:
            self._touch(match.kept)
        if match.kept is not None and match.kept.data is None:
            sequence = self._take_over(match.kept, tokens, length)
            self._store_resident()
        else:
            self._store_resident()
            sequence = CachedSequence(self._free_slots.pop(), tokens, next(self._runs))
            if match.kept is not None:
                self._restore(match.kept, sequence, length)
            elif match.running is not None:
                self._memory.copy(match.running.slot, sequence.slot, length)
                sequence.begin_with(match.running, length)
        self._running.append(sequence)
        return sequence

    def end(self, sequence: CachedSequence) -> None:
        """A sequence no longer runs: what is computed of it is kept for others."""
        self._running.remove(sequence)
        sequence.tokens = sequence.tokens[: sequence.length]
        if self._keep_bytes == 0 or not sequence.length:
            self._release(sequence.slot)
            return
        if self.traits.divisible:
            for other in tuple(self._kept):
                common = common_length(sequence.tokens, other.sequence.tokens)
                if common == other.sequence.length:
                    self._forget(other)
                elif common == sequence.length:
                    self._release(sequence.slot)
                    self._touch(other)
                    return
        window = self.traits.window
        first = self._memory.first_position(sequence.slot) if window else 0
        prefix = _Prefix(sequence, first)
        self._kept.append(prefix)
        self._resident.append(prefix)

    def cut(self, sequence: CachedSequence) -> None:
        """Give up the cells of a running sequence behind its length; it must be divisible."""
        self._memory.trim(sequence.slot, sequence.length)

    def settle(self) -> None:
        """Move what is kept out of the cells if anything runs."""
        if self._resident and self._running:
            self._store_resident()

    def _take_over(self, prefix: _Prefix, tokens: array[int], length: int) -> CachedSequence:
        """Go on in the cells of a kept sequence."""
        kept = prefix.sequence
        self._resident.remove(prefix)
        if _is_used_up(prefix, length):
            self._kept.remove(prefix)
        else:
            self._store(prefix)
        sequence = CachedSequence(kept.slot, tokens, next(self._runs))
        if self._trim(kept, length):
            sequence.begin_with(kept, length)
        return sequence

    def _restore(self, prefix: _Prefix, sequence: CachedSequence, length: int) -> None:
        """Bring a kept sequence back for a new one, if there is room for the whole of it."""
        kept = prefix.sequence
        has_room = count_cells(self._running) + kept.length <= self._cells
        if prefix.data is None or not has_room:
            return
        if not self._memory.restore(sequence.slot, prefix.data):
            return
        kept.slot = sequence.slot
        if self._trim(kept, length):
            sequence.length = length
        if _is_used_up(prefix, length) and prefix in self._kept:
            self._kept.remove(prefix)

    def _trim(self, kept: CachedSequence, length: int) -> bool:
        """Cut to ``length`` tokens; False if that left none at all."""
        if length == kept.length or self._memory.trim(kept.slot, length):
            return True
        self._memory.trim(kept.slot, 0)
        return False

    def _store_resident(self) -> None:
        for prefix in self._resident:
            self._store(prefix)
            self._release(prefix.sequence.slot)
        self._resident.clear()

    def _store(self, prefix: _Prefix) -> None:
        """Copy what is kept to host memory, or give it up if it is over the bound."""
        sequence = prefix.sequence
        size = self._memory.size(sequence.slot)
        bound = self._bound(size, sequence.length)
        if size > bound:
            self._kept.remove(prefix)
            return
        while sum(len(other.data or b"") for other in self._kept) + size > bound:
            self._kept.remove(next(other for other in self._kept if other.data is not None))
        prefix.data = self._memory.save(sequence.slot)
        if self.traits.window:
            # The library leaves out of a copy what the window has slid past.
            prefix.first = max(prefix.first, sequence.length - self.traits.window)

    def _bound(self, size: int, length: int) -> int:
        """Bytes that all copies may take; by default what a full cache is known to take."""
        if self._keep_bytes is not None:
            return self._keep_bytes
        if self.traits.divisible:
            return size * self._cells // length
        # A state is as large after one token, but there are no more of them than slots.
        fitting = min(self._slots, self._cells // length)
        self._full_bytes = max(self._full_bytes, size * fitting)
        return self._full_bytes

    def _reaches(self, first: int, length: int) -> bool:
        """Whether all is there that the token after ``length`` others looks at."""
        # The cells that a window has slid past may have been given to others.
        return first <= max(0, length - self.traits.window) if self.traits.window else True

    def _forget(self, prefix: _Prefix) -> None:
        self._kept.remove(prefix)
        if prefix in self._resident:
            self._resident.remove(prefix)
            self._release(prefix.sequence.slot)

    def _touch(self, prefix: _Prefix) -> None:
        self._kept.remove(prefix)
        self._kept.append(prefix)

    def _release(self, slot: int) -> None:
        self._memory.trim(slot, 0)
        self._free_slots.append(slot)


def _is_used_up(prefix: _Prefix, length: int) -> bool:
    return prefix.sequence.length * (1 - _LAST_PART) <= length

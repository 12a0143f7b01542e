"""What is kept in host memory, within a bound of bytes: sequences that have ended, and
checkpoints of those that run or have ended."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple, Protocol

from worker.backends.llama_cells import CachedSequence, Checkpoint

#: A checkpoint, or a stop to take one at, must save so many tokens.
WORTH_A_CHECKPOINT = 32
#: Checkpoints of one sequence.
MAX_CHECKPOINTS = 8


class Memory(Protocol):
    """What is asked of the library; sequences go by their slots.

    ``partial`` is that part of a sequence's state which later tokens change.
    """

    def copy(self, source: int, target: int, length: int) -> None:
        """Let ``target``, which is empty, share the first ``length`` cells of ``source``."""

    def trim(self, slot: int, length: int) -> bool:
        """Keep the first ``length`` cells; False if only all can be removed."""

    def first_position(self, slot: int) -> int:
        """The first position that is still there, where a window slides."""

    def size(self, slot: int, *, partial: bool = False) -> int:
        """Bytes that a copy of the sequence takes."""

    def save(self, slot: int, *, partial: bool = False) -> memoryview:
        """A copy of the sequence in host memory."""

    def restore(self, slot: int, data: memoryview, *, partial: bool = False) -> bool:
        """Fill a slot from a copy; False if there is no room: what is in the slot is void.

        An empty slot, or for a partial copy one that holds as many tokens or more.
        """


class Traits(NamedTuple):
    """What the model's kind of memory allows.

    ``window``: tokens that a sliding window sees (0: all). ``divisible``: a sequence
    can be cut anywhere; recurrent state only exists for the whole of it.
    ``takes_cells``: each token takes a cell; a state alone is as large after any number.
    """

    window: int = 0
    divisible: bool = True
    takes_cells: bool = True

    @property
    def has_state(self) -> bool:
        """Whether later tokens change what is there of earlier ones."""
        return self.window > 0 or not self.divisible


class Prefix:
    """What is kept of an ended sequence: in its cells, or as ``data`` in host memory.

    ``first`` is the first position that a window has not slid past.
    """

    __slots__ = ("data", "first", "sequence")

    def __init__(self, sequence: CachedSequence, first: int) -> None:
        self.sequence = sequence
        self.first = first
        self.data: memoryview | None = None


class Keep:
    """All that is kept, at most ``max_bytes`` of it in host memory.

    ``prefixes`` come with the least recently used first, those in their cells too;
    ``running`` are the sequences that run. Without ``max_bytes`` it is as much as a
    full cache of ``cells`` cells takes; a recurrent state counts ``MAX_CHECKPOINTS`` times
    more for each slot.
    """

    def __init__(
        self, memory: Memory, cells: int, slots: int, max_bytes: int | None, traits: Traits
    ) -> None:
        self._memory = memory
        self._cells = cells
        self._slots = slots
        self._max_bytes = max_bytes
        self._full_bytes = 0
        self._traits = traits
        self._uses = count()
        self.prefixes: list[Prefix] = []
        self.running: list[CachedSequence] = []
        #: Whether sequences get checkpoints at all.
        self.takes_checkpoints = traits.has_state and max_bytes != 0

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        checkpoints = {id(each): len(each.data) for each in self._checkpoints()}
        kept = (len(prefix.data) for prefix in self.prefixes if prefix.data is not None)
        return sum(kept) + sum(checkpoints.values())

    def touch(self, prefix: Prefix, checkpoint: Checkpoint | None = None) -> None:
        """They were used just now."""
        self.prefixes.remove(prefix)
        self.prefixes.append(prefix)
        if checkpoint is not None:
            checkpoint.used = next(self._uses)

    def store(self, prefix: Prefix) -> None:
        """Copy a prefix from its cells to host memory, or give it up if it has no room."""
        sequence = prefix.sequence
        if not self._make_room(self._memory.size(sequence.slot), sequence):
            self.prefixes.remove(prefix)
            return
        prefix.data = self._memory.save(sequence.slot)
        if self._traits.window:
            # The library leaves out of a copy what the window has slid past.
            prefix.first = max(prefix.first, sequence.length - self._traits.window)

    def add_stop(self, sequence: CachedSequence, length: int) -> None:
        """Let a checkpoint be taken after so many tokens if it is worth one."""
        if not self.takes_checkpoints or length <= sequence.length:
            return
        earlier = [each.length for each in sequence.checkpoints]
        before = max((each for each in (*sequence.stops, *earlier) if each <= length), default=0)
        if length - before >= WORTH_A_CHECKPOINT:
            sequence.stops = sorted([*sequence.stops, length])

    def take_checkpoint(self, sequence: CachedSequence) -> None:
        """Take one of a running sequence as it is now, if there is room for it."""
        sequence.stops = [stop for stop in sequence.stops if stop > sequence.length]
        before = max((each.length for each in sequence.checkpoints), default=0)
        if not self.takes_checkpoints or sequence.length - before < WORTH_A_CHECKPOINT:
            return
        if not self._make_room(self._memory.size(sequence.slot, partial=True), sequence):
            return
        data = self._memory.save(sequence.slot, partial=True)
        made = [*sequence.checkpoints, Checkpoint(sequence.length, data, next(self._uses))]
        sequence.checkpoints = _latest(made)

    def hand_over(self, source: CachedSequence, target: CachedSequence) -> None:
        """``target``, which begins with all of ``source``, gets its checkpoints."""
        known = {each.length for each in target.checkpoints}
        more = [each for each in source.checkpoints if each.length not in known]
        target.checkpoints = _latest([*target.checkpoints, *more])

    def _make_room(self, size: int, sequence: CachedSequence) -> bool:
        """Give up what was used least recently for ``size`` bytes more; False if in vain."""
        bound = self._bound(sequence)
        if size > bound:
            return False
        while self.nbytes + size > bound:
            oldest = next((each for each in self.prefixes if each.data is not None), None)
            if oldest is not None:
                self.prefixes.remove(oldest)
                continue
            # What is left are checkpoints of sequences that are in their cells.
            unused = min(self._checkpoints(), key=lambda each: each.used)
            for each in self._sequences():
                each.checkpoints = [point for point in each.checkpoints if point is not unused]
        return True

    def _bound(self, sequence: CachedSequence) -> int:
        """Bytes that may be kept; by default what a full cache is known to take."""
        if self._max_bytes is not None:
            return self._max_bytes
        traits, length = self._traits, sequence.length
        size = self._memory.size(sequence.slot)
        state = self._memory.size(sequence.slot, partial=True) if traits.has_state else 0
        full = (size - state) * self._cells // length if traits.takes_cells else 0
        if not traits.divisible:
            full += state * self._slots * (1 + MAX_CHECKPOINTS)
        elif traits.window:
            full += state * self._cells // min(length, traits.window)
        self._full_bytes = max(self._full_bytes, full)
        return self._full_bytes

    def _sequences(self) -> Iterator[CachedSequence]:
        yield from self.running
        yield from (prefix.sequence for prefix in self.prefixes)

    def _checkpoints(self) -> Iterator[Checkpoint]:
        for sequence in self._sequences():
            yield from sequence.checkpoints


def _latest(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Those used last, as many as a sequence may have, the shortest first."""
    used = sorted(checkpoints, key=lambda each: each.used)[-MAX_CHECKPOINTS:]
    return sorted(used, key=lambda each: each.length)

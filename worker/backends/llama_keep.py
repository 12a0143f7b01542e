"""What is kept in host memory, within a bound of bytes: sequences that have ended, and
checkpoints of those that run or have ended."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple, Protocol

from worker.backends.llama_cells import CachedSequence, Checkpoint

#: A checkpoint, or a stop to take one at, must save so many tokens.
WORTH_A_CHECKPOINT = 32
#: What is copied to host memory in a step that streams wait for: more would be a pause.
PART_BYTES = 16 * 1024 * 1024
#: Checkpoints of one sequence.
MAX_CHECKPOINTS = 8


class Memory(Protocol):
    """What is asked of the library; sequences go by their slots.

    ``partial`` is that part of a sequence's state which later tokens change.
    """

    def copy(self, source: int, target: int, length: int, start: int = 0) -> None:
        """Let ``target``, which has none of them, share cells ``start`` to ``length``."""

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


class Part(NamedTuple):
    """A copy in host memory of tokens ``start`` to ``end`` of a sequence."""

    start: int
    end: int
    data: memoryview


class Prefix:
    """What is kept of an ended sequence: its first ``resident`` tokens in their cells, the
    others as ``parts`` in host memory, in order.

    ``first`` is the first position that a window has not slid past.
    """

    __slots__ = ("first", "parts", "resident", "sequence")

    def __init__(self, sequence: CachedSequence, first: int) -> None:
        self.sequence = sequence
        self.first = first
        self.resident = sequence.length
        self.parts: list[Part] = []


class Keep:
    """All that is kept, at most ``max_bytes`` of it in host memory.

    ``prefixes`` come with the least recently used first, those in their cells too;
    ``running`` are the sequences that run. Without ``max_bytes`` it is as much as a
    full cache of ``cells`` cells takes; a recurrent state counts ``MAX_CHECKPOINTS`` times
    more for each of ``sequences``. ``spare`` is a slot for what is copied in parts; where
    states are kept, everything is copied whole.
    """

    def __init__(
        self,
        memory: Memory,
        cells: int,
        sequences: int,
        spare: int,
        max_bytes: int | None,
        traits: Traits,
    ) -> None:
        self._memory = memory
        self._cells = cells
        self._max_sequences = sequences
        self._spare = spare
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
        kept = (len(part.data) for prefix in self.prefixes for part in prefix.parts)
        return sum(kept) + sum(checkpoints.values())

    def touch(self, prefix: Prefix, checkpoint: Checkpoint | None = None) -> None:
        """They were used just now."""
        self.prefixes.remove(prefix)
        self.prefixes.append(prefix)
        if checkpoint is not None:
            checkpoint.used = next(self._uses)

    def add(self, sequence: CachedSequence) -> None:
        """A sequence runs, with checkpoints of one that may have been given up for it."""
        self.running.append(sequence)
        if sequence.checkpoints:
            self._make_room(0, self._bound(sequence.slot, sequence.length))

    def store(self, prefix: Prefix) -> None:
        """Copy a prefix to host memory, or give it up if it has no room; the cells stay."""
        self._store(prefix, 0)

    def store_part(self, prefix: Prefix) -> bool:
        """Move the end of a prefix to host memory; True once there is nothing left to move."""
        slot, count = prefix.sequence.slot, prefix.resident
        if not self._traits.has_state:
            count = max(1, PART_BYTES * count // self._memory.size(slot))
        self._store(prefix, max(0, prefix.resident - count))
        return not prefix.resident

    def bring_back(self, prefix: Prefix, slot: int, start: int, length: int) -> bool:
        """Fill a slot that has ``start`` tokens of a prefix up to ``length`` or beyond."""
        memory = self._memory
        for begin, end, data in prefix.parts:
            if begin == 0 == start:
                restored = memory.restore(slot, data)
            elif start <= begin < length:
                restored = memory.restore(self._spare, data)
                if restored:
                    memory.copy(self._spare, slot, end, begin)
                memory.trim(self._spare, 0)
            else:
                continue
            if not restored:
                return False
        return True

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
        size = self._memory.size(sequence.slot, partial=True)
        if not self._make_room(size, self._bound(sequence.slot, sequence.length)):
            return
        data = self._memory.save(sequence.slot, partial=True)
        made = [*sequence.checkpoints, Checkpoint(sequence.length, data, next(self._uses))]
        sequence.checkpoints = _latest(made)

    def hand_over(self, source: CachedSequence, target: CachedSequence) -> None:
        """``target``, which begins with all of ``source``, gets its checkpoints."""
        known = {each.length for each in target.checkpoints}
        more = [each for each in source.checkpoints if each.length not in known]
        target.checkpoints = _latest([*target.checkpoints, *more])

    def _store(self, prefix: Prefix, start: int) -> None:
        """Copy what is behind ``start`` of what is in the cells, which then has left them."""
        memory, slot, end = self._memory, prefix.sequence.slot, prefix.resident
        size = memory.size(slot)
        bound = self._bound(slot, end)
        prefix.resident = start
        stored = sum(len(part.data) for part in prefix.parts)
        if size + stored > bound or not self._make_room(size * (end - start) // end, bound):
            self.prefixes.remove(prefix)
            prefix.resident = 0
        elif start:
            memory.copy(slot, self._spare, end, start)
            prefix.parts.insert(0, Part(start, end, memory.save(self._spare)))
            memory.trim(self._spare, 0)
            memory.trim(slot, start)
        else:
            prefix.parts.insert(0, Part(0, end, memory.save(slot)))
            if self._traits.window:
                # The library leaves out of a copy what the window has slid past.
                prefix.first = max(prefix.first, end - self._traits.window)

    def _make_room(self, size: int, bound: int) -> bool:
        """Give up what was used least recently for ``size`` bytes more; False if in vain."""
        if size > bound:
            return False
        while self.nbytes + size > bound:
            oldest = next(
                (each for each in self.prefixes if each.parts and not each.resident), None
            )
            unused = min(self._checkpoints(), key=lambda each: each.used, default=None)
            if oldest is not None:
                self.prefixes.remove(oldest)
            elif unused is not None:  # of a sequence that is in its cells
                for each in self._sequences():
                    each.checkpoints = [point for point in each.checkpoints if point is not unused]
            else:
                return False
        return True

    def _bound(self, slot: int, length: int) -> int:
        """Bytes that may be kept; by default what a full cache is known to take.

        ``length`` is how many tokens are in the slot.
        """
        if self._max_bytes is not None:
            return self._max_bytes
        traits = self._traits
        size = self._memory.size(slot)
        state = self._memory.size(slot, partial=True) if traits.has_state else 0
        full = (size - state) * self._cells // length if traits.takes_cells else 0
        if not traits.divisible:
            full += state * self._max_sequences * (1 + MAX_CHECKPOINTS)
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

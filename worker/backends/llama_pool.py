"""The KV cache: cells for the sequences that run, and what is kept of those that ended.

Where sequences run, a cell that is none of theirs still costs each of their
steps: attention looks at its mask (with SmolLM2-135M a step takes 14 % longer
beside 4,000 such cells). So what is kept of ended sequences moves out of the
cache, to host memory, as soon as anything runs, and back when a prompt begins
alike: that is a copy, hundreds of times faster than computing it again.

Where a sequence cannot be cut back to any length, because its state is recurrent or a
window has slid on, it gets checkpoints: at the end of its prompt, for the next turn of
a conversation and for the same prompt again, where it parts from other prompts, as a
third may begin as both do, and where it went on from what was kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import NamedTuple

from worker.backends.llama_cells import CachedSequence, Checkpoint, count_cells
from worker.backends.llama_keep import PART_BYTES, Keep, Memory, Prefix, Traits
from worker.backends.prefixes import MAX_KEPT, Tokens, common_length

#: What is kept is used up, not copied, if the prompt goes on from its last part.
_LAST_PART = 1 / 8
#: To restore costs less than this share of computing as much.
_RESTORE_COST = 1 / 16
#: So many tokens of a sequence are worth laying in a row.
_ROW = 64


class CellsLost(Exception):
    """A sequence could not be copied back to the KV cache."""


class Match(NamedTuple):
    """How a prompt may begin: with ``length`` tokens of a running or a kept sequence.

    That takes its ``checkpoint`` if there is one. ``promised`` is what the length will be
    once running sequences have computed their prompts.
    """

    running: CachedSequence | None = None
    kept: Prefix | None = None
    length: int = 0
    promised: int = 0
    checkpoint: Checkpoint | None = None


class KvPool:
    """``cells`` cells for as many sequences at once as there are ``slots``.

    Of them ``sequences`` run at most; others are left to what has just ended, until it is
    copied to host memory, and the last one to copying. ``keep_bytes`` bounds what is kept
    of ended sequences in host memory (0: nothing is kept, None: as much as all the cells
    take).
    """

    def __init__(
        self,
        memory: Memory,
        cells: int,
        sequences: int,
        slots: int,
        keep_bytes: int | None,
        traits: Traits,
    ) -> None:
        self.traits = traits
        self._memory = memory
        self._cells = cells
        self._spare = spare = slots - 1
        self._cell_bytes = 0.0  # of a token; 0: not known yet
        # A state takes memory in each slot, so that there are none beside those that run.
        in_use = sequences if traits.has_state else spare
        self._free_slots = list(reversed(range(in_use)))
        self._keeps = keep_bytes != 0
        self._keep = Keep(memory, cells, sequences, spare, keep_bytes, traits)
        self._running = self._keep.running
        self._resident: list[Prefix] = []  # what is kept and still in its cells
        self._runs = count()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept in host memory."""
        return self._keep.nbytes

    def find(self, tokens: Tokens) -> Match:
        """The longest beginning of a prompt that is there; never with its last token."""
        limit = len(tokens) - 1
        best, promised = Match(), 0
        for sequence in self._running:
            common = min(common_length(tokens, sequence.tokens), limit)
            if not common:
                continue
            if self.traits.divisible:
                soon = common if sequence.length < common else 0
            else:
                soon = max((stop for stop in sequence.stops if stop <= common), default=0)
            promised = max(promised, soon)
            first = self._memory.first_position(sequence.slot) if self.traits.window else 0
            usable, checkpoint = self._usable(sequence, min(common, sequence.length), first)
            if usable > best.length:
                best = Match(running=sequence, length=usable, checkpoint=checkpoint)
        for prefix in self._keep.prefixes:
            kept = prefix.sequence
            common = min(common_length(tokens, kept.tokens), limit)
            usable, checkpoint = self._usable(kept, common, prefix.first)
            if common == kept.length and not self.traits.divisible:
                usable, checkpoint = common, None
            if usable - best.length > self._restore_cost(prefix):
                best = Match(kept=prefix, length=usable, checkpoint=checkpoint)
        return best._replace(promised=max(best.length, promised))

    def fits(self, tokens: Tokens, match: Match, reserve: int) -> bool:
        """Whether a prompt and ``reserve`` cells have room beside the running sequences."""
        shared = match.length if match.running else 0
        return self._has_room(len(tokens) - shared + reserve)

    def start(self, tokens: Tokens, match: Match, forks: Iterable[int] = ()) -> CachedSequence:
        """Let a sequence run, with as much of its beginning as can be had.

        ``forks`` is how much of it others have that will run.
        """
        known = self._longest_alike(tokens) if self._keep.takes_checkpoints else 0
        if match.kept is not None:
            self._keep.touch(match.kept, match.checkpoint)
        if not self._running:
            # Who runs alone finds the same cells free each time: so the same request has the
            # same sums, and the same answer, as often as it is made.
            self._clear_out(self._cells, but=match.kept)
        if match.kept is not None and match.kept.resident:
            sequence = self._go_on(match.kept, tokens, match)
            self._clear_out(len(tokens) - match.length)
        else:
            self._clear_out(len(tokens))
            sequence = CachedSequence(self._free_slots.pop(), tokens, next(self._runs))
            if match.kept is not None:
                self._restore(match.kept, sequence, match)
            elif match.running is not None:
                self._share(match.running, sequence, match)
        self._keep.add(sequence)
        self._keep.take_checkpoint(sequence)
        for length in sorted({*forks, known, len(tokens) - 1}):
            self._keep.add_stop(sequence, length)
        return sequence

    def computed(self, sequence: CachedSequence, length: int) -> None:
        """So many tokens of a running sequence are in the cache now."""
        sequence.length = sequence.lined_up = length
        if sequence.stops and sequence.stops[0] <= length:
            self._keep.take_checkpoint(sequence)

    def fork(self, sequence: CachedSequence, length: int) -> None:
        """Another prompt, which has just come, begins with so much of a running one."""
        self._keep.add_stop(sequence, length)

    def end(self, sequence: CachedSequence, *, keep: bool = True) -> None:
        """A sequence no longer runs: what is computed of it is kept for others, or not."""
        self._running.remove(sequence)
        sequence.tokens = sequence.tokens[: sequence.length]
        sequence.stops = []
        if not (keep and self._keeps and sequence.length):
            self._release(sequence.slot)
            return
        for other in tuple(self._keep.prefixes):
            kept = other.sequence
            common = common_length(sequence.tokens, kept.tokens)
            if common == kept.length and self._stands_for(sequence, common):
                self._keep.hand_over(kept, sequence)
                self._forget(other)
            elif common == sequence.length and self._stands_for(kept, common):
                self._keep.hand_over(sequence, kept)
                self._release(sequence.slot)
                self._keep.touch(other)
                return
        first = self._memory.first_position(sequence.slot) if self.traits.window else 0
        prefix = Prefix(sequence, first)
        self._keep.prefixes.append(prefix)
        self._resident.append(prefix)
        if len(self._keep.prefixes) > MAX_KEPT:
            self._forget(self._keep.prefixes[0])

    def line_up(self) -> None:
        """Lay cells that sequences have got by turns side by side, once they are worth it.

        Sequences that decode together get a cell each in every step. On a CPU attention
        goes through what lies in rows faster: 8 sequences of 256 tokens take 57 ms a step
        instead of 77.
        """
        apart = [each for each in self._running if each.length > each.lined_up]
        tokens = sum(each.length - each.lined_up for each in apart)
        longest = max((each.length - each.lined_up for each in apart), default=0)
        if longest < _ROW and tokens * self._cell_bytes < PART_BYTES:
            return
        if len(apart) > 1:
            self._line_up(apart, tokens)
        for each in apart:
            each.lined_up = each.length

    def _line_up(self, sequences: list[CachedSequence], tokens: int) -> None:
        memory, spare = self._memory, self._spare
        rows = []
        for each in sequences:
            memory.copy(each.slot, spare, each.length, each.lined_up)
            rows.append(memory.save(spare))
            memory.trim(spare, 0)
            memory.trim(each.slot, each.lined_up)
        # All of their cells are free now, and the first of them are taken first.
        for each, row in zip(sequences, rows, strict=True):
            if not memory.restore(spare, row):
                raise CellsLost("cells that were free a moment ago could not be filled")
            memory.copy(spare, each.slot, each.length, each.lined_up)
            memory.trim(spare, 0)
        self._cell_bytes = sum(map(len, rows)) / tokens

    def cut(self, sequence: CachedSequence) -> None:
        """Give up the cells of a running sequence behind its length; it must be divisible."""
        self._memory.trim(sequence.slot, sequence.length)

    def settle(self) -> None:
        """Move a part of what is kept out of the cells if anything runs."""
        if self._resident and self._running and self._keep.store_part(self._resident[0]):
            self._release(self._resident.pop(0).sequence.slot)

    def clear_out(self) -> bool:
        """Move all that is kept out of the cells; False if there is nothing."""
        return self._clear_out(self._cells)

    def _clear_out(self, cells: int, but: Prefix | None = None) -> bool:
        """Move out of the cells what is kept, the oldest first, until so many are free."""
        moved = False
        for prefix in tuple(self._resident):
            if self._free_slots and self._leaves(cells):
                break
            if prefix is but:
                continue
            self._resident.remove(prefix)
            self._keep.store(prefix)
            self._release(prefix.sequence.slot)
            moved = True
        return moved

    def _leaves(self, cells: int) -> bool:
        """Whether so many cells are free beside what runs and what is kept in the cells."""
        if not self.traits.takes_cells:
            return True
        kept = sum(prefix.resident for prefix in self._resident)
        return count_cells(self._running) + kept + cells <= self._cells

    def _go_on(self, prefix: Prefix, tokens: Tokens, match: Match) -> CachedSequence:
        """Begin with a kept sequence that is in its cells, or what of it still is."""
        kept, resident = prefix.sequence, min(prefix.resident, match.length)
        if _is_used_up(prefix, match.length):
            self._resident.remove(prefix)
            self._keep.prefixes.remove(prefix)
            sequence = CachedSequence(kept.slot, tokens, next(self._runs))
        elif self.traits.has_state or not self._running:
            self._resident.remove(prefix)
            self._keep.store(prefix)
            sequence = CachedSequence(kept.slot, tokens, next(self._runs))
        else:
            if not self._free_slots:
                self._clear_out(0, but=prefix)
            sequence = CachedSequence(self._free_slots.pop(), tokens, next(self._runs))
            self._memory.copy(kept.slot, sequence.slot, resident)
        if self._keep.bring_back(prefix, sequence.slot, resident, match.length):
            if self._go_back(sequence, kept.length, match):
                sequence.begin_with(kept, resident)
                sequence.length = sequence.lined_up = match.length
        else:
            self._memory.trim(sequence.slot, 0)
        return sequence

    def _restore(self, prefix: Prefix, sequence: CachedSequence, match: Match) -> None:
        """Bring a kept sequence back for a new one, if there is room for it."""
        kept = prefix.sequence
        if not prefix.parts or not self._has_room(kept.length):
            return
        # Where nothing takes cells, a checkpoint is the whole.
        whole = match.checkpoint is None or self.traits.takes_cells
        if whole and not self._keep.bring_back(prefix, sequence.slot, 0, match.length):
            self._memory.trim(sequence.slot, 0)
            return
        if self._go_back(sequence, kept.length, match):
            sequence.length = sequence.lined_up = match.length
            sequence.checkpoints = kept.checkpoints_within(match.length)
        if _is_used_up(prefix, match.length) and prefix in self._keep.prefixes:
            self._keep.prefixes.remove(prefix)

    def _share(self, source: CachedSequence, sequence: CachedSequence, match: Match) -> None:
        """Begin with the cells of a running sequence."""
        self._memory.copy(source.slot, sequence.slot, match.length)
        if match.checkpoint is None or self._go_back(sequence, match.length, match):
            sequence.begin_with(source, match.length)

    def _go_back(self, sequence: CachedSequence, length: int, match: Match) -> bool:
        """Cut what is in a slot, ``length`` tokens, to the match; False: nothing is left."""
        memory, slot, checkpoint = self._memory, sequence.slot, match.checkpoint
        restored = checkpoint is None or memory.restore(slot, checkpoint.data, partial=True)
        if restored and (match.length == length or memory.trim(slot, match.length)):
            return True
        memory.trim(slot, 0)
        return False

    def _usable(
        self, sequence: CachedSequence, length: int, first: int
    ) -> tuple[int, Checkpoint | None]:
        """How much of its first ``length`` tokens can be gone on from, and with what."""
        if self.traits.divisible and self._reaches(first, length):
            return length, None
        within = sequence.checkpoints_within(length)
        return (within[-1].length, within[-1]) if within else (0, None)

    def _stands_for(self, sequence: CachedSequence, length: int) -> bool:
        """Whether it can be cut back to so many tokens, also when it is in host memory."""
        if length == sequence.length or not self.traits.has_state:
            return True
        return any(each.length == length for each in sequence.checkpoints)

    def _longest_alike(self, tokens: Tokens) -> int:
        others = (*self._running, *(prefix.sequence for prefix in self._keep.prefixes))
        return max((common_length(tokens, other.tokens) for other in others), default=0)

    def _has_room(self, cells: int) -> bool:
        return not self.traits.takes_cells or count_cells(self._running) + cells <= self._cells

    def _restore_cost(self, prefix: Prefix) -> float:
        """In tokens that could be computed instead."""
        if not self.traits.takes_cells:
            return 0.0
        return (prefix.sequence.length - prefix.resident) * _RESTORE_COST

    def _reaches(self, first: int, length: int) -> bool:
        """Whether all is there that the token after ``length`` others looks at."""
        # The cells that a window has slid past may have been given to others.
        return first <= max(0, length - self.traits.window) if self.traits.window else True

    def _forget(self, prefix: Prefix) -> None:
        self._keep.prefixes.remove(prefix)
        if prefix in self._resident:
            self._resident.remove(prefix)
            self._release(prefix.sequence.slot)

    def _release(self, slot: int) -> None:
        self._memory.trim(slot, 0)
        self._free_slots.append(slot)


def _is_used_up(prefix: Prefix, length: int) -> bool:
    return prefix.sequence.length * (1 - _LAST_PART) <= length

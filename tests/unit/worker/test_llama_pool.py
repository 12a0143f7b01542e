"""The KV cache's bookkeeping, on a memory that only remembers."""

import pytest

pytest.importorskip("numpy")
from worker.backends.llama_cells import CachedSequence, common_length, count_cells, token_array
from worker.backends.llama_pool import KvPool, Match, Traits

CELL_BYTES = 10


class FakeMemory:
    """Positions per slot; ``lost`` of them have been overwritten at the beginning.

    A copy takes ``state_bytes`` whatever the length, if that is not 0.
    """

    def __init__(self, *, divisible: bool = True) -> None:
        self.lengths: dict[int, int] = {}
        self.copies: list[tuple[int, int, int]] = []
        self.saved = 0
        self.restored = 0
        self.lost = 0
        self.state_bytes = 0
        self.refuses = False
        self._divisible = divisible

    def copy(self, source: int, target: int, length: int) -> None:
        assert not self.lengths.get(target)
        assert length <= self.lengths[source]
        self.lengths[target] = length
        self.copies.append((source, target, length))

    def trim(self, slot: int, length: int) -> bool:
        if length and not self._divisible:
            return False
        self.lengths[slot] = min(length, self.lengths.get(slot, 0))
        return True

    def first_position(self, slot: int) -> int:
        return self.lost

    def size(self, slot: int) -> int:
        return self.state_bytes or self.lengths[slot] * CELL_BYTES

    def save(self, slot: int) -> memoryview:
        self.saved += 1
        return memoryview(bytes(self.size(slot)))

    def restore(self, slot: int, data: memoryview) -> bool:
        assert not self.lengths.get(slot)
        if self.refuses:
            return False
        self.restored += 1
        self.lengths[slot] = len(data) // CELL_BYTES
        return True


class Rig:
    """A pool of 1,000 cells and 3 slots."""

    def __init__(self, *, keep_bytes: int | None = None, traits: Traits | None = None) -> None:
        traits = traits or Traits()
        self.memory = FakeMemory(divisible=traits.divisible)
        self.pool = KvPool(self.memory, 1000, 3, keep_bytes, traits)

    def start(self, tokens: str) -> tuple[CachedSequence, int]:
        """Start a sequence and compute its prompt; also how much of it was there."""
        prompt = token_array(map(ord, tokens))
        self.pool.settle()
        sequence = self.pool.start(prompt, self.pool.find(prompt))
        found = sequence.length
        assert self.memory.lengths.get(sequence.slot, 0) == found
        sequence.length = self.memory.lengths[sequence.slot] = len(prompt)
        return sequence, found

    def once(self, tokens: str) -> int:
        sequence, found = self.start(tokens)
        self.pool.end(sequence)
        return found


def test_common_length() -> None:
    def common(first: str, second: str) -> int:
        return common_length(token_array(map(ord, first)), token_array(map(ord, second)))

    assert common("", "abc") == 0
    assert common("xbc", "abc") == 0
    assert common("abc", "abc") == 3
    assert common("abcd", "abc") == 3
    assert common("abxd", "abcd") == 2


def test_cells_that_are_shared_count_once() -> None:
    first = CachedSequence(0, token_array([]), 0)
    first.length = 100
    branch = CachedSequence(1, token_array([]), 1)
    branch.begin_with(first, 60)
    branch.length = 80
    twig = CachedSequence(2, token_array([]), 2)
    twig.begin_with(branch, 70)
    twig.length = 75
    assert count_cells([first]) == 100
    assert count_cells([branch]) == 80
    assert count_cells([first, branch]) == 120
    assert count_cells([first, branch, twig]) == 125
    assert count_cells([twig]) == 75
    assert count_cells([first, twig]) == 115


def test_what_a_sequence_alone_left_is_taken_over_in_place() -> None:
    rig = Rig()
    assert rig.once("a" * 100) == 0
    assert rig.once("a" * 100 + "b") == 100
    assert (rig.memory.saved, rig.memory.restored, rig.memory.copies) == (0, 0, [])


def test_what_is_kept_leaves_the_cells_when_something_else_runs() -> None:
    rig = Rig()
    rig.once("a" * 100)
    other, _ = rig.start("b" * 100)
    assert sum(rig.memory.lengths.values()) == 100
    rig.pool.end(other)
    assert rig.once("a" * 100 + "b") == 100
    assert (rig.memory.saved, rig.memory.restored) == (2, 1)
    assert rig.once("b" * 100 + "b") == 100


def test_the_longest_beginning_wins() -> None:
    rig = Rig()
    for tokens in ("a" * 50 + "x" * 50, "a" * 80 + "y" * 50, "a" * 20 + "z" * 50):
        rig.once(tokens)
    assert rig.once("a" * 80 + "w") == 80


def test_a_running_sequence_shares_its_cells() -> None:
    rig = Rig()
    rig.start("a" * 100)
    assert rig.start("a" * 40 + "b" * 10)[1] == 40
    assert [length for _, _, length in rig.memory.copies] == [40]


def test_what_is_being_computed_is_promised() -> None:
    rig = Rig()
    sequence, _ = rig.start("a" * 100)
    sequence.length = 30
    match = rig.pool.find(token_array(map(ord, "a" * 50 + "b")))
    assert (match.length, match.promised) == (30, 50)


def test_a_branch_leaves_what_it_branched_from() -> None:
    rig = Rig()
    rig.once("a" * 100)
    assert rig.once("a" * 30 + "b" * 50) == 30
    assert rig.once("a" * 100 + "c") == 100


def test_what_goes_on_replaces_what_it_went_on_from() -> None:
    rig = Rig()
    for length in range(10, 60, 10):
        rig.once("a" * length)
    rig.start("b")
    assert rig.memory.saved == 1


def test_a_long_one_is_not_restored_for_a_few_tokens() -> None:
    rig = Rig()
    rig.once("a" * 10 + "b" * 890)
    rig.once("z")
    assert rig.once("a" * 10 + "c") == 0
    assert rig.once("a" * 10 + "b" * 80) == 89


def test_the_least_recently_used_is_given_up_first() -> None:
    rig = Rig(keep_bytes=200 * CELL_BYTES)
    for letter in "abac":
        rig.once(letter * 100)
    rig.once("x")
    assert rig.once("a" * 100) == 99
    assert rig.once("b" * 100) == 0


def test_to_branch_from_one_is_to_use_it() -> None:
    rig = Rig(keep_bytes=250 * CELL_BYTES)
    for tokens in ("a" * 100, "b" * 100, "a" * 50 + "c" * 10, "x"):
        rig.once(tokens)
    assert rig.once("a" * 100) == 99
    assert rig.once("b" * 100) == 0


def test_one_that_is_over_the_bound_by_itself_displaces_nobody() -> None:
    rig = Rig(keep_bytes=150 * CELL_BYTES)
    for tokens in ("a" * 100, "b" * 200, "x"):
        rig.once(tokens)
    assert rig.once("b" * 200) == 0
    assert rig.once("a" * 100) == 99


def test_no_bytes_keep_nothing() -> None:
    rig = Rig(keep_bytes=0)
    rig.once("a" * 100)
    assert rig.once("a" * 100) == 0
    assert rig.memory.saved == 0


def test_no_room_to_restore_is_a_miss() -> None:
    rig = Rig()
    rig.once("a" * 900)
    rig.start("b" * 200)
    assert rig.start("a" * 500 + "c")[1] == 0
    assert rig.memory.restored == 0


def test_a_failure_to_restore_is_a_miss() -> None:
    rig = Rig()
    rig.once("a" * 100)
    rig.once("b")
    rig.memory.refuses = True
    assert rig.once("a" * 100 + "c") == 0


def test_room_is_what_running_sequences_leave() -> None:
    rig = Rig()
    rig.once("k" * 900)
    rig.start("a" * 600)
    prompt = token_array(map(ord, "a" * 600 + "b" * 300))
    assert rig.pool.fits(prompt, rig.pool.find(prompt), 100)
    assert not rig.pool.fits(prompt, rig.pool.find(prompt), 101)
    assert not rig.pool.fits(prompt, Match(), 0)


def test_recurrent_state_is_used_whole_or_not_at_all() -> None:
    rig = Rig(traits=Traits(divisible=False))
    rig.once("a" * 100)
    assert rig.once("a" * 99 + "b") == 0
    assert rig.once("a" * 100 + "b") == 100
    assert rig.once("a" * 100 + "c") == 0
    running, _ = rig.start("d" * 10)
    assert rig.start("d" * 10 + "e")[1] == 0
    rig.pool.end(running)


def test_a_window_that_has_slid_past_the_cut_is_a_miss() -> None:
    rig = Rig(traits=Traits(window=20))
    rig.memory.lost = 60
    rig.once("a" * 100)
    assert rig.once("a" * 70 + "b" * 9) == 0
    rig.once("c" * 100)
    assert rig.once("c" * 90 + "d" * 9) == 90


def test_a_copy_holds_what_a_window_sees_and_no_more() -> None:
    rig = Rig(traits=Traits(window=20))
    rig.once("a" * 100)
    rig.once("b")
    assert rig.once("a" * 90 + "c") == 0
    rig.once("d" * 100)
    rig.once("b")
    assert rig.once("d" * 100 + "e") == 100


def test_what_a_window_has_slid_past_is_no_promise() -> None:
    rig = Rig(traits=Traits(window=20))
    sequence, _ = rig.start("a" * 200)
    rig.memory.lost = 100
    prompt = token_array(map(ord, "a" * 50 + "b"))
    assert rig.pool.find(prompt) == Match()
    sequence.length = 30
    assert rig.pool.find(prompt).promised == 50


def test_copies_of_recurrent_states_are_no_more_than_there_are_slots() -> None:
    rig = Rig(traits=Traits(divisible=False))
    rig.memory.state_bytes = 500
    for letter in "abcdefx":
        rig.once(letter * 10)
    kept = [len(prefix.data) for prefix in rig.pool._kept if prefix.data is not None]
    assert kept == [500] * 3

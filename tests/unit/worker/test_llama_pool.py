"""The KV cache's bookkeeping, on a memory that only remembers."""

import pytest

pytest.importorskip("numpy")
from worker.backends.llama_cells import CachedSequence, count_cells
from worker.backends.llama_keep import Traits
from worker.backends.llama_pool import KvPool, Match
from worker.backends.prefixes import MAX_KEPT, common_length, token_array

CELL_BYTES = 10


class FakeMemory:
    """Positions per slot, from ``starts`` on; ``lost`` have been overwritten at the beginning.

    A copy takes ``CELL_BYTES`` for each of them, and ``state_bytes`` in any case, which
    is what a partial copy takes.
    """

    def __init__(self, traits: Traits) -> None:
        self.lengths: dict[int, int] = {}  # the last position of each, and one more
        self.starts: dict[int, int] = {}
        self.copies: list[tuple[int, int, int]] = []
        self.copied_from: dict[int, int] = {}
        self.saved = 0
        self.checkpoints = 0
        self.restored = 0
        self.lost = 0
        self.state_bytes = 0 if traits.divisible else 100
        self.refuses = False
        self._traits = traits
        self._states: dict[int, int] = {}  # how many tokens the state in a slot has seen

    def compute(self, slot: int, length: int) -> None:
        self.lengths[slot] = self._states[slot] = length

    def copy(self, source: int, target: int, length: int, start: int = 0) -> None:
        if self.lengths.get(target):
            assert self.lengths[target] == start
        else:
            self.starts[target] = start
        assert self.starts.get(source, 0) <= start < length <= self.lengths[source]
        self.lengths[target] = length
        self._states[target] = self._states[source]
        self.copies.append((source, target, length))
        self.copied_from[source] = start

    def trim(self, slot: int, length: int) -> bool:
        if length and not self._traits.divisible and self._states[slot] > length:
            return False
        self.lengths[slot] = min(length, self.lengths.get(slot, 0))
        self._states[slot] = min(length, self._states.get(slot, 0))
        return True

    def first_position(self, slot: int) -> int:
        return self.lost

    def size(self, slot: int, *, partial: bool = False) -> int:
        if partial or not self._traits.takes_cells:
            return self.state_bytes
        count = self.lengths[slot] - self.starts.get(slot, 0)
        return self.state_bytes + count * CELL_BYTES

    def save(self, slot: int, *, partial: bool = False) -> memoryview:
        if partial:
            self.checkpoints += 1
        else:
            self.saved += 1
        data = bytearray(self.size(slot, partial=partial))
        start = self.starts.get(slot, 0)
        data[:4] = start.to_bytes(2, "big") + self.lengths[slot].to_bytes(2, "big")
        return memoryview(data)

    def restore(self, slot: int, data: memoryview, *, partial: bool = False) -> bool:
        assert partial or not self.lengths.get(slot)
        if self.refuses:
            return False
        start, length = (int.from_bytes(data[i : i + 2], "big") for i in (0, 2))
        self._states[slot] = length
        if partial and self._traits.takes_cells:
            assert self.lengths[slot] >= length
        else:
            self.restored += 1
            self.starts[slot] = start
            self.lengths[slot] = length
        return True


class Rig:
    """A pool of 1,000 cells and 3 slots."""

    def __init__(self, *, keep_bytes: int | None = None, traits: Traits | None = None) -> None:
        traits = traits or Traits()
        self.memory = FakeMemory(traits)
        self.steps = 10  # that a sequence runs for
        self.pool = KvPool(self.memory, 1000, 3, 7, keep_bytes, traits)

    def start(self, tokens: str, *forks: int) -> tuple[CachedSequence, int]:
        """Start a sequence and compute its prompt; also how much of it was there."""
        prompt = token_array(map(ord, tokens))
        self.pool.settle()
        sequence = self.pool.start(prompt, self.pool.find(prompt), forks)
        found = sequence.length
        assert self.memory.lengths.get(sequence.slot, 0) == found
        for length in (*sequence.stops, len(prompt)):
            self.memory.compute(sequence.slot, length)
            self.pool.computed(sequence, length)
        for _ in range(self.steps):
            self.pool.settle()
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


def test_no_more_are_kept_than_a_look_up_can_compare_with() -> None:
    rig = Rig()
    for number in range(MAX_KEPT + 1):
        rig.once(chr(1000 + number))
    assert rig.once(chr(1000) + "x") == 0
    assert rig.once(chr(1000 + MAX_KEPT) + "x") == 1
    assert rig.once(chr(1002) + "x") == 1


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


STATES = [Traits(divisible=False), Traits(divisible=False, takes_cells=False)]


@pytest.mark.parametrize("traits", STATES, ids=["hybrid", "recurrent"])
def test_recurrent_state_is_gone_on_from_where_there_is_a_copy(traits: Traits) -> None:
    rig = Rig(traits=traits)
    rig.once("a" * 100)
    assert rig.once("a" * 98 + "b") == 0  # its only checkpoint is after 99
    assert rig.once("a" * 100 + "b") == 100
    assert rig.once("a" * 100 + "b" * 50) == 101
    assert rig.once("a" * 100 + "b" + "c") == 99  # 100 was too near to be worth another
    assert rig.once("a" * 100) == 99


@pytest.mark.parametrize("traits", [*STATES, Traits(window=20)], ids=["hybrid", "state", "window"])
def test_a_third_prompt_begins_where_two_have_parted(traits: Traits) -> None:
    rig = Rig(traits=traits)
    system = "s" * 200
    for letter, found in (("a", 0), ("b", 0), ("c", 200), ("d", 200)):
        rig.memory.lost = 180  # of windows, all but the end
        assert rig.once(system + letter * 100) == found
        rig.once("x")


@pytest.mark.parametrize("traits", STATES, ids=["hybrid", "recurrent"])
def test_a_running_state_is_shared_where_it_has_a_checkpoint(traits: Traits) -> None:
    rig = Rig(traits=traits)
    first, _ = rig.start("a" * 200 + "b" * 50, 200)
    assert rig.start("a" * 200 + "c" * 50)[1] == 200
    rig.pool.end(first)
    assert rig.start("a" * 200 + "b" * 50)[1] == 249


def test_where_another_prompt_parts_is_promised_until_it_is_there() -> None:
    rig = Rig(traits=Traits(divisible=False))
    prompt = token_array(map(ord, "a" * 200))
    sequence = rig.pool.start(prompt, Match(), [80])
    assert sequence.stops == [80, 199]
    rig.pool.fork(sequence, 120)
    rig.pool.fork(sequence, 125)  # not worth another one
    assert sequence.stops == [80, 120, 199]
    alike = token_array(map(ord, "a" * 130 + "b"))
    assert rig.pool.find(alike)[2:4] == (0, 120)
    for length, known in ((80, (80, 120)), (120, (120, 120)), (199, (120, 120))):
        rig.memory.compute(sequence.slot, length)
        rig.pool.computed(sequence, length)
        assert rig.pool.find(alike)[2:4] == known
    rig.pool.fork(sequence, 150)  # is behind it
    assert sequence.stops == []


def test_an_earlier_turn_can_be_gone_back_to() -> None:
    rig = Rig(traits=Traits(divisible=False))
    conversation = ""
    ends: list[int] = []
    for turn in "abcdef":
        conversation += turn * 50
        assert rig.once(conversation) == (ends[-1] if ends else 0)
        ends.append(len(conversation))
        rig.once("x")
    for end in reversed(ends[2:-1]):  # the first ones have been given up
        assert rig.once(conversation[:end] + "z") == end - 1


def test_a_sequence_has_no_more_checkpoints_than_that() -> None:
    rig = Rig(traits=Traits(divisible=False))
    sequence, _ = rig.start("a" * 900, *range(50, 900, 50))
    assert [each.length for each in sequence.checkpoints] == [*range(550, 900, 50), 899]


@pytest.mark.parametrize("traits", STATES, ids=["hybrid", "recurrent"])
@pytest.mark.parametrize("keep_bytes", [1000, 2500, 6000])
def test_checkpoints_are_within_the_bound(traits: Traits, keep_bytes: int) -> None:
    rig = Rig(keep_bytes=keep_bytes, traits=traits)
    most = 0
    for number in range(30):
        running, _ = rig.start("s" * 60 + chr(97 + number % 3) * (20 + number), 30, 60)
        most = max(most, rig.pool.nbytes)
        rig.once("x")
        rig.pool.end(running)
        most = max(most, rig.pool.nbytes)
    assert 0 < most <= keep_bytes


def test_no_bytes_take_no_checkpoints() -> None:
    rig = Rig(keep_bytes=0, traits=Traits(divisible=False))
    sequence, _ = rig.start("a" * 200, 100)
    assert rig.start("a" * 150)[1] == 0
    rig.pool.end(sequence)
    assert rig.memory.checkpoints == 0


def test_a_state_that_comes_back_in_part_only_is_a_miss() -> None:
    rig = Rig(traits=Traits(divisible=False))
    rig.once("a" * 200)
    rig.memory.refuses = True
    assert rig.once("a" * 199 + "b") == 0


def test_a_state_without_cells_always_has_room() -> None:
    rig = Rig(traits=Traits(divisible=False, takes_cells=False))
    for letter in "abc":
        prompt = token_array(map(ord, letter * 900))
        assert rig.pool.fits(prompt, rig.pool.find(prompt), 100)
        rig.start(letter * 900)


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


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step copies 20 tokens."""
    monkeypatch.setattr("worker.backends.llama_keep.PART_BYTES", 20 * CELL_BYTES)


@pytest.mark.usefixtures("parts")
def test_a_step_moves_no_more_than_a_part() -> None:
    rig = Rig()
    rig.steps = 0
    rig.start("b")
    rig.once("a" * 110)
    for left in (90, 70, 50, 30, 10, 0):
        rig.pool.settle()
        assert sum(rig.memory.lengths.values()) == left + 1
    assert rig.pool.nbytes == 110 * CELL_BYTES
    assert rig.start("a" * 110 + "c")[1] == 110
    assert rig.memory.restored == 6


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("steps", [0, 1, 3, 5, 6])
@pytest.mark.parametrize("length", [40, 75, 109])
def test_what_is_half_moved_can_be_gone_on_from(steps: int, length: int) -> None:
    rig = Rig()
    rig.start("b")
    rig.once("a" * 110)
    for _ in range(steps):
        rig.pool.settle()
    rig.steps = 0
    assert rig.start("a" * length + "c" * 9)[1] == length
    rig.steps = 10
    for each, _ in (rig.start("d"), rig.start("e")):
        rig.pool.end(each)
    assert rig.once("a" * 100 + "f")  # the longer one is there as well, unless used up


@pytest.mark.usefixtures("parts")
def test_a_beginning_is_brought_back_without_the_rest() -> None:
    rig = Rig()
    rig.start("b")
    rig.once("a" * 110)
    rig.start("d")
    assert rig.start("a" * 45 + "c")[1] == 45
    assert rig.memory.restored == 3


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("again", ["b", "a" * 60 + "b"])
def test_who_runs_alone_finds_the_same_cells_free(again: str) -> None:
    rig = Rig()
    rig.steps = 0
    rig.once("a" * 110)
    running, _ = rig.start(again)
    assert rig.memory.lengths == {running.slot: len(again)}


@pytest.mark.usefixtures("parts")
def test_parts_of_what_has_no_room_are_given_up() -> None:
    rig = Rig(keep_bytes=150 * CELL_BYTES)
    rig.once("a" * 100)
    rig.once("b" * 160)
    rig.steps = 1
    rig.start("c")
    assert rig.once("b" * 160) == 0
    assert rig.once("a" * 100) == 99
    assert rig.pool.nbytes <= 150 * CELL_BYTES


@pytest.mark.usefixtures("parts")
def test_cells_and_slots_that_are_needed_are_cleared_at_once() -> None:
    rig = Rig()
    rig.steps = 0
    beside, _ = rig.start("y")
    for letter in "abc":
        rig.once(letter * 300)
    first, _ = rig.start("x" * 600)
    assert sum(rig.memory.lengths.values()) <= 1000
    assert rig.pool.clear_out()
    assert sum(rig.memory.lengths.values()) == 601
    assert not rig.pool.clear_out()
    rig.pool.end(beside)
    rig.pool.end(first)
    for number in range(8):  # there are 6 slots
        running, _ = rig.start(chr(1000 + number) * 10)
        rig.pool.end(running)
    assert rig.once("c" * 300) == 299


def decode(rig: Rig, *sequences: CachedSequence, steps: int) -> None:
    for _ in range(steps):
        for each in sequences:
            each.tokens.append(1)
            each.length += 1
            rig.memory.compute(each.slot, each.length)
        rig.pool.line_up()


def test_what_was_decoded_by_turns_is_laid_in_rows() -> None:
    rig = Rig()
    first, _ = rig.start("a" * 50)
    second, _ = rig.start("a" * 30 + "b" * 10)
    decode(rig, first, second, steps=63)
    assert rig.memory.saved == 0
    decode(rig, first, second, steps=1)
    assert (rig.memory.saved, rig.memory.restored) == (2, 2)
    assert rig.memory.lengths[first.slot] == first.length == 114
    assert rig.memory.lengths[second.slot] == second.length == 104
    decode(rig, first, second, steps=128)
    assert (rig.memory.saved, rig.memory.restored) == (6, 6)
    rig.pool.end(first)
    rig.pool.end(second)
    assert rig.once("a" * 50 + chr(1) * 150) == 199


def test_one_that_decodes_alone_lies_in_a_row_already() -> None:
    rig = Rig()
    alone, _ = rig.start("a" * 50)
    decode(rig, alone, steps=200)
    assert rig.memory.saved == 0
    other, _ = rig.start("b" * 50)
    decode(rig, alone, other, steps=56)
    assert rig.memory.saved == 2


def test_cells_that_others_share_stay_where_they_are() -> None:
    rig = Rig()
    first, _ = rig.start("a" * 50)
    second, _ = rig.start("b" * 50)
    decode(rig, first, second, steps=40)
    third, found = rig.start("a" * 50 + chr(1) * 30 + "c")
    assert found == 80
    rig.memory.copies.clear()
    decode(rig, first, second, third, steps=30)
    starts = {source: rig.memory.lengths[source] for source in (first.slot, third.slot)}
    assert starts == {first.slot: 120, third.slot: 111}
    assert rig.memory.copied_from[first.slot] >= 80


def test_recurrent_states_are_bounded_by_the_slots() -> None:
    rig = Rig(traits=Traits(divisible=False, takes_cells=False))
    for number in range(40):
        rig.once(chr(97 + number) * 10)
    # One for each of the 3 slots, and 8 checkpoints for each.
    assert rig.pool.nbytes <= 27 * 100
    assert rig.once(chr(97 + 39) * 10 + "x") == 10
    assert rig.once(chr(97) * 10 + "x") == 0

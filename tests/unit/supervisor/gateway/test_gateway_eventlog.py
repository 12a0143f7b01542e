"""The buffer of a stream's events: numbers, bounds, and that nothing is read twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from supervisor.gateway.eventlog import EventLog, glued

BLOCKS = st.sampled_from(
    [b"data: x", b"data: " + b"y" * 90, b"event: a\ndata: {}", b"data: [DONE]", b": resumed 1"]
)
#: What is added at once: any number of events and comments.
ADDED = st.lists(st.lists(BLOCKS, max_size=5), max_size=30)


def log_of(added: list[list[bytes]], max_bytes: int = 10**6) -> EventLog:
    log = EventLog(max_bytes)
    for blocks in added:
        log.add(b"".join(block + b"\n\n" for block in blocks))
    return log


def is_event(block: bytes) -> bool:
    return not block.startswith(b":")


def test_events_have_their_numbers_and_comments_go_with_the_next_one() -> None:
    log = EventLog(1000)
    log.add(b"event: a\ndata: 1\n\n: resumed 1\n\n")
    log.add(b"")
    log.add(b"data: 2\n\n")
    assert (log.first, log.end) == (0, 2)
    assert log.read(0, 1000) == (
        b"id: 0\nevent: a\ndata: 1\n\n: resumed 1\nid: 1\ndata: 2\n\n",
        2,
    )
    assert log.read(1, 1000) == (b": resumed 1\nid: 1\ndata: 2\n\n", 2)
    assert log.read(2, 1000) == (b"", 2)


@given(ADDED, st.lists(st.tuples(st.integers(0, 3), st.integers(1, 300), st.booleans())))
def test_however_a_client_leaves_and_comes_back_it_has_each_event_once(
    added: list[list[bytes]], visits: list[tuple[int, int, bool]]
) -> None:
    log = EventLog(10**6)
    rest = list(added)
    got, at = b"", 0
    for arriving, max_bytes, reads in visits:
        for blocks in rest[:arriving]:
            log.add(b"".join(block + b"\n\n" for block in blocks))
        del rest[:arriving]
        if reads:
            data, at = log.read(at, max_bytes)
            got += data
            # Who has counted the events knows where to go on.
            assert got.count(b"\ndata: ") == at
    for blocks in rest:
        log.add(b"".join(block + b"\n\n" for block in blocks))
    got += log.read(at, 10**9)[0]
    events = [block for blocks in added for block in blocks if is_event(block)]
    numbered = [b"id: %d\n%b" % (number, block) for number, block in enumerate(events)]
    blocks = [block.replace(b": resumed 1\n", b"") for block in got.split(b"\n\n")[:-1]]
    assert blocks == numbered


@given(ADDED, st.integers(0, 2000), st.integers(0, 2000))
def test_the_oldest_go_and_the_newest_stays(
    added: list[list[bytes]], max_bytes: int, less: int
) -> None:
    whole, bounded = log_of(added), log_of(added, max_bytes)
    for bound in (max_bytes, min(max_bytes, less)):
        bounded.trim(bound)
        assert bounded.end == whole.end
        assert bounded.size <= bound or bounded.end - bounded.first <= 1
        assert bounded.first < bounded.end or bounded.end == 0
        rest = whole.read(bounded.first, 10**9)
        assert bounded.read(bounded.first, 10**9) == rest


def test_a_read_ends_at_its_bound() -> None:
    log = log_of([[b"data: x"] * 10])
    one = len(b"id: 0\ndata: x\n\n")
    assert log.read(0, one)[1] == 1
    assert log.read(0, one + 1)[1] == 2


def test_comments_are_in_one_block_with_what_follows() -> None:
    assert glued(b": prefill 1/2\n\nevent: ping\ndata: {}\n\n") == (
        b": prefill 1/2\nevent: ping\ndata: {}\n\n"
    )
    assert glued(b": keep-alive\n\n") == b": keep-alive\n"
    assert glued(b"") == b""

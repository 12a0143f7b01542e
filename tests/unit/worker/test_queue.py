"""Who is next: turns among clients, lanes, and what holds in every order of events."""

from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import Priority
from worker.queue import MAX_PASSED_OVER, RequestQueue

HIGH, NORMAL, LOW = Priority.HIGH, Priority.NORMAL, Priority.LOW


def enter(queue: RequestQueue, ids: Iterator[int], client: str, lane: Priority = NORMAL) -> int:
    request_id = next(ids)
    queue.enter(request_id, client, lane)
    return request_id


def run_out(queue: RequestQueue) -> list[int]:
    """The order in which one slot works everything off."""
    order = []
    while (request_id := queue.take()) is not None:
        order.append(request_id)
        queue.leave(request_id)
    return order


def test_one_clients_requests_run_in_order_of_arrival() -> None:
    queue = RequestQueue()
    for request_id in (3, 1, 2):
        queue.enter(request_id, "a", NORMAL)
    assert run_out(queue) == [3, 1, 2]


def test_fifty_requests_of_one_hold_up_the_one_of_another_for_a_single_turn() -> None:
    queue, ids = RequestQueue(), count()
    for _ in range(50):
        enter(queue, ids, "a")
    running = queue.take()
    assert running is not None
    other = enter(queue, ids, "b")
    queue.leave(running)
    assert queue.take() == other


def test_who_comes_again_and_again_takes_turns_with_who_queued() -> None:
    queue, ids = RequestQueue(), count()
    many = {enter(queue, ids, "a") for _ in range(6)}
    order = []
    enter(queue, ids, "b")
    for _ in range(8):
        request_id = queue.take()
        assert request_id is not None
        order.append("a" if request_id in many else "b")
        queue.leave(request_id)
        if order[-1] == "b":
            enter(queue, ids, "b")
    assert order == ["a", "b"] * 4


def test_slots_are_shared_among_clients() -> None:
    queue, ids = RequestQueue(), count()
    first = [enter(queue, ids, "a") for _ in range(4)]
    second = [enter(queue, ids, "b") for _ in range(2)]
    assert [queue.take() for _ in range(4)] == [first[0], second[0], first[1], second[1]]


def test_who_runs_less_goes_first_even_if_it_was_served_last() -> None:
    queue, ids = RequestQueue(), count()
    for _ in range(3):
        enter(queue, ids, "a")
    assert [queue.take(), queue.take()] == [0, 1]
    for _ in range(2):
        enter(queue, ids, "b")
    assert [queue.take(), queue.take(), queue.take()] == [3, 4, 2]


def test_newcomers_without_end_do_not_keep_anybody_from_a_turn() -> None:
    queue, ids = RequestQueue(), count()
    queue.leave(enter(queue, ids, "a"))
    running = enter(queue, ids, "a")
    assert queue.take() == running
    queue.leave(running)
    waiting = enter(queue, ids, "a")
    for number in range(10):
        enter(queue, ids, f"new {number}")
        taken = queue.take()
        assert taken is not None
        queue.leave(taken)
        if taken == waiting:
            break
    assert number <= 1


def test_lanes_go_by_priority() -> None:
    queue = RequestQueue()
    for request_id, lane in enumerate((LOW, NORMAL, HIGH)):
        queue.enter(request_id, "a", lane)
    assert run_out(queue) == [2, 1, 0]


def test_a_lower_lane_has_its_turn_however_much_comes_in_above() -> None:
    queue, ids = RequestQueue(), count()
    low, normal = enter(queue, ids, "a", LOW), enter(queue, ids, "a", NORMAL)
    for _ in range(3 * MAX_PASSED_OVER):
        enter(queue, ids, "b", HIGH)
    order = run_out(queue)
    assert order.index(normal) == MAX_PASSED_OVER
    assert order.index(low) == MAX_PASSED_OVER + 1


def test_what_leaves_the_queue_is_never_taken() -> None:
    queue, ids = RequestQueue(), count()
    first, second, third = (enter(queue, ids, "a") for _ in range(3))
    queue.leave(second)
    queue.leave(99)
    assert len(queue) == 2
    assert run_out(queue) == [first, third]


def test_an_id_is_here_once() -> None:
    queue = RequestQueue()
    queue.enter(1, "a", NORMAL)
    with pytest.raises(ValueError, match="already"):
        queue.enter(1, "b", LOW)
    assert queue.take() == 1
    with pytest.raises(ValueError, match="already"):
        queue.enter(1, "a", NORMAL)


def test_clients_without_end_take_no_memory_without_end() -> None:
    queue = RequestQueue()
    for request_id in range(3000):
        queue.enter(request_id, f"client {request_id}", NORMAL)
        assert queue.take() == request_id
        queue.leave(request_id)
    assert len(queue._clients) <= 1025


CLIENTS = st.sampled_from("abcd")
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), CLIENTS, st.sampled_from(list(Priority))),
        st.tuples(st.just("take")),
        st.tuples(st.just("leave"), st.integers(0, 30)),
    ),
    max_size=200,
)


@given(EVENTS)
def test_every_request_is_taken_once_in_its_clients_order_and_no_slot_idles(
    events: list[tuple[object, ...]],
) -> None:
    queue, ids = RequestQueue(), count()
    lines: dict[tuple[str, Priority], list[int]] = {}
    running: list[int] = []
    for event in events:
        match event:
            case ("enter", str(client), Priority() as lane):
                lines.setdefault((client, lane), []).append(enter(queue, ids, client, lane))
            case ("leave", int(index)):
                present = running + [i for line in lines.values() for i in line]
                if present:
                    gone = present[index % len(present)]
                    queue.leave(gone)
                    for members in (running, *lines.values()):
                        if gone in members:
                            members.remove(gone)
            case _:
                heads = [line[0] for line in lines.values() if line]
                taken = queue.take()
                assert (taken is None) == (not heads)
                if taken is not None:
                    assert taken in heads
                    next(line for line in lines.values() if line[:1] == [taken]).pop(0)
                    running.append(taken)
        assert len(queue) == sum(map(len, lines.values()))


@given(EVENTS)
def test_no_lane_is_passed_over_for_long(events: list[tuple[object, ...]]) -> None:
    queue, ids = RequestQueue(), count()
    lane_of: dict[int, Priority] = {}
    passed: dict[Priority, int] = dict.fromkeys(Priority, 0)
    for event in events:
        if event[0] == "enter":
            _, client, lane = event
            assert isinstance(client, str)
            assert isinstance(lane, Priority)
            lane_of[enter(queue, ids, client, lane)] = lane
            continue
        taken = queue.take()
        if taken is None:
            continue
        chosen = lane_of.pop(taken)
        queue.leave(taken)
        for lane in Priority:
            waits = lane in lane_of.values()
            passed[lane] = passed[lane] + 1 if waits and lane is not chosen else 0
            # One more where two lanes are due at the same time.
            assert passed[lane] <= MAX_PASSED_OVER + 1


@given(EVENTS)
def test_nobody_has_two_turns_while_another_client_has_nothing(
    events: list[tuple[object, ...]],
) -> None:
    queue, ids = RequestQueue(), count()
    owner: dict[int, str] = {}
    waiting: set[int] = set()
    running: list[int] = []
    turns: dict[str, list[str]] = {}
    for event in events:
        if event[0] == "enter":
            request_id = enter(queue, ids, str(event[1]))
            owner[request_id] = str(event[1])
            waiting.add(request_id)
        elif event[0] == "take" and (taken := queue.take()) is not None:
            waiting.remove(taken)
            running.append(taken)
            for seen in turns.values():
                seen.append(owner[taken])
        elif event[0] == "leave" and running:
            queue.leave(running.pop(0))
        entitled = {owner[i] for i in waiting} - {owner[i] for i in running}
        turns = {client: turns.get(client, []) for client in entitled}
        for seen in turns.values():
            assert len(seen) == len(set(seen)), "somebody had two turns"

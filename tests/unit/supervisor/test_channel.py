"""The supervisor's end of the wire: nothing that has arrived may be left unread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from protocol.codec import Encoder
from protocol.messages import Accepted, Cancel, FromWorker
from supervisor.channel import FRAMES_PER_TURN, Channel, ChannelFull

Peer = zmq.Socket[bytes]


@contextmanager
def connected(
    folder: Path, on_message: Callable[[FromWorker], None], violations: list[str] | None = None
) -> Iterator[tuple[Channel, Peer]]:
    context: zmq.Context[Peer] = zmq.Context()
    reasons: list[str] = [] if violations is None else violations
    channel = Channel(context, folder, "c", on_message=on_message, on_violation=reasons.append)
    peer: Peer = context.socket(zmq.DEALER)
    peer.connect(channel.data_endpoint)
    try:
        yield channel, peer
    finally:
        channel.close()
        context.destroy(linger=0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def fill(channel: Channel) -> None:
    """Until the peer, which does not read, takes no more, nor does the kernel."""
    refused_at_once = 0
    while refused_at_once < 4:
        sent = 0
        with contextlib.suppress(ChannelFull):
            while True:
                channel.send(Cancel(0))
                sent += 1
        # The I/O threads still move what was sent on, and make room.
        refused_at_once = 0 if sent else refused_at_once + 1
        await asyncio.sleep(0.03)


async def test_a_message_is_read_while_nothing_can_be_sent(tmp_path: Path) -> None:
    got: list[FromWorker] = []
    with connected(tmp_path, got.append) as (channel, peer):
        await fill(channel)
        peer.send(Encoder()(Accepted(1, 1)))
        # It is there when the loop has not looked yet, and sending is what finds it.
        peer.poll(100, zmq.POLLERR)
        with pytest.raises(ChannelFull):
            channel.send(Cancel(0))
        await until(lambda: len(got) == 1)


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("turns", [1, 3])
async def test_a_burst_is_read_to_its_end_and_in_order(
    tmp_path: Path, turns: int, extra: int
) -> None:
    got: list[FromWorker] = []
    sent = [Accepted(n, 1) for n in range(turns * FRAMES_PER_TURN + extra)]
    with connected(tmp_path, got.append) as (_, peer):
        for message in sent:
            peer.send(Encoder()(message))
        await until(lambda: len(got) == len(sent))
        assert got == sent


async def test_a_violation_and_a_handler_that_fails_do_not_end_the_reading(tmp_path: Path) -> None:
    got: list[FromWorker] = []
    violations: list[str] = []

    def handle(message: FromWorker) -> None:
        got.append(message)
        raise ValueError("no")

    with connected(tmp_path, handle, violations) as (_, peer):
        for frame in (b"\xc1", Encoder()(Accepted(1, 1)), b"", Encoder()(Accepted(2, 1))):
            peer.send(frame)
        await until(lambda: len(violations) == 4)
        assert len(got) == 2


async def test_nothing_is_delivered_after_a_close_within_a_handler(tmp_path: Path) -> None:
    got: list[FromWorker] = []

    def handle(message: FromWorker) -> None:
        got.append(message)
        channel.close()

    with connected(tmp_path, handle) as (channel, peer):
        for n in range(3):
            peer.send(Encoder()(Accepted(n, 1)))
        await until(lambda: bool(got))
        await asyncio.sleep(0.05)
        assert len(got) == 1

"""Beats: soon after a change, now and then without one."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from protocol.codec import FromWorkerDecoder
from protocol.handshake import WorkerBoot
from protocol.messages import Beat, FromWorker, Phase
from worker.transport import Heart
from worker.vitals import Vitals

INTERVAL_S = 0.01
QUIET_INTERVAL_S = 0.4
PATIENCE_MS = 10_000


class Listener:
    """The supervisor's end of the beat socket, and the vitals that are told of."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.bind(endpoint)
        self.vitals = Vitals()
        self._decode = FromWorkerDecoder()

    def beat(self) -> FromWorker:
        """The next beat."""
        assert self.socket.poll(PATIENCE_MS), "no beat"
        return self._decode(self.socket.recv())


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    endpoint = f"ipc://{tmp_path}/b"
    boot = WorkerBoot(
        data_endpoint="",
        beat_endpoint=endpoint,
        nonce="",
        generation=1,
        backend="simulated",
        parent_pid=1,
        death_fd=0,
        beat_interval_s=INTERVAL_S,
        quiet_beat_interval_s=QUIET_INTERVAL_S,
    )
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    listening = Listener(context, endpoint)
    heart = Heart(context, boot, listening.vitals)
    heart.start()
    yield listening
    heart.stop()
    listening.socket.close(linger=0)
    context.term()


def test_without_a_change_beats_are_rare(listener: Listener) -> None:
    first = listener.beat()
    before = time.monotonic()
    assert listener.beat() == first
    # Not before it is due, but for the first one's own way here.
    assert time.monotonic() - before > QUIET_INTERVAL_S / 2


def test_a_change_is_told_soon(listener: Listener) -> None:
    listener.beat()
    listener.vitals.phase = Phase.DECODE
    listener.vitals.advance()
    told = listener.beat()
    assert isinstance(told, Beat)
    assert (told.phase, told.progress) == (Phase.DECODE, 1)

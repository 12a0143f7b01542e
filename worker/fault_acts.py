"""How each fault is done: to this process, and on its link."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from protocol.codec import Encoder
from protocol.handshake import BOOT_ENV, WorkerBoot, decode_boot
from protocol.messages import (
    Accepted,
    Delta,
    FinishReason,
    FromWorker,
    Hello,
    Loaded,
    Rejected,
    Step,
    ToWorker,
)
from worker.backends.base import LoadRefused
from worker.faults import IDLE_S, Fault, FaultKind, FaultPlan, FaultPoint
from worker.link import Link

_SIGNALS = {
    FaultKind.KILL: signal.SIGKILL,
    FaultKind.SEGFAULT: signal.SIGSEGV,
    FaultKind.BUS: signal.SIGBUS,
    FaultKind.STOP: signal.SIGSTOP,
}

#: More than any machine of a test should give; ``grow`` ends there.
_GROWN_ENOUGH_BYTES = 4 * 1024**3
_GROW_INTERVAL_S = 0.05

#: Text for all requests there could be, as soon as whoever started it is dead.
_GHOST = """
import os, sys, time, zmq
from protocol.codec import Encoder
from protocol.handshake import BOOT_ENV, WorkerBoot, decode_boot
from protocol.messages import Accepted, Delta, Started, Step
parent = os.getppid()
while os.getppid() == parent:
    time.sleep(0.001)
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(sys.argv[1])
encode = Encoder()
while True:
    for message in (Step([Delta(n, "ghost", [1]) for n in range(1, 2000)]), Accepted(1, 1)):
        socket.send(encode(message))
    time.sleep(0.005)
"""

_encode = Encoder()


def cause(fault: Fault, link: Link | None) -> None:
    """Do it. Returns only from faults that a process survives."""
    if fault.kind in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[fault.kind])
        return
    match fault.kind:
        case FaultKind.ABORT:
            os.abort()
        case FaultKind.EXIT:
            os._exit(fault.status)
        case FaultKind.HANG:
            threading.Event().wait()
        case FaultKind.HOLD_GIL:
            until = time.monotonic() + fault.seconds
            while time.monotonic() < until:
                _doze(until - time.monotonic())
        case FaultKind.DOZE:
            _doze(fault.seconds)
        case FaultKind.RAISE:
            raise RuntimeError("simulated backend exception")
        case FaultKind.REFUSE:
            raise LoadRefused(fault.code, "simulated refusal")
        case FaultKind.EXHAUST:
            _exhaust()
            bytearray(1024**3)
        case FaultKind.EXHAUST_NATIVE:
            _exhaust()
            libc = ctypes.CDLL(None)
            libc.malloc.restype = ctypes.c_void_p
            ctypes.memset(libc.malloc(ctypes.c_size_t(1024**3)) or 0, 0, 1)
        case FaultKind.GROW:
            threading.Thread(target=_grow, args=(fault.size,), daemon=True).start()
        case FaultKind.FLOOD:
            threading.Thread(target=_flood, args=(fault.seconds,), daemon=True).start()
        case FaultKind.HELPER:
            subprocess.Popen(["sleep", "600"])
        case FaultKind.DETACHED_HELPER:
            subprocess.Popen(["sleep", "600"], start_new_session=True)
        case FaultKind.FLOODING_HELPER:
            subprocess.Popen(["yes", "no end of it"], start_new_session=True)
        case FaultKind.GHOST:
            endpoint = _own_boot().data_endpoint
            subprocess.Popen([sys.executable, "-c", _GHOST, endpoint], start_new_session=True)
        case FaultKind.IGNORE_TERM:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case _ if link is not None:
            for frame in _frames(fault):
                link.send_frame(frame)


def _doze(seconds: float) -> None:
    # PyDLL, unlike CDLL, does not release the interpreter's lock. A signal ends it.
    ctypes.PyDLL(None).usleep(min(int(seconds * 1e6), 2**32 - 1))


def _exhaust() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 32 * 1024**2, resource.RLIM_INFINITY))


def _own_boot() -> WorkerBoot:
    """What it was started with; its variable is not in ``os.environ`` any more."""
    start = f"{BOOT_ENV}=".encode()
    for entry in Path("/proc/self/environ").read_bytes().split(b"\0"):
        if entry.startswith(start):
            return decode_boot(entry.removeprefix(start).decode())
    raise RuntimeError("this is no worker")


def _grow(size: int) -> None:
    kept: list[bytes] = []
    while len(kept) * size < _GROWN_ENOUGH_BYTES:
        # Not zeros, which the kernel would give only when they are touched.
        kept.append(b"x" * size)
        time.sleep(_GROW_INTERVAL_S)
    threading.Event().wait()


def _flood(seconds: float) -> None:
    block = b"\xff\xfe no end of line \x00" * 2048
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        os.write(1, block)
        os.write(2, block)


def _frames(fault: Fault) -> Iterator[bytes]:
    step = Step([Delta(0, "x" * 64, [1, 2, 3])])
    match fault.kind:
        case FaultKind.CORRUPT_FRAME:
            yield b"\xc1\x00\xff\xfe" * 16
        case FaultKind.EMPTY_FRAME:
            yield b""
        case FaultKind.TRUNCATED_FRAME:
            yield _encode(step)[:-5]
        case FaultKind.WRONG_TAG:
            yield msgspec.msgpack.encode(["NoSuchMessage", 1, 2])
        case FaultKind.OVERSIZED_FRAME:
            # Well-formed, so that nothing but its size is wrong.
            yield _encode(Step([Delta(0, "x" * fault.size, [1])]))
        case FaultKind.STALE_FRAMES:
            # What an earlier generation would say of requests that ended long ago.
            yield _encode(step)
            yield _encode(Step([Delta(1, "late", [1], FinishReason.STOP)]))
            yield _encode(Accepted(0, 1))
            yield _encode(Rejected(0, fault.code, "late"))


class FaultyLink:
    """A link whose handshake and ``Loaded`` can go wrong. See ``link.Link``."""

    def __init__(self, link: Link, plan: FaultPlan) -> None:
        self._link = link
        self._plan = plan
        self._loaded = False

    def send_frame(self, frame: bytes) -> None:
        self._link.send_frame(frame)

    def wait(self) -> ToWorker:
        if not self._loaded or not self._plan.expects(FaultPoint.IDLE):
            return self._link.wait()
        until = time.monotonic() + IDLE_S
        while time.monotonic() < until:
            for message in self._link.pending():
                return message
            time.sleep(0.005)
        for fault in self._plan.due(FaultPoint.IDLE):
            cause(fault, self._link)
        return self._link.wait()

    def has_news(self, wait_s: float) -> bool:
        return self._link.has_news(wait_s)

    def pending(self) -> Iterator[ToWorker]:
        return self._link.pending()

    def send(self, message: FromWorker) -> None:
        if isinstance(message, Hello):
            self._greet(message)
            return
        if not isinstance(message, Loaded):
            self._link.send(message)
            return
        self._loaded = True
        faults = list(self._plan.due(FaultPoint.LOADED))
        if any(fault.kind is FaultKind.SILENT for fault in faults):
            return
        self._link.send(message)
        for fault in faults:
            if fault.kind is FaultKind.TWICE:
                self._link.send(message)
            else:
                cause(fault, self._link)

    def _greet(self, hello: Hello) -> None:
        replace = msgspec.structs.replace
        repeat = 1
        for fault in self._plan.due(FaultPoint.HELLO):
            match fault.kind:
                case FaultKind.SILENT:
                    repeat = 0
                case FaultKind.TWICE:
                    repeat = 2
                case FaultKind.WRONG_VERSION:
                    hello = replace(hello, protocol_version=hello.protocol_version + 1)
                case FaultKind.WRONG_NONCE:
                    hello = replace(hello, nonce="0" * len(hello.nonce))
                case FaultKind.OLD_GENERATION:
                    hello = replace(hello, generation=hello.generation - 1)
                case _:
                    cause(fault, self._link)
        for _ in range(repeat):
            self._link.send(hello)

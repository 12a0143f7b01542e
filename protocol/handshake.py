"""How a worker learns whom to talk to, and proves that it is the one expected.

The supervisor hands a ``WorkerBoot`` to the child through one environment
variable; the child answers with ``Hello``. The nonce is fresh per generation,
so a process left over from an earlier one cannot pass for the current one.
"""

from __future__ import annotations

import msgspec

from protocol.messages import PROTOCOL_VERSION, Hello

BOOT_ENV = "OPTA_LMX_WORKER_BOOT"

#: Exit status of a worker after a failure that a message told about (EX_SOFTWARE).
EXIT_FAULT = 70


class HandshakeError(Exception):
    """The peer is not the worker that was spawned, or speaks another protocol."""


class WorkerBoot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a worker needs before its first message.

    ``data_endpoint`` and ``beat_endpoint`` are two socket pairs because a zmq
    socket belongs to one thread: the engine owns the first, the I/O thread that
    beats the second. ``death_fd`` is the read end of a pipe whose write end only
    the supervisor holds. A beat follows a change within ``beat_interval_s``; while
    nothing changes, one comes about every ``quiet_beat_interval_s``.
    """

    data_endpoint: str
    beat_endpoint: str
    nonce: str
    generation: int
    backend: str
    parent_pid: int
    death_fd: int
    beat_interval_s: float
    quiet_beat_interval_s: float


def encode_boot(boot: WorkerBoot) -> str:
    return msgspec.json.encode(boot).decode()


def decode_boot(text: str) -> WorkerBoot:
    """Raise ``HandshakeError`` if the text is not a boot record."""
    try:
        return msgspec.json.decode(text, type=WorkerBoot)
    except msgspec.MsgspecError as error:
        raise HandshakeError(f"bad worker boot record: {error}") from error


def verify_hello(hello: Hello, boot: WorkerBoot, pid: int) -> None:
    """Raise ``HandshakeError`` unless ``hello`` comes from the process spawned with ``boot``."""
    for what, got, expected in (
        ("protocol version", hello.protocol_version, PROTOCOL_VERSION),
        ("nonce", hello.nonce, boot.nonce),
        ("generation", hello.generation, boot.generation),
        ("pid", hello.pid, pid),
        ("backend", hello.backend, boot.backend),
    ):
        if got != expected:
            shown = "" if what == "nonce" else f": {got!r}, expected {expected!r}"
            raise HandshakeError(f"worker announced the wrong {what}{shown}")

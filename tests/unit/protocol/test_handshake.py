"""Only the process that was spawned passes for the worker."""

import msgspec
import pytest

from protocol.handshake import (
    HandshakeError,
    WorkerBoot,
    decode_boot,
    encode_boot,
    verify_hello,
)
from protocol.messages import PROTOCOL_VERSION, Hello

BOOT = WorkerBoot(
    data_endpoint="ipc:///x/a.d",
    beat_endpoint="ipc:///x/a.b",
    nonce="secret",
    generation=3,
    backend="llama",
    parent_pid=1,
    death_fd=9,
    beat_interval_s=1.0,
    quiet_beat_interval_s=5.0,
)
HELLO = Hello(PROTOCOL_VERSION, "secret", 42, 3, "llama", "0.3.36")


def test_boot_record_survives_the_environment() -> None:
    assert decode_boot(encode_boot(BOOT)) == BOOT


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"nonce": 1}'])
def test_a_broken_boot_record_is_refused(text: str) -> None:
    with pytest.raises(HandshakeError):
        decode_boot(text)


def test_the_expected_worker_passes() -> None:
    verify_hello(HELLO, BOOT, pid=42)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("protocol_version", PROTOCOL_VERSION + 1, "protocol version"),
        ("nonce", "guess", "nonce"),
        ("pid", 43, "pid"),
        ("generation", 2, "generation"),
        ("backend", "mlx", "backend"),
    ],
)
def test_anything_else_is_refused_by_name(field: str, value: object, named: str) -> None:
    with pytest.raises(HandshakeError, match=f"wrong {named}") as refusal:
        verify_hello(msgspec.structs.replace(HELLO, **{field: value}), BOOT, pid=42)
    assert "secret" not in str(refusal.value)

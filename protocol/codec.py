"""msgpack in and out, one frame per message.

Encoders and decoders are built once: msgspec compiles the type on construction.
They are not shared between threads, hence the small factories.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from protocol.messages import FromWorker, ToWorker


class CodecError(Exception):
    """A frame that is not a message of this protocol version."""


class Encoder:
    """Encodes messages of either direction."""

    def __init__(self) -> None:
        self._encode = msgspec.msgpack.Encoder().encode

    def __call__(self, message: ToWorker | FromWorker) -> bytes:
        return self._encode(message)


class ToWorkerDecoder:
    """Decodes what the supervisor sends. Raises ``CodecError``."""

    def __init__(self) -> None:
        self._decode: Callable[[bytes], ToWorker] = msgspec.msgpack.Decoder(ToWorker).decode

    def __call__(self, frame: bytes) -> ToWorker:
        try:
            return self._decode(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CodecError(str(error)) from error


class FromWorkerDecoder:
    """Decodes what a worker sends. Raises ``CodecError``."""

    def __init__(self) -> None:
        self._decode: Callable[[bytes | memoryview], FromWorker] = msgspec.msgpack.Decoder(
            FromWorker
        ).decode

    def __call__(self, frame: bytes | memoryview) -> FromWorker:
        try:
            return self._decode(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CodecError(str(error)) from error

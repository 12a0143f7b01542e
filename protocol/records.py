"""The bases of everything that crosses the wire: msgpack arrays, fields in order."""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages; the tag is the class name."""


class Record(msgspec.Struct, frozen=True, array_like=True):
    """Base of the values inside messages."""

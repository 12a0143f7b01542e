"""Reads streams of the Responses API more strictly than the official client does."""

from __future__ import annotations

from typing import Any

import msgspec
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

_official: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def parsed(stream: bytes) -> list[Any]:
    """The events of a stream, each found to be well-formed and in its place."""
    found: list[Any] = []
    blocks = stream.split(b"\n\n")
    assert blocks.pop() == b""
    for block in blocks:
        if block.startswith(b":"):
            continue
        name, data = block.split(b"\n")
        event = msgspec.json.decode(data.removeprefix(b"data: "))
        assert name == b"event: " + event["type"].encode()
        assert event["sequence_number"] == len(found)
        # Only our own codes of failures are unknown to the official types.
        if event["type"] != "response.failed":
            _official.validate_python(event)
        found.append(event)
    return found

"""Reads a recorded HTTP answer: server-sent events with the times of their arrival."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from benchmark.plan import Answer

#: Data and the time of its arrival, as they came out of the socket.
Recording = list[tuple[float, bytes]]

_CONTENT = re.compile(rb'"content": ?"(?!")')
_FINISH = re.compile(rb'"finish_reason": ?"(\w+)"')


def read_answer(sent: float, recording: Recording, max_tokens: int, *, want_text: bool) -> Answer:
    """The answer in a recording, which may have been cut off."""
    answer = Answer(sent=sent)
    status, events = _split(recording)
    if status != 200:
        answer.error = f"HTTP {status}: " + b"".join(line for _, line in events).decode(
            errors="replace"
        )
        return answer
    finish = ""
    texts: list[str] = []
    for at, line in events:
        if not line.startswith(b"data: ") or line == b"data: [DONE]":
            continue
        if _CONTENT.search(line):
            answer.pieces.append(at)
            if want_text:
                texts.append(_content(line))
        if match := _FINISH.search(line):
            finish = match[1].decode()
        if b'"usage":' in line:
            _read_usage(line, answer)
        if line.startswith(b'data: {"error"'):
            answer.error = line[6:].decode(errors="replace")
    if not answer.tokens:
        answer.tokens = max_tokens if finish == "length" else len(answer.pieces)
    answer.text = "".join(texts)
    return answer


def _split(recording: Recording) -> tuple[int, Iterator[tuple[float, bytes]]]:
    """The status code, and the body's lines with the time at which each was whole."""
    head = b""
    for number, (at, data) in enumerate(recording):
        head += data
        raw, end, rest = head.partition(b"\r\n\r\n")
        if end:
            body: Recording = [(at, rest), *recording[number + 1 :]]
            if b"transfer-encoding: chunked" in raw.lower():
                body = _dechunk(body)
            return int(raw.split(None, 2)[1]), _lines(body)
    return 0, iter([(0.0, head or b"the connection was closed without an answer")])


def _dechunk(recording: Recording) -> Recording:
    """Undo HTTP's chunked encoding."""
    plain: Recording = []
    buffer = b""
    left = 0  # bytes of the present chunk that are still to come, its CRLF included
    for at, data in recording:
        buffer += data
        out = b""
        while buffer:
            if left:
                part, buffer = buffer[:left], buffer[left:]
                out += part[: max(0, left - 2)]
                left -= len(part)
                continue
            size, end, rest = buffer.partition(b"\r\n")
            if not end:
                break
            buffer = rest
            left = int(size.split(b";")[0], 16) + 2
        if out:
            plain.append((at, out))
    return plain


def _lines(recording: Recording) -> Iterator[tuple[float, bytes]]:
    buffer = b""
    at = 0.0
    for at, data in recording:
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            yield at, line.rstrip(b"\r")
    if buffer:
        yield at, buffer


def _content(line: bytes) -> str:
    event: dict[str, Any] = msgspec.json.decode(line[6:])
    return "".join(choice.get("delta", {}).get("content") or "" for choice in event["choices"])


def _read_usage(line: bytes, answer: Answer) -> None:
    usage = msgspec.json.decode(line[6:]).get("usage")
    if usage:
        answer.tokens = usage.get("completion_tokens", 0)
        answer.prompt_tokens = usage.get("prompt_tokens")

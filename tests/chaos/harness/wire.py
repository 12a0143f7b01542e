"""Plain HTTP to the server, in threads, with the time of everything."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

#: Longest that anything may be waited for; who waits longer was forgotten.
ANSWER_TIMEOUT_S = 40.0

JSON = {"Content-Type": "application/json"}


def ask(port: int, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer. Raises ``OSError`` or ``HTTPException``."""
    with contextlib.closing(connect(port)) as connection:
        return ask_on(connection, method, path, body)


def connect(port: int, timeout_s: float = ANSWER_TIMEOUT_S) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    connection.connect()
    return connection


def ask_on(
    connection: http.client.HTTPConnection, method: str, path: str, body: object = None
) -> tuple[int, dict[str, Any]]:
    """As ``ask``, on a connection that is there already."""
    connection.request(method, path, None if body is None else json.dumps(body), JSON)
    answer = connection.getresponse()
    content = answer.read()
    found: dict[str, Any] = json.loads(content) if content else {}
    return answer.status, found


def chat_body(model_id: str, prompt: str, **options: object) -> dict[str, object]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": model_id, "messages": messages, "stream": True, **options}


def stream(port: int, body: object) -> Generator[str, None, None]:
    """The ``data:`` payloads of a streamed chat, as they arrive; one for a refusal."""
    with contextlib.closing(connect(port)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
        answer = connection.getresponse()
        if answer.status != 200:
            yield answer.read().decode()
            return
        while line := answer.readline():
            if line.startswith(b"data: "):
                yield line[6:].decode().strip()


def content_of(payload: str) -> str:
    if payload == "[DONE]":
        return ""
    choices = json.loads(payload).get("choices") or [{}]
    return str(choices[0].get("delta", {}).get("content") or "")


class Call(threading.Thread):
    """Somebody who waits for an answer. ``answer`` is None until there is one.

    A plain call's answer is ``answered``, or ``refused:CODE``; see ``stream_call``
    for the others.
    """

    def __init__(self, wait: Callable[[Call], str]) -> None:
        super().__init__(daemon=True)
        self._wait = wait
        self.answer: str | None = None
        self.message = ""
        self.pieces = 0
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._wait(self)
        except TimeoutError:
            pass
        except (OSError, http.client.HTTPException) as error:
            self.answer = f"cut:{type(error).__name__}"

    def answered(self, timeout_s: float = ANSWER_TIMEOUT_S) -> bool:
        self.join(timeout_s)
        return self.answer is not None


def plain_call(port: int, path: str, body: object) -> Call:
    def wait(call: Call) -> str:
        status, found = ask(port, "POST", path, body)
        return verdict(call, status, found)

    return Call(wait)


def verdict(call: Call, status: int, found: dict[str, Any]) -> str:
    if status < 300:
        return "answered"
    error = found.get("error", {})
    call.message = str(error.get("message"))
    return f"refused:{error.get('code')}"


def stream_call(port: int, body: object, expected: str | None) -> Call:
    """``whole``: all of ``expected`` (None: any text) and a proper end; ``error:CODE``: one
    error event at the end; ``refused:CODE``; everything else is a broken promise, told in
    words."""

    def wait(call: Call) -> str:
        text, finished, last = "", False, ""
        for payload in stream(port, body):
            if '"error"' in payload:
                error = json.loads(payload)["error"]
                call.message = str(error["message"])
                if finished:
                    return "an error after the end"
                if expected is not None and not expected.startswith(text):
                    return f"wrong text before the error: {text[-80:]!r}"
                return f"{'error' if last else 'refused'}:{error['code']}"
            last = payload
            text += content_of(payload)
            call.pieces += bool(content_of(payload))
            finished = finished or '"finish_reason":"' in payload
        if last != "[DONE]" or not finished:
            return f"silently cut after {text[-40:]!r}"
        return "whole" if expected in (None, text) else f"wrong text: {text[-80:]!r}"

    return Call(wait)


def polls(timeout_s: float, interval_s: float = 0.005) -> Iterator[None]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        yield
        time.sleep(interval_s)

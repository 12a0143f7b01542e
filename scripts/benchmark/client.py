"""The load: a process that answers every plan on stdin with one line of JSON.

While a plan runs it only reads sockets and notes the time; what it read is made
sense of afterwards, so that it takes as little as possible from the servers with
which it shares the cores.
"""

from __future__ import annotations

import selectors
import socket
import sys
import time

import msgspec

from benchmark.plan import Answer, Plan, Reply, Request
from benchmark.wire import Recording, read_answer

_PATH = "/v1/chat/completions"
_END = b"data: [DONE]"


class _Exchange:
    """One request and the recording of its answer."""

    def __init__(self, request: Request, port: int) -> None:
        self.request = request
        self.recording: Recording = []
        self.sent = 0.0
        self.started = False
        self.ended = False
        self.error = ""
        body = msgspec.json.encode(request.body)
        self._data = (
            f"POST {_PATH} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            + "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
            + "\r\n"
        ).encode() + body
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, began: float) -> None:
        self.started = True
        self.sent = time.monotonic() - began
        self.socket.sendall(self._data)

    def receive(self, began: float) -> None:
        try:
            data = self.socket.recv(1 << 16)
        except OSError as error:
            self.error = f"the connection broke: {error}"
            data = b""
        if not data:
            self.ended = True
            return
        self.recording.append((time.monotonic() - began, data))
        # The line may be cut in two; then the server's end of file ends the answer.
        self.ended = _END in data[-64:]

    def answer(self, *, want_text: bool) -> Answer:
        limit = self.request.body["max_tokens"]
        answer = read_answer(self.sent, self.recording, limit, want_text=want_text)
        answer.error = self.error or answer.error
        return answer


def run(plan: Plan) -> list[Answer]:
    """Raises OSError when the server takes no connection."""
    exchanges = [_Exchange(request, plan.port) for request in plan.requests]
    awaited = exchanges if plan.until is None else [exchanges[plan.until]]
    with selectors.DefaultSelector() as selector:
        began = time.monotonic()
        deadline = began + plan.timeout_s
        for exchange in exchanges:
            selector.register(exchange.socket, selectors.EVENT_READ, exchange)
            if exchange.request.after_reads is None:
                exchange.send(began)
        while not all(exchange.ended for exchange in awaited):
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                for exchange in exchanges:
                    if not exchange.ended:
                        exchange.error = f"no end after {plan.timeout_s:.0f} s"
                break
            for key, _ in ready:
                exchange = key.data
                exchange.receive(began)
                if exchange.ended:
                    selector.unregister(exchange.socket)
            reads = len(exchanges[0].recording)
            for exchange in exchanges:
                after = exchange.request.after_reads
                if not exchange.started and after is not None:
                    if reads >= after:
                        exchange.send(began)
                    elif exchanges[0].ended:
                        exchange.ended, exchange.error = True, "the first answer ended too soon"
    for exchange in exchanges:
        exchange.socket.close()
    return [exchange.answer(want_text=plan.want_text) for exchange in exchanges]


def main() -> None:
    decode = msgspec.json.Decoder(Plan).decode
    for line in sys.stdin.buffer:
        plan = decode(line)
        try:
            answers = run(plan)
        except OSError as error:
            answers = [Answer(error=f"cannot connect: {error}") for _ in plan.requests]
        sys.stdout.buffer.write(msgspec.json.encode(Reply(answers)) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

"""Kills a model's worker under a stream, and times how long its client waits for what comes next.

    PYTHONPATH=.:scripts .venv/bin/python scripts/recovery.py [MODEL.gguf] [--kills 20]
        [--after 5] [--llama-server BINARY]

Here the next thing is the stream's next token, with a spare worker and without one, the canary
included; the worker dies after so many tokens. llama-server's router loses the stream: there it is
the first token of a new one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
from benchmark.children import Player, running
from benchmark.contenders import MODEL, Setup
from benchmark.peers import LlamaRouter
from demo_model import demo_model

from tests.support.server import Server, polls, serve

SETTINGS = {"OPTA_LMX_FAILURE_THRESHOLD": "1000000", "OPTA_LMX_RESTART_DELAY_CAP_S": "0.01"}
#: Between two kills, for the machine to come to rest.
REST_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--after", type=int, default=5)
    parser.add_argument("--llama-server", type=Path)
    arguments = parser.parse_args()
    model = (arguments.model or demo_model()).absolute()
    for spares in (1, 0):
        with tempfile.TemporaryDirectory() as home:
            settings = {**SETTINGS, "OPTA_LMX_WARM_SPARES": str(spares)}
            with serve(Path(home) / "home", **settings) as server:
                server.load(MODEL, path=str(model)).raise_for_status()
                name = "a spare worker" if spares else "no spare worker"
                show(name, [ours(server, spares, arguments.after) for _ in range(arguments.kills)])
    if arguments.llama_server is not None:
        setup = Setup(model=model, threads=2, sequences=1, context=8192, pool=8192)
        router = LlamaRouter(arguments.llama_server)
        client = Player("client")
        with running(client.child), router.run(setup, client) as instance:
            [gateway] = instance.gateway
            show("llama-server router", [theirs(gateway) for _ in range(arguments.kills)])


def ours(server: Server, spares: int, after: int) -> float:
    """Seconds from the kill to the stream's next token."""
    for _ in polls():
        found = server.http.get("/admin/models").json()["spares"]
        if sum(spare["ready"] for spare in found) == spares:
            break
    time.sleep(REST_S)
    body = _body(max_tokens=after + 24)
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        tokens = _tokens(answer)
        for _ in range(after):
            next(tokens)
        killed_at = time.monotonic()
        server.kill_worker(MODEL, signal.SIGSEGV)
        next(tokens)
        took_s = time.monotonic() - killed_at
        for _ in tokens:
            pass
    return took_s


def theirs(gateway: int) -> float:
    """Seconds from the kill of the router's child to the first token of a new stream."""
    time.sleep(REST_S)
    process = psutil.Process(gateway)
    [port] = {c.laddr.port for c in process.net_connections() if c.status == "LISTEN"}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    killed_at = time.monotonic()
    os.kill(process.children()[-1].pid, signal.SIGSEGV)
    while True:
        try:
            with httpx.stream("POST", url, json=_body(max_tokens=2), timeout=60) as answer:
                if answer.status_code == 200 and next(_tokens(answer), None) is not None:
                    return time.monotonic() - killed_at
        except httpx.HTTPError:
            pass
        time.sleep(0.01)


def _body(max_tokens: int) -> dict[str, object]:
    message = {"role": "user", "content": "Count as far as you can."}
    return {
        **{"model": MODEL, "messages": [message], "stream": True, "temperature": 0},
        "max_tokens": max_tokens,
    }


def _tokens(answer: httpx.Response) -> Iterator[str]:
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            for choice in chunk.get("choices", []):
                if text := choice["delta"].get("content"):
                    yield text


def show(name: str, seconds: list[float]) -> None:
    p95 = statistics.quantiles(seconds, n=20)[-1]
    print(
        f"{name:20} p50 {statistics.median(seconds):.3f} s, p95 {p95:.3f} s ({len(seconds)} kills)",
        flush=True,
    )


if __name__ == "__main__":
    main()

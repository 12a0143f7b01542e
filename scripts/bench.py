"""What the whole stack costs: one stream through the server ÷ the same backend in a bare loop.

Both sides run the same model with the same threads, prompt and number of tokens,
in turns within one run, since a shared machine changes its speed from minute to
minute. The bare side is the backend's own `admit` and `step` in a process without
server, sockets or text. Tokens per second are compared over the decode phase, from
the first token to the last; CPU time is that of the processes that serve.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from demo_model import demo_model

#: What the last chunk of an answer has, wherever the packets are cut.
_END = b'finish_reason":"length'

PROMPT = "Tell me a long story about a lighthouse keeper and the sea."


@dataclass(frozen=True)
class Sample:
    """One answer. ``cpu_s`` is the CPU time of everything that produced it."""

    tokens: int
    decode_s: float
    first_token_s: float
    cpu_s: float
    gateway_cpu_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return (self.tokens - 1) / self.decode_s

    @property
    def cpu_us_per_token(self) -> float:
        return self.cpu_s / self.tokens * 1e6


def main() -> None:
    arguments = _parse()
    if arguments.bare:
        _run_bare(arguments)
        return
    model = arguments.model or demo_model()
    with _bare(arguments, model) as bare, _server(arguments, model) as stack:
        for measure in (bare, stack):
            measure()
        samples = [(bare(), stack()) for _ in range(arguments.rounds)]
    _report([b for b, _ in samples], [s for _, s in samples])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="GGUF file or MLX folder (the demo model)")
    parser.add_argument("--tokens", type=int, default=200, help="per answer")
    parser.add_argument("--rounds", type=int, default=9, help="answers of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


class _Measure:
    """A side of the comparison: call it for one answer."""

    def __call__(self) -> Sample:
        raise NotImplementedError


# --- the backend in a bare loop ---------------------------------------------------


class _Bare(_Measure):
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self) -> Sample:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Sample(**json.loads(self._process.stdout.readline()))


@contextmanager
def _bare(arguments: argparse.Namespace, model: Path) -> Iterator[_Measure]:
    command = [sys.executable, __file__, "--bare", f"--model={model}"]
    command += [f"--tokens={arguments.tokens}", f"--threads={arguments.threads}"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield _Bare(process)
        process.terminate()


def _run_bare(arguments: argparse.Namespace) -> None:
    """The child: one answer and one line of JSON for every line on stdin."""
    from protocol.messages import ChatMessage, Load, Sampling
    from worker.backends import create_backend
    from worker.backends.base import SequenceSpec

    backend = create_backend("mlx" if arguments.model.is_dir() else "llama")
    backend.load(Load(path=str(arguments.model), threads=arguments.threads), lambda _: None)
    prompt = backend.encode_chat([ChatMessage("user", PROMPT)])
    for number, _ in enumerate(sys.stdin):
        spec = SequenceSpec(
            sequence_id=number,
            prompt=prompt,
            max_tokens=arguments.tokens,
            sampling=Sampling(temperature=0.7, seed=number),
            ignore_eos=True,
        )
        cpu, started = time.process_time(), time.monotonic()
        backend.admit(spec)
        while not backend.step():
            pass
        first = time.monotonic()
        tokens = 1
        while tokens < arguments.tokens:
            tokens += len(backend.step())
        ended = time.monotonic()
        sample = {
            "tokens": tokens,
            "decode_s": ended - first,
            "first_token_s": first - started,
            "cpu_s": time.process_time() - cpu,
        }
        print(json.dumps(sample), flush=True)


# --- the whole stack ----------------------------------------------------------------


class _Stack(_Measure):
    def __init__(self, port: int, supervisor_pid: int, tokens: int) -> None:
        self._port = port
        self._tokens = tokens
        self._supervisor = psutil.Process(supervisor_pid)
        (self._worker,) = self._supervisor.children()
        self._seed = 0

    def __call__(self) -> Sample:
        body = {
            "model": "bench",
            "stream": True,
            "messages": [{"role": "user", "content": PROMPT}],
            "temperature": 0.7,
            "seed": self._seed,
            "max_tokens": self._tokens,
            "ignore_eos": True,
        }
        self._seed += 1
        worker, gateway = _cpu_s(self._worker), _cpu_s(self._supervisor)
        first = ended = 0.0
        with socket.create_connection(("127.0.0.1", self._port), timeout=120) as connection:
            started = time.monotonic()
            connection.sendall(_request(json.dumps(body).encode()))
            # The client does as little as it can: it shares the cores with the server.
            tail = b""
            while data := connection.recv(65536):
                data = tail + data
                tail = data[-len(_END) :]
                if not first and b'"content":"' in data and b'"role"' not in data:
                    first = time.monotonic()
                if _END in data:
                    ended = time.monotonic()
                    break
        if not ended:
            raise SystemExit("the server gave no whole answer")
        gateway = _cpu_s(self._supervisor) - gateway
        return Sample(
            tokens=self._tokens,
            decode_s=ended - first,
            first_token_s=first - started,
            cpu_s=_cpu_s(self._worker) - worker + gateway,
            gateway_cpu_s=gateway,
        )


@contextmanager
def _server(arguments: argparse.Namespace, model: Path) -> Iterator[_Measure]:
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "supervisor.cli", "serve", "--port=0", f"--home={home}"]
        command += [f"--model=bench={model}", f"--threads={arguments.threads}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            port = 0
            for line in process.stdout:
                if found := re.search(r"server +http://127\.0\.0\.1:(\d+)", line):
                    port = int(found[1])
                    break
            else:
                raise SystemExit("the server did not get ready")
            yield _Stack(port, process.pid, arguments.tokens)
            process.terminate()


def _request(body: bytes) -> bytes:
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _report(bare: list[Sample], stack: list[Sample]) -> None:
    def medians(samples: list[Sample], name: str) -> float:
        return statistics.median(float(getattr(sample, name)) for sample in samples)

    print(f"{len(bare)} answers of {bare[0].tokens} tokens each, medians; ratio of pairs")
    print(f"{'':24}{'bare':>12}{'stack':>12}{'stack/bare':>12}")
    for title, name, scale in (
        ("tokens/s", "tokens_per_s", 1.0),
        ("CPU µs/token", "cpu_us_per_token", 1.0),
        ("first token ms", "first_token_s", 1e3),
    ):
        ratio = statistics.median(
            getattr(s, name) / getattr(b, name) for b, s in zip(bare, stack, strict=True)
        )
        print(
            f"{title:24}{medians(bare, name) * scale:12.1f}"
            f"{medians(stack, name) * scale:12.1f}{ratio:12.3f}"
        )
    # The kernel counts in hundredths of a second: only the sum says something.
    gateway = sum(s.gateway_cpu_s for s in stack) / sum(s.tokens for s in stack) * 1e6
    print(f"{'of it supervisor, µs':24}{'':12}{gateway:12.1f}")


if __name__ == "__main__":
    main()

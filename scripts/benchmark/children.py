"""Child processes that end with the benchmark, whatever ends it."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from benchmark.plan import Answer, Failed, Plan, Reply

#: Loading a model takes as long as it takes; this is for one that never gets ready.
READY_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 15.0
_SCRIPTS = Path(__file__).resolve().parents[1]


class Child:
    """A process in a group of its own; what it prints goes to a file."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        talks: bool = False,
    ) -> None:
        """With ``talks`` stdin and stdout are pipes, and only stderr goes to the file."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop)
        pipe = subprocess.PIPE if talks else None
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=pipe or subprocess.DEVNULL,
            stdout=pipe or self._log,
            stderr=self._log,
            env={**_environment(), **(environment or {})},
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        """All it has printed so far."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def check(self) -> None:
        """Raise ``Failed`` with its last words when it has ended."""
        if self.process.poll() is not None:
            lines = [line for line in self.log().splitlines() if line.strip()]
            said = " | ".join(lines[-3:])
            raise Failed(f"ended with code {self.process.returncode}: {said}"[:600])

    def await_line(self, pattern: str) -> str:
        """Wait until it has printed a line that begins like this; return the line."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if found := re.search(rf"^(?:{pattern}).*$", self.log(), re.MULTILINE):
                return found[0]
            self.check()
            time.sleep(0.05)
        raise Failed(f"not ready after {READY_TIMEOUT_S:.0f} s")

    def stop(self) -> None:
        """End it and its group: first politely, then not."""
        # macOS denies the signal to a group of which only the dead are left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_TIMEOUT_S)
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self._log):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@contextlib.contextmanager
def running(child: Child) -> Iterator[Child]:
    try:
        yield child
    finally:
        child.stop()


class Player:
    """A child of ours that answers plans: the client, or the bare backend."""

    def __init__(self, module: str, *arguments: str) -> None:
        self.child = Child(
            [sys.executable, "-P", "-m", f"benchmark.{module}", *arguments],
            environment={"PYTHONPATH": str(_SCRIPTS)},
            talks=True,
        )
        self._buffer = b""

    def await_ready(self) -> None:
        self._read_line(READY_TIMEOUT_S)

    def play(self, plan: Plan) -> list[Answer]:
        """Raises ``Failed`` when it does not answer, or one of the answers is an error."""
        assert self.child.process.stdin is not None
        self.child.check()
        self.child.process.stdin.write(msgspec.json.encode(plan) + b"\n")
        self.child.process.stdin.flush()
        # Reading the recordings takes a while after the plan's own time.
        line = self._read_line(plan.timeout_s + 60)
        answers = msgspec.json.decode(line, type=Reply).answers
        for answer in answers:
            if answer.error:
                raise Failed(answer.error[:600])
        return answers

    def _read_line(self, timeout_s: float) -> bytes:
        assert self.child.process.stdout is not None
        fd = self.child.process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                # What it says later would be taken for the next plan's answer.
                self.child.stop()
                raise Failed(f"no answer after {timeout_s:.0f} s")
            data = os.read(fd, 1 << 20)
            if not data:
                self.child.process.wait(_STOP_TIMEOUT_S)
                self.child.check()
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _environment() -> dict[str, str]:
    """Ours without what would change a server's settings or its imports."""
    drop = ("OPTA_LMX_", "LLAMA_ARG_", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if not name.startswith(drop)}

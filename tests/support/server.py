"""A real server in a process of its own, as an operator starts it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from worker.faults import FAULTS_ENV

#: No test asks a hub beyond this machine: nobody listens there.
NO_HUB = "http://127.0.0.1:9"

#: Spare workers are there where a test is about them: others count the workers.
_SURROUNDINGS = {
    "PYTHONUNBUFFERED": "1",
    FAULTS_ENV: "1",
    "OPTA_LMX_HUB_ENDPOINT": NO_HUB,
    "OPTA_LMX_WARM_SPARES": "0",
}

#: Longest that a server may take to listen, a model to load, a state to come.
TIMEOUT_S = 60.0

#: For a request whose answer ends with its worker.
NO_RESUME = {"X-Resume": "never"}


class Server:
    """A running ``opta-lmx serve``; everything it prints is kept in ``output``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.output: list[str] = []
        self._listening = threading.Event()
        self._url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._listening.wait(TIMEOUT_S) or not self._url:
            process.kill()
            raise AssertionError(f"the server does not listen:\n{self.text}")
        self.http = httpx.Client(base_url=self._url, timeout=TIMEOUT_S)

    @property
    def url(self) -> str:
        return self._url

    @property
    def text(self) -> str:
        return "".join(self.output)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if not self._url and (found := re.search(r"listening on (http://\S+)", line)):
                self._url = found[1]
                self._listening.set()
        self._listening.set()

    def load(self, model_id: str, **options: object) -> httpx.Response:
        return self.http.post("/admin/models/load", json={"model_id": model_id, **options})

    def model(self, model_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/admin/models/{model_id}")
        assert answer.status_code == 200, answer.text
        view: dict[str, Any] = answer.json()
        return view

    def await_tracked(self, model_id: str) -> None:
        """Poll until the model is known, as one that is to be loaded at the start."""
        for _ in polls():
            if self.http.get(f"/admin/models/{model_id}").status_code == 200:
                return
        raise AssertionError(f"{model_id} is never tracked:\n{self.text}")

    def await_state(
        self, model_id: str, state: str, *, generation: int = 0, timeout_s: float = TIMEOUT_S
    ) -> dict[str, Any]:
        """Poll until the model is in ``state``, in at least this generation.

        A model that is to be loaded at the start is known only once its turn comes.
        """
        view: dict[str, Any] = {}
        for _ in polls(timeout_s):
            answer = self.http.get(f"/admin/models/{model_id}")
            view = answer.json()
            if answer.status_code != 200:
                continue
            if view["readiness"]["state"] == state and view["generation"] >= generation:
                return view
        raise AssertionError(f"{model_id} is not {state}: {view}\n{self.text}")

    def await_text(self, part: str) -> None:
        """Poll until it was printed: what a server says arrives after what it answers."""
        for _ in polls(10):
            if part in self.text:
                return
        raise AssertionError(f"{part!r} is never printed:\n{self.text}")

    def chat(self, model_id: str, content: str = "Hi", **options: object) -> httpx.Response:
        return self.http.post(
            "/v1/chat/completions",
            json={
                "model": model_id,
                "messages": [{"role": "user", "content": content}],
                **options,
            },
        )

    def stream(
        self,
        model_id: str,
        content: str = "Hi",
        headers: dict[str, str] | None = None,
        **options: object,
    ) -> Iterator[str]:
        """The ``data:`` payloads of a streamed answer, as they arrive."""
        body = {
            "model": model_id,
            "stream": True,
            "messages": [{"role": "user", "content": content}],
            **options,
        }
        url = "/v1/chat/completions"
        with self.http.stream("POST", url, json=body, headers=headers or {}) as answer:
            if answer.status_code != 200:
                raise AssertionError(answer.read().decode())
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield line.removeprefix("data: ")

    def kill_worker(self, model_id: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to the model's worker; returns its pid."""
        pid = int(self.model(model_id)["pid"])
        os.kill(pid, number)
        return pid

    def workers(self) -> list[psutil.Process]:
        """The workers, and what they have started; not the janitor."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.cmdline()[-1:] == ["worker"]:
                    found += [child, *child.children(recursive=True)]
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(TIMEOUT_S)
        self.close()
        return status

    def close(self) -> None:
        """Give back what this side holds, once the process is gone."""
        self._reader.join(TIMEOUT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.http.close()


def polls(timeout_s: float = TIMEOUT_S, interval_s: float = 0.02) -> Iterator[None]:
    """Come back until the time is up; for states that only polling can see."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        yield
        time.sleep(interval_s)


def await_gone(pids: list[int], timeout_s: float = 10.0) -> None:
    """Wait until none of the processes exists; a zombie counts as gone."""
    for _ in polls(timeout_s):
        if not any(alive(pid) for pid in pids):
            return
    raise AssertionError(f"still there: {[pid for pid in pids if alive(pid)]}")


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def text_of(payloads: list[str]) -> str:
    """The content of a streamed chat answer."""
    chunks = [json.loads(payload) for payload in payloads if payload != "[DONE]"]
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks
        for choice in chunk.get("choices", [])
    )


def write_script(folder: Path, name: str, **script: object) -> Path:
    """A model for the simulated backend."""
    path = folder / f"{name}.sim.json"
    path.write_text(json.dumps(script))
    return path


@contextmanager
def serve(home: Path, *arguments: str, patch: str = "", **environment: str) -> Iterator[Server]:
    """Run a server until the block ends; nothing of it outlives the block."""
    process = start(home, *arguments, patch=patch, **environment)
    server = Server(process)
    try:
        yield server
    finally:
        if process.poll() is None:
            pids = [worker.pid for worker in server.workers()]
            server.stop()
            await_gone(pids)
        else:
            server.close()


def start(
    home: Path, *arguments: str, port: str = "0", patch: str = "", **environment: str
) -> subprocess.Popen[str]:
    """Start ``opta-lmx serve`` on a free port with its state in ``home``.

    ``patch`` is Python that runs in the server first, to break what can't be broken from here.
    """
    program = ["-m", "supervisor.cli"]
    if patch:
        program = ["-c", f"{patch}\nfrom supervisor.cli import main\nmain()\n"]
    return subprocess.Popen(
        [
            sys.executable,
            *(*program, "serve", "--port", port, "--home", str(home)),
            *("--enable-simulated", *arguments),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **_SURROUNDINGS, **environment},
    )

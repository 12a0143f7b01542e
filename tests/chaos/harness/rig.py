"""The server under test: its own home, short deadlines, bystanders' models loaded."""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from supervisor.footprint import footprint_bytes
from tests.chaos.harness.observe import (
    COUNTING_SCRIPT,
    GREEDY,
    GREEDY_PROMPT,
    Bystander,
    CountingBystander,
    GreedyBystander,
)
from tests.chaos.harness.wire import chat_body, content_of, polls, stream
from tests.support.server import Server, start, write_script
from worker.faults import BOOT_FAULTS_ENV

#: In the environment of everything that a rig starts, also of what its supervisor lost.
MARKER = "CHAOS_RUN"

SHORT = {
    "OPTA_LMX_START_TIMEOUT_S": "3",
    "OPTA_LMX_LOAD_STALL_S": "2",
    "OPTA_LMX_CANARY_TIMEOUT_S": "8",
    "OPTA_LMX_PREFILL_STALL_S": "2",
    "OPTA_LMX_DECODE_STALL_S": "2",
    "OPTA_LMX_BEAT_INTERVAL_S": "0.1",
    "OPTA_LMX_BEAT_TIMEOUT_S": "2",
    "OPTA_LMX_STOP_GRACE_S": "1",
    "MLX_DISABLE_COMPILE": "1",
}
#: Real libraries take their time to be imported, longer on a busy machine; and a part of a
#: prompt takes up to two seconds (``worker.backends.prefill_pace``), as fast as it was before.
SHORT_REAL = {
    **SHORT,
    "OPTA_LMX_START_TIMEOUT_S": "10",
    "OPTA_LMX_LOAD_STALL_S": "5",
    "OPTA_LMX_PREFILL_STALL_S": "8",
}

NO_SETTINGS: Mapping[str, str] = {}

REAL_BACKENDS = ("llama", "mlx")
CONTEXT = 8192

#: From SIGTERM to the end of the server.
STOP_LIMIT_S = 20.0


class Rig:
    """A running server. ``folder`` holds scripts and models, ``home`` its state."""

    def __init__(
        self, folder: Path, settings: Mapping[str, str], *, real: bool, with_python: str = ""
    ) -> None:
        self.folder = folder
        #: See ``new_rig``.
        self.shim_file = folder / "shim"
        self.home = folder / "home"
        self.boot_faults = folder / "boot-faults.json"
        self.real = real
        self.marker = uuid.uuid4().hex
        self._settings = {**(SHORT_REAL if real else SHORT), **settings}
        if with_python:
            (folder / "path").mkdir()
            program = with_python.format(path=str(self.shim_file))
            (folder / "path" / "sitecustomize.py").write_text(program)
            self._settings["PYTHONPATH"] = str(folder / "path")
        self.server = self._start()
        self._answers: dict[tuple[str, str], str] = {}

    def _start(self) -> Server:
        environment = {MARKER: self.marker, BOOT_FAULTS_ENV: str(self.boot_faults)}
        return Server(
            start(
                self.home,
                *("--models-dir", str(self.folder), "--threads", "1"),
                **{**self._settings, **environment},
            )
        )

    def restart(self) -> None:
        """Start again on the same home, after the end of the first process."""
        self.server = self._start()

    @property
    def port(self) -> int:
        return int(self.server.url.rsplit(":", 1)[1])

    @property
    def pid(self) -> int:
        return self.server.process.pid

    # --- models ---

    def script(self, name: str, **script: object) -> None:
        write_script(self.folder, name, **script)

    def load_bystanders(self) -> None:
        self.script("bystander", **COUNTING_SCRIPT)
        self.must_load("bystander")
        for kind in REAL_BACKENDS if self.real else ():
            self.must_load(f"bystander-{kind}", path=str(self.model_file(kind)))

    def must_load(self, model_id: str, **options: object) -> None:
        """Load it. Raises ``RuntimeError`` if that fails."""
        answer = self.server.load(model_id, **options)
        if answer.status_code != 200:
            raise RuntimeError(f"{model_id} does not load: {answer.text}\n{self.server.text}")

    def model_file(self, kind: str) -> Path:
        """A tiny model, sound or with the named flaw; made when it is first asked for."""
        from tests.support.tiny_gguf import write_tiny_gguf
        from tests.support.tiny_mlx import write_tiny_mlx

        backend, _, flaw = kind.partition("-")
        path = self.folder / "made" / (f"{kind}.gguf" if backend == "llama" else kind)
        if path.exists():
            return path
        path.parent.mkdir(exist_ok=True)
        match backend, flaw:
            case "llama", "":
                write_tiny_gguf(path, context_length=CONTEXT)
            case "llama", "nan":
                write_tiny_gguf(path, flaw="nan")
            case "llama", "shapes":
                write_tiny_gguf(path, extra_embedding_rows=7)
            case "llama", "abort":
                # More layers than llama.cpp has room for: its assertion aborts.
                _patch(write_tiny_gguf(path), "llama.block_count", 600)
            case "mlx", "":
                write_tiny_mlx(path, context_length=CONTEXT)
            case "mlx", "nan":
                write_tiny_mlx(path, flaw="nan")
            case _:
                raise ValueError(kind)
        return path

    def answer_of(self, kind: str, prompt: str, **options: object) -> str:
        """What a sound real model answers greedily, from the bystander of its backend."""
        key = (kind, prompt + str(options))
        if key not in self._answers:
            body = chat_body(f"bystander-{kind}", prompt, **options)
            self._answers[key] = "".join(map(content_of, stream(self.port, body)))
        return self._answers[key]

    def bystanders(self, victim: str) -> list[Bystander]:
        """Start a client of every healthy model but those of the victim's backend."""
        kinds = [k for k in REAL_BACKENDS if self.real and not victim.startswith(k)]
        expected = {kind: self.answer_of(kind, GREEDY_PROMPT, **GREEDY) for kind in kinds}
        return [
            CountingBystander(self.port, "bystander"),
            *(GreedyBystander(self.port, f"bystander-{k}", expected[k]) for k in kinds),
        ]

    # --- processes ---

    @property
    def calm_processes(self) -> int:
        """How many processes there are when no victim is loaded."""
        # The supervisor, its janitor and a bystander.
        return 3 + (len(REAL_BACKENDS) if self.real else 0)

    def surplus(self, expected: int, *, timeout_s: float = 5.0) -> int:
        """How many processes more than ``expected`` there still are when the time is up."""
        for _ in polls(timeout_s, 0.05):
            if len(self.processes()) <= expected:
                return 0
        return max(0, len(self.processes()) - expected)

    def memory_mb(self) -> float:
        """Of all of them together: their proportional set sizes."""
        sizes = (footprint_bytes(process.pid) for process in self.processes())
        return sum(size or 0 for size in sizes) / 1e6

    def last_words(self) -> str:
        """For a server that has ended, how; and the last that was heard of it."""
        status = self.server.process.poll()
        ended = "" if status is None else f"the server exited with {status}; "
        return ended + " ".join("".join(self.server.output[-3:]).split())

    def kill_strays(self) -> None:
        """End what the server does not know any more, so that it is counted once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            known = {self.pid, *(c.pid for c in psutil.Process(self.pid).children(recursive=True))}
            for process in self.processes():
                if process.pid not in known:
                    process.kill()

    def processes(self) -> list[psutil.Process]:
        """Everything alive that this rig, or what it started, has started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARKER) == self.marker and _is_alive(process):
                    found.append(process)
        return found

    def close(self) -> None:
        """Stop it and leave nothing behind. Raises ``RuntimeError`` if it does not stop."""
        process = self.server.process
        try:
            if process.poll() is None:
                process.terminate()
                process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            last = "".join(self.server.output[-5:])
            raise RuntimeError(
                f"the server does not stop within {STOP_LIMIT_S:.0f} s of SIGTERM: {last}"
            ) from None
        finally:
            for stray in self.processes():
                with contextlib.suppress(psutil.Error):
                    stray.kill()
            process.wait()
            self.server.close()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _patch(path: Path, key: str, value: int) -> None:
    """Overwrite a 32-bit metadata value of a GGUF."""
    content = path.read_bytes()
    name = struct.pack("<Q", len(key)) + key.encode()
    at = content.index(name) + len(name) + 4
    path.write_bytes(content[:at] + struct.pack("<I", value) + content[at + 4 :])


@contextlib.contextmanager
def new_rig(
    *,
    real: bool = False,
    prepare: Callable[[Path], contextlib.AbstractContextManager[None]] | None = None,
    settings: Mapping[str, str] = NO_SETTINGS,
    with_python: str = "",
) -> Iterator[Rig]:
    """A rig in a temporary folder, with its bystanders' models loaded.

    ``prepare`` is given the home before the server starts, and ended after it. All its
    Pythons run ``with_python`` first, in which ``{path}`` is the rig's ``shim_file``.
    """
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        if prepare is not None:
            (folder / "home").mkdir(mode=0o700)
            stack.enter_context(prepare(folder / "home"))
        rig = Rig(folder, settings, real=real, with_python=with_python)
        stack.callback(rig.close)
        rig.load_bystanders()
        yield rig

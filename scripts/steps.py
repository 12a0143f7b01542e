"""What the set-up steps share: where things are kept, locks, and commands with live progress."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"

_REPORT_EVERY_SECONDS = 5.0
_TAIL_LINES = 30


class StepError(Exception):
    """A set-up step failed; the message is for the user."""


def say(message: str) -> None:
    """Tell the user; standard output is left to results."""
    print(message, file=sys.stderr, flush=True)


def cache_dir() -> Path:
    """The folder for what can be made again: wheels, logs, converted models."""
    if chosen := os.environ.get("OPTA_LMX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "opta-lmx"


@contextmanager
def exclusive(path: Path, waiting: str) -> Iterator[None]:
    """Hold the lock file `path`; say `waiting` once when another process holds it.

    The kernel drops the lock with its holder, so none is ever left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(waiting)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def requirement(name: str, lock: Path) -> str:
    """The pinned and hashed block of one distribution in a lock file."""
    return "".join(line for owner, line in _owned_lines(lock) if owner == name)


def requirements_without(name: str, lock: Path) -> str:
    """A lock file's text less the block of one distribution."""
    return "".join(line for owner, line in _owned_lines(lock) if owner != name)


def _owned_lines(lock: Path) -> Iterator[tuple[str, str]]:
    owner = ""
    for line in lock.read_text().splitlines(keepends=True):
        if not line[0].isspace():
            owner = line.partition("==")[0]
        yield owner, line


def run(
    label: str,
    command: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    detail: Callable[[str], str | None] = lambda line: None,
) -> None:
    """Run a command with its output in `log`, reporting every few seconds.

    `detail` picks out of an output line what to show in the next report.
    Raises StepError, with the end of the log already shown, when it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    shown = ""

    with (
        log.open("w") as sink,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **(env or {})},
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None

        def drain(lines: Iterator[str]) -> None:
            nonlocal shown
            for line in lines:
                sink.write(line)
                tail.append(line)
                shown = detail(line) or shown

        reader = threading.Thread(target=drain, args=(process.stdout,))
        reader.start()
        try:
            while True:
                reader.join(_REPORT_EVERY_SECONDS)
                if not reader.is_alive():
                    break
                say(f"  {label}: {_clock(started)}{', ' + shown if shown else ''}")
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
        finally:
            reader.join()
    if process.returncode:
        say("".join(tail).rstrip())
        raise StepError(f"{label} failed (exit code {process.returncode}); the whole log is {log}")


def _clock(started: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    return f"{minutes}:{seconds:02d}"

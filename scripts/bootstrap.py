"""Brings .venv up to date; called by scripts/setup with a Python >= 3.11.

Each part is stamped with a digest of what it was made from, so that a part that
did not change is not done again.
"""

import hashlib
import json
import platform
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import llama_wheel
from steps import (
    REQUIREMENTS,
    ROOT,
    StepError,
    cache_dir,
    exclusive,
    requirements_without,
    run,
    say,
)

VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"

_LOCK = REQUIREMENTS / "lock.txt"
_STAMP = VENV / "opta-lmx-setup.json"


def main() -> None:
    with exclusive(cache_dir() / "setup.lock", "Another set-up is at work; waiting for it ..."):
        done = _read_stamp()
        for name, digest, install in _parts():
            if done.get(name) == digest:
                continue
            install()
            done[name] = digest
            _write_stamp(done)


def _parts() -> list[tuple[str, str, Callable[[], None]]]:
    """The parts in order: name, digest of what each is made from, how to make it."""
    interpreter = _digest(sys.base_prefix, platform.python_version())
    return [
        ("environment", interpreter, _make_environment),
        ("dependencies", _digest(interpreter, _LOCK.read_text()), _install_dependencies),
        ("llama", _digest(interpreter, llama_wheel.home().name), _install_llama),
        (
            "project",
            _digest(interpreter, (ROOT / "pyproject.toml").read_text()),
            _install_project,
        ),
    ]


def _make_environment() -> None:
    say(f"Making .venv with Python {platform.python_version()} ...")
    # What another Python left behind must go; a Python can't clear its own home.
    clear = ["--clear"] if Path(sys.prefix).resolve() != VENV else []
    _run("environment", [sys.executable, "-m", "venv", *clear, VENV])


def _install_dependencies() -> None:
    say("Installing the locked dependencies ...")
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "lock.txt"
        wanted.write_text(requirements_without(llama_wheel.DISTRIBUTION, _LOCK))
        _pip("dependencies", "--require-hashes", "-r", wanted)


def _install_llama() -> None:
    wheel = llama_wheel.wheel()
    say(f"Installing {wheel.name} ...")
    _pip("llama", "--no-deps", "--force-reinstall", "--no-index", wheel)
    _run("llama-cpp-python's first import", [PYTHON, "-c", "import llama_cpp"])


def _install_project() -> None:
    say("Installing opta-lmx ...")
    _pip("opta-lmx", "--no-deps", "--no-build-isolation", "--no-index", "--editable", ROOT)


def _pip(label: str, *arguments: str | Path) -> None:
    _run(label, [PYTHON, "-m", "pip", "install", *arguments])


def _run(label: str, command: list[str | Path]) -> None:
    name = re.sub(r"\W+", "-", label)
    run(label, command, log=cache_dir() / "logs" / f"setup-{name}.log", detail=_pip_progress)


def _pip_progress(line: str) -> str | None:
    if download := re.match(r"\s*Downloading (\S+)", line):
        return f"downloading {download[1].rpartition('/')[2]}"
    return "installing" if line.startswith("Installing collected packages") else None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read_stamp() -> dict[str, str]:
    if not PYTHON.exists():
        return {}
    try:
        stamp = json.loads(_STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _write_stamp(done: dict[str, str]) -> None:
    fresh = _STAMP.with_suffix(".tmp")
    fresh.write_text(json.dumps(done, indent=1))
    fresh.replace(_STAMP)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        main()
    except StepError as error:
        sys.exit(f"setup: {error}")
    except KeyboardInterrupt:
        sys.exit("setup: interrupted; run it again to go on")
    except OSError as error:
        sys.exit(f"setup: {error}")

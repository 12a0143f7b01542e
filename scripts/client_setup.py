"""Installs a client that the tests drive from outside, and prints where: ``litellm`` a Python,
``node`` a folder with ``node_modules``.

Each is pinned and hashed, and kept in the cache folder under a digest of its lock file, so
that it is installed once. Standard library only.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

from steps import REQUIREMENTS, ROOT, StepError, cache_dir, exclusive, run, say

_LITELLM_LOCK = REQUIREMENTS / "litellm.txt"
_NODE = ROOT / "tests" / "clients" / "node"
_NPM_FILES = ("package.json", "package-lock.json", ".npmrc")


def litellm() -> Path:
    """A Python that has LiteLLM. Raises StepError when it can't be installed."""
    home = _home("litellm", _LITELLM_LOCK.read_bytes(), sys.version.encode())
    # An environment names its own place, so it is made there; the mark comes last.
    mark = home / "complete"
    with exclusive(home.parent / "install.lock", "Another test client is being installed ..."):
        if not mark.exists():
            say("Installing LiteLLM for the tests ...")
            _run("litellm-environment", [sys.executable, "-m", "venv", "--clear", home])
            _run(
                "litellm",
                [
                    *(home / "bin" / "python", "-m", "pip", "install"),
                    *("--require-hashes", "-r", _LITELLM_LOCK),
                ],
            )
            mark.touch()
    return home / "bin" / "python"


def node() -> Path | None:
    """A folder with the clients that run on Node.js in its node_modules; None where that is not.

    Raises StepError when it can't be installed.
    """
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        return None
    home = _home("node", *((_NODE / name).read_bytes() for name in _NPM_FILES))
    with exclusive(home.parent / "install.lock", "Another test client is being installed ..."):
        if not home.exists():
            say("Installing clients on Node.js for the tests ...")
            with tempfile.TemporaryDirectory(prefix=".npm-", dir=home.parent) as name:
                scratch = Path(name) / "node"
                scratch.mkdir()
                for file in _NPM_FILES:
                    shutil.copy(_NODE / file, scratch)
                # Not "npm ci", which gives up over optional packages for other machines that
                # a registry does not have; what is in the lock file is checked all the same.
                options = ["--no-audit", "--no-fund", "--ignore-scripts", "--omit=optional"]
                _run("node", [npm, "install", *options, "--prefix", scratch])
                scratch.rename(home)
    return home


def _home(name: str, *parts: bytes) -> Path:
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]
    return cache_dir() / "test-clients" / f"{name}-{digest}"


def _run(label: str, command: list[str | Path]) -> None:
    run(label, command, log=cache_dir() / "logs" / f"test-client-{label}.log")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("client", choices=["litellm", "node"])
    try:
        place = {"litellm": litellm, "node": node}[parser.parse_args().client]()
    except (StepError, OSError) as error:
        sys.exit(f"test clients: {error}")
    if place is None:
        sys.exit("test clients: there is no Node.js")
    print(place)

"""What the figures were made on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def describe() -> dict[str, str]:
    described = {
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "python": sys.version.split()[0],
        "commit": _commit(),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }
    for name in ("opta-lmx", "llama-cpp-python", "mlx-lm"):
        try:
            described[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            described[name] = "not installed"
    return described


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (
        found := re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
    ):
        return found[1]
    return platform.processor()


def _commit() -> str:
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()

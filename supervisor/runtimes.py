"""Which backends this installation has, found without importing any of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from importlib import metadata
from typing import NamedTuple


class Runtime(NamedTuple):
    """Where a backend's library is found: module to look for, distribution to ask."""

    module: str
    distribution: str


RUNTIMES: Mapping[str, Runtime] = {
    "mlx": Runtime("mlx_lm", "mlx-lm"),
    "llama": Runtime("llama_cpp", "llama-cpp-python"),
}

#: The simulated backend belongs to this program; its version never changes a result.
SIMULATED_VERSION = "1"


def installed_backends(*, simulated: bool) -> dict[str, str | None]:
    """Version of every known backend, None for one that is not installed."""
    versions = {name: _version(runtime) for name, runtime in RUNTIMES.items()}
    versions["simulated"] = SIMULATED_VERSION if simulated else None
    return versions


def _version(runtime: Runtime) -> str | None:
    if importlib.util.find_spec(runtime.module) is None:
        return None
    try:
        return metadata.version(runtime.distribution)
    except metadata.PackageNotFoundError:
        return None

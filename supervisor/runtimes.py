"""Which backends this installation has, found without importing any of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from importlib import metadata
from typing import NamedTuple


class Runtime(NamedTuple):
    """Where a backend's library is found, and how its worker words its version.

    ``version`` is a pattern over the versions of ``distributions``: an engine
    that is released apart from its bindings is named after a ``+``, as PEP 440
    has it for local versions.
    """

    module: str
    distributions: tuple[str, ...]
    version: str


RUNTIMES: Mapping[str, Runtime] = {
    "mlx": Runtime("mlx_lm", ("mlx-lm", "mlx"), "{}+mlx{}"),
    "llama": Runtime("llama_cpp", ("llama-cpp-python",), "{}"),
}

#: The simulated backend belongs to this program; its version never changes a result.
SIMULATED_VERSION = "1"


def installed_backends(*, simulated: bool) -> dict[str, str | None]:
    """Version of every known backend, None for one that is not installed.

    Reads the disk: an upgrade under a running server is seen by the next call.
    """
    versions = {name: _version(runtime) for name, runtime in RUNTIMES.items()}
    versions["simulated"] = SIMULATED_VERSION if simulated else None
    return versions


def _version(runtime: Runtime) -> str | None:
    if importlib.util.find_spec(runtime.module) is None:
        return None
    try:
        return runtime.version.format(*map(metadata.version, runtime.distributions))
    except metadata.PackageNotFoundError:
        return None

"""The inference libraries a worker can host, by name.

To add one, write a module with a class that satisfies ``base.Backend`` and
register it here. Modules are imported on use: each pulls in its library.
"""

from __future__ import annotations

import importlib
from typing import cast

from protocol.errors import ErrorCode
from worker.backends.base import Backend, LoadRefused

_CLASSES = {
    "mlx": ("worker.backends.mlx", "MlxBackend"),
    "llama": ("worker.backends.llama", "LlamaBackend"),
    "simulated": ("worker.backends.simulated", "SimulatedBackend"),
}


def create_backend(name: str) -> Backend:
    """Import and construct a backend.

    Raises ``LoadRefused`` (``model_unsupported_backend``) when the name is
    unknown or its library is not installed.
    """
    if name not in _CLASSES:
        raise LoadRefused(ErrorCode.MODEL_UNSUPPORTED_BACKEND, f"unknown backend {name!r}")
    module, attribute = _CLASSES[name]
    try:
        backend = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise LoadRefused(
            ErrorCode.MODEL_UNSUPPORTED_BACKEND,
            f"backend {name!r} is not installed: {error}. "
            f"Install it with: pip install 'opta-lmx[{name}]'",
        ) from error
    return cast(Backend, backend())

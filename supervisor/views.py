"""What the outside sees of a model: plain values, encoded as they are."""

from __future__ import annotations

from typing import Literal

import msgspec


class ReadinessView(msgspec.Struct, frozen=True, kw_only=True):
    """``state`` is one of the five public states; times are epoch seconds.

    ``crash_count`` is the number of counted failures now in the window;
    ``retry_at`` is set while a restart waits for its delay; ``code`` is the
    error code of the failure that ``reason`` tells about, when there is one.
    """

    state: str
    reason: str
    crash_count: int
    updated_at: float
    retry_at: float | None = None
    code: str | None = None
    probation: bool = False


class IsolationView(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that were in flight at a crash, and run one at a time until they are cleared.

    ``pid`` is that of their own worker, and ``memory_gb`` what it holds; None where they run on
    the model's, and everybody else waits for them.
    """

    suspects: int
    pid: int | None
    memory_gb: float | None


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A tracked model, as in ``GET /admin/models/{id}``. GB is 1e9 bytes.

    ``path`` is None for a quarantine from before this start of the server, as long as
    nobody has tried to load the model again. What comes after ``isolating`` is known
    while a worker has the model loaded: ``kind`` is ``generate``, ``embed`` or ``rerank``, and
    ``dimensions`` are those of an embedding.
    """

    id: str
    path: str | None
    backend: str
    backend_version: str
    pid: int | None
    generation: int
    readiness: ReadinessView
    unloading: bool
    memory_gb: float | None
    memory_planned_gb: float | None
    loaded_at: float | None
    context_length: int | None
    request_count: int
    in_flight: int
    queued: int
    last_used_at: float | None
    keep_alive_sec: int | None
    pinned: bool
    last_incident_id: str | None
    isolating: IsolationView | None = None
    kind: str | None = None
    dimensions: int | None = None
    has_chat_template: bool | None = None
    tool_format: str | None = None
    reasoning_format: str | None = None


class BackendProbe(msgspec.Struct, frozen=True, kw_only=True):
    """How a model fared on one backend, in a worker of its own.

    ``skipped``: it was not tried, for the ``reason``. ``time_to_load_ms`` is until it could
    have taken traffic, the canary included; ``memory_gb`` what the worker was last seen to
    hold. ``code`` is the error code of what did not pass.
    """

    backend: str
    backend_version: str | None
    outcome: Literal["pass", "fail", "skipped"]
    reason: str
    code: str | None = None
    time_to_load_ms: float | None = None
    time_to_first_token_s: float | None = None
    tokens_per_s: float | None = None
    memory_gb: float | None = None


class ProbeResult(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to a probe; ``recommended`` is None when no backend passed."""

    model_id: str
    results: list[BackendProbe]
    recommended: str | None
    reason: str


class SpareView(msgspec.Struct, frozen=True, kw_only=True):
    """A worker without a model that waits for one; ``ready`` once its backend is loaded."""

    backend: str
    backend_version: str | None
    pid: int
    ready: bool
    memory_gb: float | None


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to a load that reached ``routable``."""

    success: bool
    model_id: str
    memory_after_load_gb: float | None
    time_to_load_ms: float
    readiness: ReadinessView

"""What an operator can set. ``supervisor.config`` fills it from file, environment and flags."""

from __future__ import annotations

from pathlib import Path

import msgspec

from supervisor.presets import Preset


class ModelSetting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model to load at start: a path, or an id found in the models folder."""

    path: str
    id: str | None = None
    backend: str | None = None
    context_length: int | None = None
    keep_alive_sec: int | None = None
    memory_limit_bytes: int | None = None
    #: Never unloaded but by an operator: neither when it is idle nor for another model.
    pinned: bool = False
    #: How it writes tool calls, where its chat template does not tell; see docs/api.md.
    tool_format: str | None = None
    #: A small model with the same vocabulary that guesses tokens ahead (mlx only).
    draft_model: str | None = None
    #: Whether its answers go on when it crashes; None: as the other models'.
    resume: bool | None = None


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All settings with their defaults. Durations in seconds, sizes in bytes."""

    home: Path
    host: str = "127.0.0.1"
    port: int = 8000
    models_dir: Path | None = None
    #: The cache of Hugging Face's libraries; None: where they have it.
    hub_cache_dir: Path | None = None
    models: tuple[ModelSetting, ...] = ()
    #: Names for ids, other aliases or a preset; of a list the first that can serve does.
    aliases: dict[str, str | tuple[str, ...]] = {}
    presets: dict[str, Preset] = {}
    admin_key: str | None = None
    api_key: str | None = None
    #: Whether models are downloaded from the hub, when an operator says so.
    downloads_enabled: bool = True
    #: Downloads that run at once; further ones wait.
    max_downloads: int = 2
    #: The hub; None: where Hugging Face's libraries have it.
    hub_endpoint: str | None = None
    #: Of the disk, kept free of downloads.
    download_disk_reserve_bytes: int = 1_000_000_000
    #: A transfer that brings nothing for so long is begun anew.
    download_stall_s: float = 30.0
    #: A non-loopback bind without both keys is refused unless this is set.
    allow_unauthenticated: bool = False
    #: The backend without a model, for tests and the fault harness.
    enable_simulated: bool = False

    max_body_bytes: int = 32 * 1024 * 1024
    #: Requests per model that are running or waiting; one more is refused (429).
    max_queue: int = 64
    #: Memory a stream may take for a client that reads too slowly.
    max_stream_buffer_bytes: int = 1024 * 1024
    #: Responses that clients may go on from, kept in memory; 0: none.
    response_store_max: int = 1000
    response_store_max_bytes: int = 64 * 1024 * 1024
    #: Streams that go on without their clients, kept in memory; 0: none.
    stream_store_max: int = 100
    stream_store_max_bytes: int = 64 * 1024 * 1024
    #: How long one is kept after its end, and goes on with nobody reading it.
    stream_keep_s: float = 600.0
    #: Load a model that is on disk when a request names it, which waits for that.
    load_on_demand: bool = False
    #: Unload a model that had nothing to do for so long; 0, None: never. A model's own
    #: ``keep_alive_sec`` comes first.
    keep_alive_sec: int | None = None

    #: How long running requests may go on when their model is to be unloaded.
    unload_drain_s: float = 30.0
    #: Whether an answer that a crash interrupts goes on when the model is back.
    resume: bool = True
    #: An answer of so many tokens is computed again as it was made, one token a step, so that
    #: the rest is exact; a longer one at once.
    resume_exact_tokens: int = 1024

    #: Silence on a stream after which something is sent that shows it is alive.
    sse_keepalive_s: float = 5.0
    shutdown_grace_s: float = 5.0

    #: Sequences one worker runs at once; they share the KV cache.
    max_sequences: int = 4
    #: KV cache that a worker keeps of ended requests, for later ones that begin alike;
    #: 0: none, None: the backend's default.
    prompt_cache_bytes: int | None = None
    #: Tokens guessed ahead at most while a request has its model for itself, and
    #: checked in one step; 0: none on llama, 3 by an mlx model's draft model. The
    #: answer is the same.
    draft_tokens: int = 0
    threads: int | None = None
    #: Workers of each backend in use that wait without a model, so that a restart takes less.
    warm_spares: int = 1
    context_length: int | None = None

    #: Process start until the handshake.
    start_timeout_s: float = 60.0
    canary_timeout_s: float = 120.0
    #: No progress in this phase for so long means hung.
    load_stall_s: float = 300.0
    prefill_stall_s: float = 120.0
    decode_stall_s: float = 60.0
    beat_interval_s: float = 1.0
    beat_timeout_s: float = 30.0
    stop_grace_s: float = 5.0

    #: Refuse a load whose planned memory is not there, and unload idle models for it.
    memory_check: bool = True
    #: Memory that all workers together may have; None: what the host has.
    memory_budget_bytes: int | None = None
    #: Memory of one worker beyond which it is stopped; None: no limit of its own.
    worker_memory_limit_bytes: int | None = None
    #: While the host has less than this available, the worker that grew most is stopped.
    memory_low_water_bytes: int = 256 * 1024 * 1024
    memory_interval_s: float = 1.0

    failure_threshold: int = 3
    failure_window_s: float = 600.0
    restart_delay_cap_s: float = 60.0

    #: After so many starts in a row that ended badly the configured models are not loaded;
    #: 0: they always are.
    safe_start_after: int = 3

    log_level: str = "info"

    #: A client must have sent a request's head within this time ...
    header_timeout_s: float = 30.0
    #: ... and may pause for this long while it sends the body.
    body_timeout_s: float = 30.0
    #: How long the rest of an answer that has ended waits for a client that does not read.
    drain_timeout_s: float = 30.0

    @property
    def effective_models_dir(self) -> Path:
        return self.models_dir if self.models_dir is not None else self.home / "models"

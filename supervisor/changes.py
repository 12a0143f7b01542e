"""What new settings change in a running server, and what has to wait for its next start."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from supervisor.settings import Settings

#: Settings that are looked at when they are needed. What is handed to a worker when it
#: starts, or noted when a model is loaded, holds for those that come afterwards. What is
#: not named here holds until the server is started anew.
LIVE = frozenset(
    {
        *("models", "models_dir", "hub_cache_dir", "aliases", "presets"),
        *("admin_key", "api_key", "log_level"),
        *("memory_check", "memory_budget_bytes", "unload_drain_s"),
        *("load_on_demand", "keep_alive_sec", "max_queue", "sse_keepalive_s"),
        # Of models that are loaded afterwards.
        *("max_sequences", "prompt_cache_bytes"),
        *("context_length", "worker_memory_limit_bytes", "resume", "max_stream_buffer_bytes"),
        # Of workers that are started afterwards.
        *("draft_tokens", "threads", "resume_exact_tokens"),
        *("start_timeout_s", "load_stall_s", "prefill_stall_s", "decode_stall_s"),
        *("beat_interval_s", "beat_timeout_s", "stop_grace_s", "canary_timeout_s"),
    }
)

#: What is told of a key: no more than that there is one.
SECRET = "(secret)"


class Change(msgspec.Struct, frozen=True):
    """One setting, as it was and as it is asked for now."""

    name: str
    before: Any
    after: Any


class Changes(msgspec.Struct, frozen=True):
    """``applied`` and ``needs_restart`` are the names of ``changed``, in two parts."""

    changed: list[Change]
    applied: list[str]
    needs_restart: list[str]


def changes(before: Settings, after: Settings) -> Changes:
    """In the order of the settings."""
    changed = [
        Change(name, _shown(name, getattr(before, name)), _shown(name, getattr(after, name)))
        for name in Settings.__struct_fields__
        if getattr(before, name) != getattr(after, name)
    ]
    return Changes(
        changed,
        [each.name for each in changed if each.name in LIVE],
        [each.name for each in changed if each.name not in LIVE],
    )


def in_effect(before: Settings, after: Settings) -> Settings:
    """What a running server goes by when it was started with ``before`` and told ``after``."""
    return msgspec.structs.replace(before, **{name: getattr(after, name) for name in LIVE})


def shown(settings: Settings) -> dict[str, Any]:
    """All settings as they may be told, but for what names stand for, which has a route."""
    names = (each for each in Settings.__struct_fields__ if each not in ("aliases", "presets"))
    return {name: _shown(name, getattr(settings, name)) for name in names}


def without_logins(text: str) -> str:
    """The same, but for names and passwords in URLs."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def _shown(name: str, value: Any) -> Any:
    if name.endswith("_key"):
        return None if value is None else SECRET
    if name == "hub_endpoint" and value is not None:
        return without_logins(value)
    # What else there is are paths.
    return msgspec.to_builtins(value, enc_hook=str)

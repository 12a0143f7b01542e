"""A server's status in lines for a person: made of its own JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from supervisor.terminal import size_text


def health_lines(health: Mapping[str, Any]) -> list[str]:
    """``ok``, or what is wrong, one line for each."""
    return [str(health["status"]), *(_reason(each) for each in health["reasons"])]


def _reason(reason: Mapping[str, Any]) -> str:
    about = "" if reason["model"] is None else f"{reason['model']}: "
    return f"  {reason['code']}: {about}{reason['message']}"


def status_lines(status: Mapping[str, Any]) -> list[str]:
    versions, memory, queues = status["versions"], status["memory"], status["queues"]
    backends = ", ".join(
        f"{name} {version}" for name, version in versions["backends"].items() if version
    )
    kept, counters = status["recordings"], status["counters"]
    health, *reasons = health_lines(status["health"])
    return [
        f"health: {health}",
        *reasons,
        f"server: {versions['server']}, pid {status['pid']}, up {_span(status['uptime_s'])}, "
        f"Python {versions['python']}",
        f"backends: {backends or 'none'}",
        f"memory: {size_text(memory['measured_bytes'])} held by workers, "
        f"{size_text(memory['promised_bytes'])} promised, "
        f"{size_text(memory['available_bytes'])} available of {size_text(memory['total_bytes'])}",
        *(_model(each) for each in status["models"]),
        f"requests: {queues['in_flight']} running, {queues['queued']} queued",
        f"spare workers: {', '.join(map(_spare, status['spares'])) or 'none'}",
        *(
            f"download: {each['model_id']} {each['status']} {each['percent']:.0f} %"
            for each in status["downloads"]
        ),
        f"recorded streams: {kept['count']}, {size_text(kept['bytes'])}",
        "since the start: "
        + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counters.items()),
    ]


def _model(model: Mapping[str, Any]) -> str:
    state = "unloading" if model["unloading"] else model["state"]
    memory = "" if model["memory_gb"] is None else f", {model['memory_gb']:.2f} GB"
    return f"model: {model['id']} {state} ({model['reason']}) on {model['backend']}{memory}"


def _spare(spare: Mapping[str, Any]) -> str:
    return f"{spare['backend']} ({'ready' if spare['ready'] else 'starting'})"


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    told = [f"{count} {unit}" for count, unit in parts if count]
    return " ".join(told[:2]) or "0 s"

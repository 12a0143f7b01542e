"""Which promises the server does not keep right now, in stable codes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from supervisor.views import ModelView

#: Of the disk that has the home folder: what is remembered is a few megabytes.
DISK_LOW_BYTES = 500_000_000
#: For so long the event loop may be held up before clients feel it.
LAG_HIGH_S = 0.5

Code = Literal[
    "model_quarantined",
    "model_restarting",
    "model_not_loaded",
    "safe_start",
    "memory_low",
    "disk_low",
    "home_unavailable",
    "state_file_set_aside",
    "state_not_written",
    "event_loop_late",
    "process_left_behind",
]


class Trouble(msgspec.Struct, frozen=True):
    """One promise that is not kept; ``model`` None: it is about all of them."""

    code: Code
    message: str
    model: str | None = None


class Health(msgspec.Struct, frozen=True):
    status: Literal["ok", "degraded"]
    reasons: list[Trouble]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the server. Sizes are bytes, durations seconds.

    ``failed_loads``: configured models that could not be loaded at the start, and why.
    ``home_free`` None: the home folder's disk does not answer, or is gone. ``set_aside``:
    names of files that could not be read. ``unwritten``: what could not be written, by
    name, and why. ``lag``: the longest that the event loop was held up lately. ``left``:
    processes that should have ended.
    """

    models: Sequence[ModelView]
    available: int
    low_water: int
    home_free: int | None
    failed_loads: Mapping[str, str] = field(default_factory=dict)
    safe_start: str | None = None
    set_aside: Sequence[str] = ()
    unwritten: Mapping[str, str] = field(default_factory=dict)
    lag: float = 0.0
    left: Sequence[int] = ()


def assess(facts: Facts) -> Health:
    """The models in their order, then what is about the server."""
    reasons = [*_of_models(facts), *_of_the_server(facts), *_of_the_home(facts)]
    return Health("degraded" if reasons else "ok", reasons)


def _of_models(facts: Facts) -> list[Trouble]:
    found: list[Trouble] = []
    for view in facts.models:
        readiness = view.readiness
        if readiness.state == "quarantined":
            found.append(Trouble("model_quarantined", readiness.reason, view.id))
        # Until it is well again, the reason is what it failed of.
        elif readiness.state != "routable" and readiness.code is not None and not view.unloading:
            found.append(Trouble("model_restarting", readiness.reason, view.id))
    tracked = {view.id for view in facts.models}
    for model, reason in facts.failed_loads.items():
        if model not in tracked and facts.safe_start is None:
            found.append(Trouble("model_not_loaded", reason, model))
    return found


def _of_the_server(facts: Facts) -> list[Trouble]:
    found: list[Trouble] = []
    if facts.safe_start is not None:
        found.append(Trouble("safe_start", facts.safe_start))
    if facts.available < facts.low_water:
        message = (
            f"{_mb(facts.available)} of memory are available, "
            f"less than the low-water mark of {_mb(facts.low_water)}"
        )
        found.append(Trouble("memory_low", message))
    if facts.lag >= LAG_HIGH_S:
        message = f"the event loop was held up for {facts.lag:.2f} s within the last minute"
        found.append(Trouble("event_loop_late", message))
    for pid in facts.left:
        message = f"process {pid} should have ended, and holds its memory"
        found.append(Trouble("process_left_behind", message))
    return found


def _of_the_home(facts: Facts) -> list[Trouble]:
    found: list[Trouble] = []
    if facts.home_free is None:
        found.append(Trouble("home_unavailable", "the disk of the home folder does not answer"))
    elif facts.home_free < DISK_LOW_BYTES:
        message = f"{_mb(facts.home_free)} are free on the disk of the home folder"
        found.append(Trouble("disk_low", message))
    for name in facts.set_aside:
        message = f"a state file could not be read: it is {name} now, to be repaired or deleted"
        found.append(Trouble("state_file_set_aside", message))
    for name, reason in facts.unwritten.items():
        message = f"{name} could not be written, and is kept in memory: {reason}"
        found.append(Trouble("state_not_written", message))
    return found


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"

"""``/admin/health`` and ``/admin/status``: what is wrong, and what there is."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from protocol.messages import PROTOCOL_VERSION
from supervisor.casefile import PLATFORM, SERVER_VERSION
from supervisor.changes import shown
from supervisor.downloads.operation import SETTLED
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import json_response
from supervisor.gateway.events import name
from supervisor.health import Health
from supervisor.overview import Memory
from supervisor.views import ModelView, SpareView


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """``backends``: null for one that is not installed."""

    server: str
    protocol: int
    python: str
    platform: str
    backends: Mapping[str, str | None]


class ModelBrief(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    state: str
    reason: str
    backend: str
    generation: int
    crash_count: int
    unloading: bool
    memory_gb: float | None
    in_flight: int
    queued: int
    request_count: int
    last_incident_id: str | None


class Queues(msgspec.Struct, frozen=True, kw_only=True):
    """Of all models together; ``max_queue`` is of each."""

    in_flight: int
    queued: int
    max_queue: int


class DownloadBrief(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    model_id: str
    status: str
    percent: float


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """Streams that their clients may come back to, and what they take."""

    count: int
    bytes: int
    max_count: int
    max_bytes: int


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Times are epoch seconds, durations seconds. ``downloads`` are those that go on;
    ``counters`` are since the start; ``last_event_id`` is where to follow the events from."""

    health: Health
    versions: Versions
    pid: int
    started_at: float
    uptime_s: float
    event_loop_lag_s: float
    settings: dict[str, Any]
    memory: Memory
    models: Sequence[ModelBrief]
    queues: Queues
    spares: Sequence[SpareView]
    downloads: Sequence[DownloadBrief]
    recordings: Kept
    counters: dict[str, int]
    last_event_id: str | None


async def get_health(gateway: Gateway, call: Call) -> Response:
    """200 also when something is wrong: what it is, is in the answer."""
    return json_response(await gateway.fleet.overview.health(gateway.lag.worst))


async def get_status(gateway: Gateway, call: Call) -> Response:
    fleet, settings, recordings = gateway.fleet, gateway.settings, gateway.recordings
    health = await fleet.overview.health(gateway.lag.worst)
    versions = Versions(
        server=SERVER_VERSION,
        protocol=PROTOCOL_VERSION,
        python=platform.python_version(),
        platform=PLATFORM,
        backends=await fleet.overview.installed(),
    )
    views, journal = fleet.models(), fleet.journal
    now = time.time()
    status = Status(
        health=health,
        versions=versions,
        pid=os.getpid(),
        started_at=journal.started_at,
        uptime_s=round(now - journal.started_at, 3),
        event_loop_lag_s=round(gateway.lag.worst, 4),
        settings=shown(settings),
        memory=fleet.overview.memory(),
        models=[_brief(view) for view in views],
        queues=Queues(
            in_flight=sum(view.in_flight for view in views),
            queued=sum(view.queued for view in views),
            max_queue=settings.max_queue,
        ),
        spares=fleet.spares(),
        downloads=[
            DownloadBrief(
                id=view.id, model_id=view.model_id, status=view.status, percent=view.percent
            )
            for view in fleet.downloads.views()
            if view.status not in SETTLED
        ],
        recordings=Kept(
            count=len(recordings),
            bytes=recordings.size,
            max_count=settings.stream_store_max,
            max_bytes=settings.stream_store_max_bytes,
        ),
        counters=gateway.metrics.totals(),
        last_event_id=name(journal, journal.end - 1) if journal.end else None,
    )
    return json_response(status)


def _brief(view: ModelView) -> ModelBrief:
    readiness = view.readiness
    return ModelBrief(
        id=view.id,
        state=readiness.state,
        reason=readiness.reason,
        backend=view.backend,
        generation=view.generation,
        crash_count=readiness.crash_count,
        unloading=view.unloading,
        memory_gb=view.memory_gb,
        in_flight=view.in_flight,
        queued=view.queued,
        request_count=view.request_count,
        last_incident_id=view.last_incident_id,
    )

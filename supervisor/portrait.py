"""A tracked model as the outside sees it: one object, from all that is known of it."""

from __future__ import annotations

from typing import TypedDict

from protocol.messages import Loaded, ModelKind
from supervisor.footprint import resident_gb
from supervisor.gate import ModelSpec
from supervisor.generation import Generation
from supervisor.lifecycle import State
from supervisor.traffic import Traffic
from supervisor.views import IsolationView, ModelView, ReadinessView


def portray(
    spec: ModelSpec,
    state: State,
    generation: Generation | None,
    traffic: Traffic,
    *,
    readiness: ReadinessView,
    leaving: bool,
    loaded_at: float | None,
    last_incident_id: str | None,
    isolating: IsolationView | None,
) -> ModelView:
    """``leaving``: its end has been asked for; ``loaded_at`` is in epoch seconds."""
    model = generation.model if generation is not None else None
    in_hand = len(traffic.requests)
    # The worker fills its slots with what it has got.
    in_flight = min(traffic.requests.sent(), model.max_sequences) if model is not None else 0
    if (ward := traffic.requests.ward) is not None:
        in_flight += ward.sent()
    alive = generation is not None and generation.exit_status is None
    return ModelView(
        id=spec.model_id,
        path=str(spec.files.path),
        backend=spec.backend,
        backend_version=spec.backend_version,
        pid=generation.pid if generation is not None and alive else None,
        generation=state.generation,
        readiness=readiness,
        unloading=leaving,
        memory_gb=None if generation is None else resident_gb(generation.pid),
        memory_planned_gb=None if spec.plan is None else spec.plan.total / 1e9,
        loaded_at=loaded_at,
        context_length=model.context_length if model is not None else spec.context_length,
        request_count=traffic.count,
        in_flight=in_flight,
        queued=in_hand - in_flight,
        last_used_at=traffic.last_used_at,
        keep_alive_sec=spec.keep_alive_sec,
        pinned=spec.pinned,
        last_incident_id=last_incident_id,
        isolating=isolating,
        **_model_traits(model),
    )


class _ModelTraits(TypedDict, total=False):
    """Fields of a model's view."""

    kind: str
    dimensions: int | None
    has_chat_template: bool
    tool_format: str | None
    reasoning_format: str | None


def _model_traits(model: Loaded | None) -> _ModelTraits:
    """What a model that is loaded can be used for; nothing is known of another."""
    if model is None:
        return _ModelTraits()
    return _ModelTraits(
        kind=model.kind.value,
        dimensions=model.dimensions if model.kind is ModelKind.EMBED else None,
        has_chat_template=model.has_chat_template,
        tool_format=model.tool_format or None,
        reasoning_format=model.reasoning or None,
    )

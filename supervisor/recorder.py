"""Remembers what one model does: registry records, incidents, failure metrics, the journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from protocol.errors import ErrorCode
from protocol.messages import Job
from supervisor import status
from supervisor.canary import CanaryReport
from supervisor.compatibility import Outcome
from supervisor.gate import ModelSpec
from supervisor.generation import Generation
from supervisor.incidents import Incident
from supervisor.journal import (
    IncidentOpened,
    LoadRefused,
    ModelChanged,
    RequestConvicted,
    WorkerRestarting,
)
from supervisor.lifecycle import RecordFailure, ScheduleRestart, State
from supervisor.registry import Registry
from supervisor.services import Services

#: How much of a worker's last output goes into a registry record.
OUTPUT_BYTES = 2000

#: The reason of every pass.
PASSED = "canary passed"


class Recorder:
    """All methods are called on the event loop and never wait."""

    def __init__(self, spec: ModelSpec, services: Services) -> None:
        #: The model as it is loaded now.
        self.spec = spec
        self._policy = services.policy
        self._registry = services.registry
        self._incidents = services.incidents
        self._fingerprints = services.fingerprints
        self._convicts = services.convicts
        self._metrics = services.metrics
        self._journal = services.journal
        earlier = self._incidents.list(model=spec.model_id, limit=1)
        self.last_incident_id = earlier[0].id if earlier else None

    def turned(self, before: State | None, after: State | None) -> None:
        """The model's state is another one; None: it is not tracked."""
        model_id = self.spec.model_id
        status.log_transition(model_id, before, after)
        known = after or before
        if known is None or _from_outside(before) == _from_outside(after):
            return
        self._journal.add(
            ModelChanged(
                model=model_id,
                was=None if before is None else before.readiness,
                readiness=None if after is None else status.readiness_view(after, self._policy),
                reason=known.reason,
                generation=known.generation,
                unloading=known.unloading,
            )
        )

    def restarts(self, command: ScheduleRestart) -> None:
        """The next worker is started after a delay."""
        model_id, number = self.spec.model_id, command.generation
        self._metrics.worker_restarted(model_id)
        delay_s = round(command.delay_s, 3)
        self._journal.add(WorkerRestarting(model=model_id, generation=number, delay_s=delay_s))

    def passed(self, report: CanaryReport | None, parts_s: Mapping[str, float]) -> None:
        """The canary passed, a short one if there is no report; ``parts_s`` is where the time
        went from the spawn until then."""
        self._metrics.canary_ended(self.spec.model_id, "pass")
        self._add("pass", PASSED, measured(report, parts_s))

    def failed(
        self,
        failure: RecordFailure,
        generation: Generation | None,
        running: Sequence[Job],
        *,
        convicted: Job | None,
        quarantined: bool,
        crash_count: int,
    ) -> None:
        """A failure or a refusal; one that counts makes an incident.

        ``running`` had the worker, and ``convicted`` of them is to blame.
        """
        on_trial = failure.code is ErrorCode.MODEL_CANARY_FAILED
        if on_trial:
            self._metrics.canary_ended(self.spec.model_id, "fail")
        metadata: dict[str, object] = {"code": failure.code, "kind": failure.kind}
        if generation is not None:
            metadata["generation"] = generation.number
            metadata["output_tail"] = generation.output_tail[-OUTPUT_BYTES:]
        if failure.kind is not None:
            self._metrics.worker_failed(self.spec.model_id, failure.kind)
        if failure.kind is not None and generation is not None:
            incident = generation.case.open(
                # The canary is a request like any other for the worker.
                phase="canary" if on_trial else generation.phase,
                kind=failure.kind,
                code=failure.code,
                reason=failure.reason,
                quarantined=quarantined,
                crash_count=crash_count,
                output=generation.output_tail,
                in_flight=[self._fingerprint(request) for request in running],
                convicted=None if convicted is None else self._fingerprint(convicted),
            )
            self._incidents.put(incident)
            self._convicts.note(incident)
            self.last_incident_id = incident.id
            metadata["incident_id"] = incident.id
            self._tell(incident)
        elif failure.kind is None:
            code, reason = failure.code.value, failure.reason
            self._journal.add(LoadRefused(model=self.spec.model_id, code=code, message=reason))
        self._add("fail", failure.reason, metadata)

    def buried(self, generation: Generation) -> None:
        """The process is gone: its incident, if there is one, is complete now."""
        incident = generation.case.close(generation.exit_status, generation.output_tail)
        if incident is not None:
            self._incidents.put(incident)

    def _tell(self, incident: Incident) -> None:
        opened = IncidentOpened(
            model=incident.model,
            incident_id=incident.id,
            kind=incident.kind,
            phase=incident.phase,
            code=incident.code,
            reason=incident.reason,
            generation=incident.generation,
            quarantined=incident.quarantined,
            crash_count=incident.crash_count,
        )
        self._journal.add(opened)
        if (convicted := incident.convicted) is not None:
            self._metrics.convicted(incident.model)
            self._journal.add(
                RequestConvicted(
                    model=incident.model, incident_id=incident.id, fingerprint=convicted
                )
            )

    def _fingerprint(self, request: Job) -> str:
        return self._fingerprints.of(self.spec.model_id, request)

    def _add(self, outcome: Outcome, reason: str, metadata: dict[str, object]) -> None:
        remember(self._registry, self.spec, outcome, reason, metadata)


def _from_outside(state: State | None) -> object:
    """What of a state can be told from outside."""
    if state is None:
        return None
    told = (state.readiness, state.reason, state.generation)
    return *told, state.unloading, state.retry_at, state.probation


def measured(report: CanaryReport | None, parts_s: Mapping[str, float]) -> dict[str, object]:
    """What a pass leaves in the registry. A short canary measures nothing."""
    parts = {name: round(seconds, 3) for name, seconds in parts_s.items()}
    told = {"short_canary": True} if report is None else msgspec.to_builtins(report)
    return {
        **told,
        "load_s": round(sum(parts_s.values()), 3),
        "load_parts_s": parts,
    }


def remember(
    registry: Registry,
    spec: ModelSpec,
    outcome: Outcome,
    reason: str,
    metadata: Mapping[str, object],
) -> None:
    """Add an outcome of this model, with what is known of its files."""
    files = spec.files
    registry.add(
        model=spec.model_id,
        backend=spec.backend,
        backend_version=spec.backend_version,
        outcome=outcome,
        reason=reason,
        metadata={
            **metadata,
            "digest": files.digest,
            "architecture": files.traits.architecture,
            "quantization": files.traits.quantization,
        },
    )

"""Remembers what one model does: registry records, incidents, failure metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from protocol.errors import ErrorCode
from protocol.messages import Job
from supervisor.canary import CanaryReport
from supervisor.compatibility import Outcome
from supervisor.convicts import Convicts
from supervisor.gate import ModelSpec
from supervisor.generation import Generation
from supervisor.incidents import Fingerprints, IncidentStore
from supervisor.lifecycle import RecordFailure
from supervisor.metrics import Metrics
from supervisor.registry import Registry

#: How much of a worker's last output goes into a registry record.
OUTPUT_BYTES = 2000

#: The reason of every pass.
PASSED = "canary passed"


class Recorder:
    """All methods are called on the event loop and never wait."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        registry: Registry,
        incidents: IncidentStore,
        fingerprints: Fingerprints,
        convicts: Convicts,
        metrics: Metrics,
    ) -> None:
        #: The model as it is loaded now.
        self.spec = spec
        self._registry = registry
        self._incidents = incidents
        self._fingerprints = fingerprints
        self._convicts = convicts
        self._metrics = metrics
        earlier = incidents.list(model=spec.model_id, limit=1)
        self.last_incident_id = earlier[0].id if earlier else None

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
        self._add("fail", failure.reason, metadata)

    def buried(self, generation: Generation) -> None:
        """The process is gone: its incident, if there is one, is complete now."""
        incident = generation.case.close(generation.exit_status, generation.output_tail)
        if incident is not None:
            self._incidents.put(incident)

    def _fingerprint(self, request: Job) -> str:
        return self._fingerprints.of(self.spec.model_id, request)

    def _add(self, outcome: Outcome, reason: str, metadata: dict[str, object]) -> None:
        remember(self._registry, self.spec, outcome, reason, metadata)


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

"""How a tracked model stands, for those who decide about it: questions, which change nothing."""

from __future__ import annotations

from protocol.errors import CodedError, ErrorCode
from supervisor import status
from supervisor.footprint import resident_gb
from supervisor.gate import ModelSpec
from supervisor.generation import Generation
from supervisor.lifecycle import Readiness, State
from supervisor.memory import Footprint
from supervisor.memory_share import MemoryShare
from supervisor.quarantine import Policy
from supervisor.traffic import Traffic
from supervisor.views import ReadinessView

#: A model that has been loaded and not been used yet is not unloaded for another until then.
GRANTED_S = 10.0


class Standing:
    """What its owner, who changes it, knows of the model: ``state`` is None before the first
    load and once the model is not tracked any more, ``generation`` is that of its worker."""

    def __init__(
        self, spec: ModelSpec, traffic: Traffic, share: MemoryShare, policy: Policy
    ) -> None:
        self.spec = spec
        self._state: State | None = None
        self._generation: Generation | None = None
        self._traffic = traffic
        self._share = share
        self._policy = policy

    @property
    def state(self) -> State:
        """Raises ``model_not_found`` once the model is not tracked any more."""
        if self._state is None:
            raise CodedError(
                ErrorCode.MODEL_NOT_FOUND, f"model {self.spec.model_id!r} is not loaded"
            )
        return self._state

    def readiness(self) -> ReadinessView:
        """Raises ``model_not_found`` once the model is not tracked any more."""
        return status.readiness_view(self.state, self._policy)

    @property
    def tracked(self) -> bool:
        return self._state is not None

    @property
    def rests(self) -> bool:
        """Whether nothing runs for the model any more: it is quarantined."""
        return self._state is not None and self._state.readiness is Readiness.QUARANTINED

    @property
    def stays(self) -> bool:
        """Whether it runs, or is about to, and nobody has asked for its end."""
        return self.tracked and not (self.rests or self.leaving)

    @property
    def ending(self) -> bool:
        """Whether its worker is being brought down, with nothing to come after it."""
        state = self._state
        return state is not None and (state.unloading or (self.rests and state.worker_alive))

    @property
    def leaving(self) -> bool:
        """Whether it is on its way out: its requests may still be running."""
        return self.ending or (self._traffic.draining and self.tracked)

    @property
    def dying(self) -> bool:
        """Whether its worker is being brought down, so that its memory is about to be free."""
        state = self._state
        return state is not None and state.worker_alive and (state.failed or state.unloading)

    def is_routable(self) -> bool:
        """Whether it takes traffic, and nobody has asked for its end."""
        state = self._state
        return state is not None and state.readiness is Readiness.ROUTABLE and not self.ending

    def idle_s(self) -> float | None:
        """Seconds without anything to do; None while there is, or it takes no traffic, or has
        to prove itself."""
        if not self.is_routable() or self.state.probation:
            return None
        return self._traffic.idle_s()

    @property
    def evictable_s(self) -> float | None:
        """``idle_s`` of a model that may be unloaded for another; else None."""
        idle_s = self.idle_s()
        if idle_s is None or self.spec.pinned or self.spec.keep_alive_sec == 0:
            return None
        # Whoever asked for it has a moment to use it.
        just_granted = self._traffic.count == 0 and idle_s < GRANTED_S
        return None if just_granted else idle_s

    @property
    def promised(self) -> int:
        """Bytes that it may take, with what may still come."""
        if self._state is None or (self.rests and not self._state.worker_alive):
            return 0
        return self._share.promised

    def memory_gb(self) -> float | None:
        """Resident memory of the worker in GB (1e9 bytes); None without a worker."""
        return None if self._generation is None else resident_gb(self._generation.pid)

    @property
    def worker(self) -> tuple[int, int] | None:
        """Generation and pid of the live worker."""
        if self._generation is None or self._generation.exit_status is not None:
            return None
        return self._generation.number, self._generation.pid

    def footprint(self, generation: int, size: int) -> Footprint | None:
        """Note what the worker holds, in bytes; None if it is another one by now."""
        if self._generation is None or self._generation.number != generation:
            return None
        self._generation.case.sample(size)
        return self._share.measured(generation, size)

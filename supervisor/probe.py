"""Which backend runs a model here? Each is tried once, in a worker of its own.

What is loaded stays as it is, and so does the model's account: a probe counts no failure,
opens no incident and ends no quarantine. What was learnt goes into the registry.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext

import msgspec

from protocol.errors import CodedError, ErrorCode
from supervisor.compatibility import Outcome
from supervisor.gate import Gate, LoadSpec, ModelSpec
from supervisor.recorder import OUTPUT_BYTES, measured, remember
from supervisor.services import Services
from supervisor.sideworker import SideWorker
from supervisor.trial import NAME, Ended, Trial
from supervisor.views import BackendProbe, ProbeResult

log = logging.getLogger(__name__)

#: For one backend. A load that makes progress may take any time; who asks waits for this one.
TIMEOUT_S = 600.0

#: When another probe may be tried; how long this one takes, nobody knows.
RETRY_S = 5.0

#: Holds the memory that a model is going to need, or raises ``insufficient_memory``.
Reserve = Callable[[ModelSpec], AbstractAsyncContextManager[None]]


def _nothing_reserved(_model: ModelSpec) -> AbstractAsyncContextManager[None]:
    return nullcontext()


class ProbeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A probe as an operator asks for it. ``load``: as the model would be loaded.

    Without ``backends``: all that read its format. ``timeout_s`` is for each.
    """

    load: LoadSpec
    backends: tuple[str, ...] = ()
    timeout_s: float = TIMEOUT_S


class Prober:
    """One probe at a time, and one worker at a time in it. Methods run on the event loop.

    ``gate`` gives the one that knows the settings in effect.
    """

    def __init__(
        self, gate: Callable[[], Gate], services: Services, *, reserve: Reserve = _nothing_reserved
    ) -> None:
        self._current_gate = gate
        self._services = services
        self._reserve = reserve
        self._probe: asyncio.Task[ProbeResult] | None = None
        self._probed = ""
        self._called_off = False
        self._stopped = False
        #: Workers beside those of the models, for the memory watch: that of the trial under
        #: way, and whatever others put there.
        self.trials: dict[str, SideWorker] = {}

    async def probe(self, spec: ProbeSpec) -> ProbeResult:
        """Try each backend. Who is cancelled calls the probe off.

        Raises ``model_not_found`` and ``model_incomplete`` as a load does,
        ``model_unsupported_backend`` for a name that no backend has, ``model_conflict``
        while another probe runs, and ``server_shutting_down``.
        """
        if self._stopped:
            raise _shutting_down()
        if self._probe is not None and not self._probe.done():
            raise CodedError(
                ErrorCode.MODEL_CONFLICT,
                f"model {self._probed!r} is being probed; one probe runs at a time",
                retry_after_s=RETRY_S,
            )
        self._probed = self._current_gate().id_of(spec.load)
        self._called_off = False
        self._probe = probe = asyncio.create_task(self._run(spec), name=f"probe {self._probed}")
        try:
            await asyncio.wait({probe})
        except asyncio.CancelledError:
            # By itself: its worker has to be brought down, whatever becomes of the caller.
            probe.add_done_callback(_forget)
            self._call_off()
            raise
        if probe.cancelled():
            raise _shutting_down()
        return probe.result()

    async def stop(self) -> None:
        """Call off what runs, and wait until its worker is gone; nothing begins any more."""
        self._stopped = True
        self._call_off()
        if self._probe is not None:
            await asyncio.wait({self._probe})

    # --- inside ---

    def _call_off(self) -> None:
        # Once: a second time would cancel the wait for the worker's end.
        if self._probe is not None and not self._called_off:
            self._called_off = True
            self._probe.cancel()

    async def _run(self, spec: ProbeSpec) -> ProbeResult:
        # All of them first: what is wrong with the request is told before anything starts.
        names = await self._names(spec)
        candidates = [await self._candidate(spec.load, name) for name in names]
        results: list[BackendProbe] = []
        for candidate in candidates:
            if isinstance(candidate, ModelSpec):
                results.append(await self._try(candidate, spec.timeout_s))
            else:
                results.append(candidate)
        tried = [candidate for candidate in candidates if isinstance(candidate, ModelSpec)]
        quarantined = {model.backend for model in tried if self._is_quarantined(model)}
        recommended, reason = recommend(results, quarantined)
        log.info("%s: probed: %s", self._probed, reason)
        return ProbeResult(
            model_id=self._probed, results=results, recommended=recommended, reason=reason
        )

    async def _names(self, spec: ProbeSpec) -> Sequence[str]:
        if not spec.backends:
            return await self._current_gate().readers(spec.load)
        installed = await self._current_gate().installed()
        for name in spec.backends:
            if name not in installed:
                raise CodedError(
                    ErrorCode.MODEL_UNSUPPORTED_BACKEND,
                    f"unknown backend {name!r}; known: {', '.join(sorted(installed))}",
                    param="backends",
                )
        return list(dict.fromkeys(spec.backends))

    async def _candidate(self, load: LoadSpec, backend: str) -> ModelSpec | BackendProbe:
        """What to run on this backend, or why not."""
        try:
            return await self._current_gate().admit(msgspec.structs.replace(load, backend=backend))
        except CodedError as refusal:
            if refusal.code is not ErrorCode.MODEL_UNSUPPORTED_BACKEND:
                raise
            version = (await self._current_gate().installed()).get(backend)
            return _skipped(backend, version, refusal)

    def _is_quarantined(self, model: ModelSpec) -> bool:
        return self._services.accounts.get(model.account_key).quarantined

    async def _try(self, model: ModelSpec, timeout_s: float) -> BackendProbe:
        # On what a load would have to pass, which is more on probation.
        log.info("%s: to be tried on %s %s", model.model_id, model.backend, model.backend_version)
        trial = Trial(model, self._services, strict=self._is_quarantined(model))
        try:
            async with self._reserve(model):
                self.trials[NAME] = trial.worker
                try:
                    ended = await trial.run(timeout_s)
                finally:
                    del self.trials[NAME]
        except CodedError as refusal:
            return _skipped(model.backend, model.backend_version, refusal)
        self._remember(model, ended)
        log.info("%s: probe on %s: %s", model.model_id, model.backend, ended.reason)
        return _result(model, ended)

    def _remember(self, model: ModelSpec, ended: Ended) -> None:
        """Keep what is about the model; a deadline or a lack of memory here is not."""
        if not ended.telling:
            return
        metadata: dict[str, object] = {"probe": True}
        if ended.report is not None:
            metadata |= measured(ended.report, ended.parts_s)
        else:
            tail = ended.output_tail[-OUTPUT_BYTES:]
            metadata |= {"code": ended.code, "kind": ended.kind, "output_tail": tail}
        outcome = _outcome(ended)
        remember(self._services.registry, model, outcome, ended.reason, metadata)


def recommend(
    results: Sequence[BackendProbe], quarantined: Collection[str]
) -> tuple[str | None, str]:
    """The backend to load the model on, and why; None when none passed.

    Of several the fastest, but one whose quarantine is in the way only where no other passed.
    """
    passed = [result for result in results if result.outcome == "pass"]
    if not passed:
        told = "; ".join(f"{result.backend}: {result.reason}" for result in results)
        return None, f"no backend passed: {told}"
    best = max(passed, key=lambda r: (r.backend not in quarantined, r.tokens_per_s or 0.0))
    reason = f"{best.backend} {best.backend_version} passed"
    if best.tokens_per_s is not None:
        reason += f", {best.tokens_per_s:.0f} tokens/s"
    if best.backend in quarantined:
        reason += "; its quarantine has to be released before a load"
    return best.backend, reason


def _result(model: ModelSpec, ended: Ended) -> BackendProbe:
    report = ended.report
    return BackendProbe(
        backend=model.backend,
        backend_version=model.backend_version,
        outcome=_outcome(ended),
        code=ended.code,
        reason=ended.reason,
        time_to_load_ms=round(sum(ended.parts_s.values()) * 1000, 1) if ended.parts_s else None,
        time_to_first_token_s=None if report is None else report.time_to_first_token_s,
        tokens_per_s=None if report is None else report.tokens_per_s,
        memory_gb=ended.memory_gb,
    )


def _outcome(ended: Ended) -> Outcome:
    return "pass" if ended.code is None else "fail"


def _skipped(backend: str, version: str | None, refusal: CodedError) -> BackendProbe:
    return BackendProbe(
        backend=backend,
        backend_version=version,
        outcome="skipped",
        code=refusal.code,
        reason=refusal.message,
    )


def _shutting_down() -> CodedError:
    return CodedError(ErrorCode.SHUTTING_DOWN, "the server is shutting down")


def _forget(probe: asyncio.Task[ProbeResult]) -> None:
    """Take note of how a probe ended that nobody waits for any more."""
    if not probe.cancelled() and (error := probe.exception()) is not None:
        log.error("a probe that was called off: %s", error)

"""A fleet without processes: the test plays the worker, through the real ``RequestStream``."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from protocol.errors import CodedError, ErrorCode
from protocol.messages import (
    Delta,
    Detokenize,
    Detokenized,
    Embed,
    FinishReason,
    Generate,
    Inquiry,
    Job,
    Tokenize,
    Tokenized,
)
from supervisor.downloads.downloads import Asked, Downloads
from supervisor.downloads.operation import DownloadView, Operation
from supervisor.fleet import Fleet
from supervisor.gate import NO_OPTIONS, LoadSpec
from supervisor.health import Facts, Health, assess
from supervisor.journal import Journal
from supervisor.overview import Memory, Overview
from supervisor.probe import ProbeSpec
from supervisor.records import Records
from supervisor.settings import Settings
from supervisor.stream import RequestStream
from supervisor.views import LoadResult, ModelView, ProbeResult, ReadinessView, SpareView

CREATED = 1_700_000_000.0


def readiness(state: str = "routable", reason: str = "ready", **more: object) -> ReadinessView:
    base = ReadinessView(state=state, reason=reason, crash_count=0, updated_at=CREATED)
    return msgspec.structs.replace(base, **more)


def view(model_id: str, state: str = "routable", **more: object) -> ModelView:
    base = ModelView(
        id=model_id,
        path=f"/models/{model_id}",
        backend="simulated",
        backend_version="1.0",
        pid=42,
        generation=1,
        readiness=readiness(state),
        unloading=False,
        memory_gb=0.5,
        memory_planned_gb=1.0,
        loaded_at=CREATED,
        context_length=2048,
        request_count=0,
        in_flight=0,
        queued=0,
        last_used_at=None,
        keep_alive_sec=None,
        pinned=False,
        last_incident_id=None,
    )
    return msgspec.structs.replace(base, **more)


@dataclass
class Submitted:
    """One request as the worker would see it."""

    model: str
    job: Job
    streaming: bool
    stream: RequestStream
    resume: bool = True
    cancellation: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def request(self) -> Generate:
        assert isinstance(self.job, Generate)
        return self.job

    @property
    def embed(self) -> Embed:
        assert isinstance(self.job, Embed)
        return self.job

    @property
    def cancelled(self) -> bool:
        return self.cancellation.is_set()

    def accept(self, prompt_tokens: int = 5) -> None:
        self.stream.accept(prompt_tokens)

    def start(self, cached_tokens: int = 0) -> None:
        self.stream.start(cached_tokens, 0.5)

    def say(self, text: str, finish: FinishReason | None = None, tokens: int = 1) -> None:
        self.stream.push(Delta(0, text, [7] * tokens, finish))

    def give(self, vectors: list[list[float]]) -> None:
        packed = [struct.pack(f"<{len(vector)}f", *vector) for vector in vectors]
        self.stream.add_vectors(packed, last=True)

    def finish(self) -> None:
        self.say("", FinishReason.STOP)

    def fail(self, code: ErrorCode, message: str = "it broke") -> None:
        self.stream.fail(CodedError(code, message))


class NoDownloads(Downloads):
    """A hub that has nothing."""

    def __init__(self) -> None:
        pass

    def views(self) -> list[DownloadView]:
        return []

    async def offer(
        self, refusal: CodedError, spec: LoadSpec, *, consent: bool
    ) -> LoadSpec | Operation | Asked:
        raise refusal

    async def preview(self, refusal: CodedError, spec: LoadSpec) -> LoadSpec | Operation | Asked:
        raise refusal


class FakeOverview(Overview):
    """Has seen nothing but what it is told."""

    def __init__(self) -> None:
        self.facts = Facts(models=[], available=8 * 10**9, low_water=0, home_free=10**11)

    async def health(self, lag_s: float) -> Health:
        return assess(replace(self.facts, lag=lag_s))

    def memory(self) -> Memory:
        return Memory(
            total_bytes=16 * 10**9,
            available_bytes=self.facts.available,
            low_water_bytes=self.facts.low_water,
            budget_bytes=None,
            promised_bytes=10**9,
            measured_bytes=5 * 10**8,
        )

    async def installed(self) -> dict[str, str | None]:
        return {"simulated": "1", "mlx": None}


@dataclass
class FakeRecords(Records):
    """Knows what is ``on_disk``, and keeps what it is asked."""

    on_disk: Sequence[object] = field(default_factory=list)
    queries: list[dict[str, object]] = field(default_factory=list)

    async def available(self) -> dict[str, object]:
        return {"models": self.on_disk, "count": len(self.on_disk)}

    async def compatibility(
        self,
        *,
        model: str | None = None,
        backend: str | None = None,
        outcome: str | None = None,
        since: float | None = None,
        limit: int = 100,
    ) -> dict[str, object]:
        self.queries.append(
            {"model": model, "backend": backend, "outcome": outcome, "since": since, "limit": limit}
        )
        return {"records": [], "total": 0, "summary": {}}

    async def recommendations(
        self, *, model: str | None = None, backend: str | None = None
    ) -> dict[str, object]:
        self.queries.append({"model": model, "backend": backend})
        return {"recommendations": [], "count": 0}

    async def regressions(
        self, *, model: str | None = None, backend: str | None = None
    ) -> dict[str, object]:
        self.queries.append({"model": model, "backend": backend})
        return {"regressions": [], "count": 0}


@dataclass
class FakeFleet(Fleet):
    """Answers every request with ``script`` at once, or not at all when that is None.

    Inquiries are answered as by a model whose tokens are bytes, or with ``script`` None
    once ``inquiries_may_end``.
    """

    views: dict[str, ModelView] = field(default_factory=dict)
    script: tuple[str, ...] | None = ("Hel", "lo")
    #: Every ``Embed`` is answered with these at once, or not at all when that is None.
    vectors: list[list[float]] | None = None
    refusal: CodedError | None = None
    bug: Exception | None = None
    requests: list[Submitted] = field(default_factory=list)
    inquiries: list[Inquiry] = field(default_factory=list)
    inquiries_may_end: asyncio.Event = field(default_factory=asyncio.Event)
    inquiries_called_off: int = 0
    loads: list[LoadSpec] = field(default_factory=list)
    why_safe: str | None = None
    records: FakeRecords = field(default_factory=FakeRecords)
    prepared: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    preparation_may_end: asyncio.Event | None = None
    preparations_called_off: int = 0
    #: What comes of a preparation, by model.
    unprepared: dict[str, CodedError] = field(default_factory=dict)
    adopted: Settings | None = None
    #: What ``submit`` and inquiries say of single models.
    refusals: dict[str, CodedError] = field(default_factory=dict)
    load_may_end: asyncio.Event = field(default_factory=asyncio.Event)
    finished_loads: int = 0
    probes: list[ProbeSpec] = field(default_factory=list)
    #: What every probe finds; until it is set, none comes to its end.
    found: ProbeResult | None = None
    probes_called_off: int = 0
    started: bool = False
    stopped: bool = False
    max_buffer_bytes: int | None = None
    capacity: int | None = None
    on_start: Callable[[], None] | None = None
    journal: Journal = field(default_factory=Journal)
    overview: FakeOverview = field(default_factory=FakeOverview)
    downloads: Downloads = field(default_factory=NoDownloads)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, model: ModelView) -> None:
        self.views[model.id] = model

    async def request(self, number: int = 0) -> Submitted:
        """Wait for the request with this number."""
        while len(self.requests) <= number:
            self._news.clear()
            await self._news.wait()
        return self.requests[number]

    async def preparation(self, number: int = 0) -> str:
        """Wait until the model with this number is prepared for a request; its id."""
        while len(self.prepared) <= number:
            self._news.clear()
            await self._news.wait()
        return self.prepared[number][0]

    async def loading(self, number: int = 0) -> LoadSpec:
        """Wait for the load with this number."""
        while len(self.loads) <= number:
            self._news.clear()
            await self._news.wait()
        return self.loads[number]

    def models(self) -> list[ModelView]:
        return [self.views[model_id] for model_id in sorted(self.views)]

    def spares(self) -> list[SpareView]:
        return []

    def model(self, model_id: str) -> ModelView:
        if model_id not in self.views:
            raise CodedError(ErrorCode.MODEL_NOT_FOUND, f"{model_id} is not loaded", param="model")
        return self.views[model_id]

    def fingerprint(self, model_id: str) -> str:
        view = self.model(model_id)
        return f"{view.backend}-{view.backend_version}"

    @property
    def safe_start(self) -> str | None:
        return self.why_safe

    def must_prepare(self, model_id: str) -> bool:
        return self.preparation_may_end is not None

    async def prepare(self, model_id: str, options: Mapping[str, Any] = NO_OPTIONS) -> None:
        self.prepared.append((model_id, dict(options)))
        self._news.set()
        if self.preparation_may_end is not None:
            try:
                await self.preparation_may_end.wait()
            except asyncio.CancelledError:
                self.preparations_called_off += 1
                raise
        if model_id in self.unprepared:
            raise self.unprepared[model_id]

    def submit(
        self, model_id: str, request: Job, *, streaming: bool, resume: bool = True
    ) -> RequestStream:
        self.model(model_id)
        if model_id in self.refusals:
            raise self.refusals[model_id]
        if self.bug is not None:
            raise self.bug
        if self.refusal is not None:
            raise self.refusal
        if self.capacity is not None and len(self.requests) >= self.capacity:
            raise CodedError(ErrorCode.RATE_LIMIT_EXCEEDED, "the queue is full", retry_after_s=1)

        def cancelled() -> None:
            submitted.cancellation.set()

        stream = RequestStream(max_buffer_bytes=self.max_buffer_bytes, on_close=cancelled)
        submitted = Submitted(model_id, request, streaming, stream, resume)
        self.requests.append(submitted)
        self._news.set()
        if isinstance(request, Embed):
            if self.vectors is not None:
                submitted.accept()
                submitted.give(self.vectors)
        elif self.script is not None:
            submitted.accept()
            for text in self.script:
                submitted.say(text)
            submitted.say("", FinishReason.STOP)
        return stream

    async def tokenize(self, model_id: str, inquiry: Tokenize) -> Tokenized:
        await self._inquire(model_id, inquiry)
        request = inquiry.generate
        text = request.prompt
        if request.messages is not None:
            text = "".join(message.content for message in request.messages)
        tokens = text if isinstance(text, list) else list((text or "").encode())
        if inquiry.add_special:
            tokens = [1, *tokens]
        return Tokenized(0, len(tokens), [] if inquiry.count_only else tokens)

    async def detokenize(self, model_id: str, inquiry: Detokenize) -> Detokenized:
        await self._inquire(model_id, inquiry)
        return Detokenized(0, bytes(inquiry.tokens).decode())

    async def _inquire(self, model_id: str, inquiry: Inquiry) -> None:
        self.model(model_id)
        if (refusal := self.refusals.get(model_id) or self.refusal) is not None:
            raise refusal
        self.inquiries.append(inquiry)
        self._news.set()
        if self.script is None:
            try:
                await self.inquiries_may_end.wait()
            except asyncio.CancelledError:
                self.inquiries_called_off += 1
                raise

    async def inquiry(self, number: int = 0) -> Inquiry:
        """Wait for the inquiry with this number."""
        while len(self.inquiries) <= number:
            self._news.clear()
            await self._news.wait()
        return self.inquiries[number]

    async def start_load(self, spec: LoadSpec) -> ModelView:
        if (refusal := self.refusals.get(spec.model_id) or self.refusal) is not None:
            raise refusal
        self.loads.append(spec)
        self._news.set()
        self.views.setdefault(spec.model_id, view(spec.model_id, "loading"))
        return self.views[spec.model_id]

    async def load(self, spec: LoadSpec) -> LoadResult:
        await self.start_load(spec)
        await self.load_may_end.wait()
        self.finished_loads += 1
        self.add(view(spec.model_id))
        return LoadResult(
            success=True,
            model_id=spec.model_id,
            memory_after_load_gb=0.5,
            time_to_load_ms=12.5,
            readiness=readiness(),
        )

    async def unload(self, model_id: str, drain_s: float | None = None) -> None:
        self.model(model_id)
        self.drained_s = drain_s
        del self.views[model_id]

    async def probe(self, spec: ProbeSpec) -> ProbeResult:
        self.probes.append(spec)
        self._news.set()
        if self.refusal is not None:
            raise self.refusal
        if self.found is None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.probes_called_off += 1
                raise
        assert self.found is not None
        return self.found

    async def probing(self) -> ProbeSpec:
        """Wait for the first probe."""
        while not self.probes:
            self._news.clear()
            await self._news.wait()
        return self.probes[0]

    async def release(self, model_id: str) -> None:
        if self.model(model_id).readiness.state != "quarantined":
            raise CodedError(ErrorCode.MODEL_CONFLICT, f"{model_id} is not quarantined")
        del self.views[model_id]

    def adopting(self, settings: Settings) -> Callable[[], None]:
        def adopt() -> None:
            self.adopted = settings

        return adopt

    async def start(self) -> None:
        self.started = True
        if self.on_start is not None:
            self.on_start()

    async def stop(self) -> None:
        self.stopped = True
        for submitted in self.requests:
            submitted.fail(ErrorCode.SHUTTING_DOWN, "the server is shutting down")

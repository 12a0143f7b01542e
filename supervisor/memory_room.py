"""Makes room for a model before its worker is spawned, or says why there is none.

What is promised to the models that are loaded, their growth included, is set against what
the host, its cgroup and the configured limit leave. One load at a time is looked at, so
that nothing is promised twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from protocol.errors import CodedError, ErrorCode
from supervisor.actor import Actor
from supervisor.eviction import Holder, candidates, choose
from supervisor.footprint import Usage, available_bytes, gpu_limit_bytes, total_bytes, usage_of
from supervisor.gate import ModelSpec
from supervisor.journal import ModelEvicted
from supervisor.memory_plan import (
    MemoryPlan,
    Terms,
    largest_context,
    overhead_bytes,
    plan_memory,
)
from supervisor.memory_share import lesson_key
from supervisor.memory_watch import Watched
from supervisor.services import Services
from supervisor.spares import Spares

log = logging.getLogger(__name__)

#: Stands for all spare workers where models go by their ids, which are never empty.
SPARES = ""

#: Until then those who hold the memory may have become idle.
_RETRY_AFTER_S = 5.0
#: What ended requests leave behind gets at most this share of all memory.
_PROMPT_CACHE_SHARE = 1 / 8


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """What a load would do. Sizes are bytes; ``available_bytes`` is without the promises to
    others, before any of ``would_unload`` has gone."""

    model_id: str
    fits: bool
    message: str
    needed_bytes: int
    available_bytes: int
    plan: MemoryPlan
    would_unload: Sequence[str]
    fitting_context_length: int | None


@dataclass(frozen=True, slots=True)
class _Decision:
    """``unload`` None: it does not fit, for the reason in ``message``."""

    plan: MemoryPlan
    needed: int
    available: int
    message: str
    unload: list[Holder] | None
    fitting_context: int | None = None
    #: Whether it would fit once those that are busy now are idle.
    may_fit_later: bool = False


@dataclass
class MemoryRoom:
    """Looks at the actors in ``actors``, which their owner changes on the event loop.

    Who spawns a worker holds ``turn`` from ``make`` until the actor is among them.
    """

    actors: Mapping[str, Actor]
    services: Services
    spares: Spares
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: Workers that are no actor's, and have what is held.
    trials: Mapping[str, Watched] = field(default_factory=dict)
    _held: dict[object, int] = field(default_factory=dict)

    async def make(self, model: ModelSpec, *, may_evict: bool) -> MemoryPlan:
        """Unload what is in the way of ``model``, if that helps, and wait for its end.

        Raises ``insufficient_memory``, and has unloaded nothing then.
        """
        decision = await self._decide(model, may_evict=may_evict)
        if decision.unload is None:
            raise CodedError(
                ErrorCode.INSUFFICIENT_MEMORY,
                decision.message,
                param="model_id",
                retry_after_s=_RETRY_AFTER_S if decision.may_fit_later else None,
            )
        # Nothing waits between the decision and this: who was idle still is.
        names = [holder.model_id for holder in decision.unload]
        evicted = [self.actors[name] for name in names if name is not SPARES]
        for actor in evicted:
            log.info("%s: unloaded to make room for %s", actor.spec.model_id, model.model_id)
            evicted_for = ModelEvicted(model=actor.spec.model_id, made_room_for=model.model_id)
            self.services.journal.add(evicted_for)
            actor.unload(ErrorCode.MODEL_UNLOADED, f"it made room for {model.model_id!r}")
        if SPARES in names:
            await self.spares.drop()
        for actor in evicted:
            await actor.left()
        return decision.plan

    async def preview(self, model: ModelSpec, *, may_evict: bool) -> Preview:
        """What ``make`` would do now, or that the model is there already; changes nothing."""
        async with self.turn:
            decision = await self._decide(model, may_evict=may_evict)
        actor = self.actors.get(model.model_id)
        if actor is not None and actor.stays:
            message = f"model {model.model_id!r} is loaded, or about to be"
            decision = replace(decision, unload=[], needed=0, message=message)
        return Preview(
            model_id=model.model_id,
            fits=decision.unload is not None,
            message=decision.message,
            needed_bytes=decision.needed,
            available_bytes=max(0, decision.available),
            plan=decision.plan,
            would_unload=[each.model_id for each in decision.unload or () if each.model_id],
            fitting_context_length=decision.fitting_context,
        )

    async def has_room_for_spare(self, backend: str) -> bool:
        """Whether a worker without a model may be spawned at once; nobody has to go for it."""
        async with self.turn:
            _, _, available = await self._measure()
        return overhead_bytes(backend) <= available

    @contextlib.asynccontextmanager
    async def hold(self, model: ModelSpec) -> AsyncIterator[None]:
        """Memory for a worker that is no actor's. Unloads nobody; raises as ``make``."""
        key = object()
        async with self.turn:
            self._held[key] = (await self.make(model, may_evict=False)).total
        try:
            yield
        finally:
            del self._held[key]

    async def _decide(self, model: ModelSpec, *, may_evict: bool) -> _Decision:
        for actor in list(self.actors.values()):
            # Its memory is about to be free.
            await actor.left()
        usages, spare, available = await self._measure()
        holders = [
            Holder(name, max(actor.promised, usages.get(name, _NOTHING).total), actor.evictable_s)
            for name, actor in self.actors.items()
        ]
        if not may_evict:
            holders = [Holder(each.model_id, each.frees, None) for each in holders]
        if spare:
            # Nobody misses them: they go first.
            holders.append(Holder(SPARES, spare, math.inf))
        terms = Terms(
            backend=model.backend,
            context_length=model.context_length,
            sequences=self.services.settings.max_sequences,
            draft_bytes=model.draft_bytes,
            prompt_cache=self.services.settings.prompt_cache_bytes,
        )
        correction = self.services.lessons.correction(lesson_key(model))
        plan = plan_memory(model.files, terms, correction)
        elastic = terms.prompt_cache is None
        needed = plan.required if elastic else plan.total
        if not self.services.settings.memory_check:
            return _Decision(plan, needed, available, "memory is not checked", [])
        unload = choose(needed, available, holders)
        if unload is None:
            evictable = sum(holder.frees for holder in candidates(holders))
            fitting = largest_context(model.files, terms, correction, available + evictable)
            return _Decision(
                plan=plan,
                needed=needed,
                available=available,
                message=_refusal(model, plan, needed, available, holders, fitting),
                unload=None,
                fitting_context=fitting,
                may_fit_later=may_evict
                and needed <= available + sum(holder.frees for holder in holders),
            )
        if elastic:
            left = available + sum(holder.frees for holder in unload) - needed
            most = int(total_bytes() * _PROMPT_CACHE_SHARE)
            plan = msgspec.structs.replace(
                plan, prompt_cache=max(0, min(plan.prompt_cache, most, left))
            )
        return _Decision(plan, needed, available, _consent(model, needed, unload), unload)

    async def _measure(self) -> tuple[dict[str, Usage], int, int]:
        """What each model's worker takes, what the end of all spare ones would free, and what
        could be promised to one more model."""
        pids = {name: actor.worker[1] for name, actor in self.actors.items() if actor.worker}
        spares = self.spares.planned
        trials = [trial.worker[1] for trial in self.trials.values() if trial.worker]
        measured, host = await asyncio.to_thread(_look, [*pids.values(), *spares, *trials])
        usages = {name: measured[pid] for name, pid in pids.items() if pid in measured}
        taken = {pid: measured.get(pid, _NOTHING).total for pid in spares}
        growing = sum(max(0, spares[pid] - taken[pid]) for pid in spares)
        spare = sum(taken.values())
        tried = sum(measured[pid].total for pid in trials if pid in measured)
        used = sum(usage.total for usage in usages.values()) + spare + tried
        # What is mapped could be taken from a worker, and the host counts it as available;
        # but then it would be read again and again.
        mapped = sum(usage.mapped for usage in measured.values())
        limits = [host - mapped - self.services.settings.memory_low_water_bytes]
        for limit in (self.services.settings.memory_budget_bytes, gpu_limit_bytes()):
            if limit is not None:
                limits.append(limit - used)
        outstanding = max(0, sum(self._held.values()) - tried) + growing
        outstanding += sum(
            max(0, actor.promised - usages.get(name, _NOTHING).total)
            for name, actor in self.actors.items()
        )
        return usages, spare + growing, min(limits) - outstanding


_NOTHING = Usage(0, 0)


def _look(pids: Sequence[int]) -> tuple[dict[int, Usage], int]:
    found = {pid: usage for pid in pids if (usage := usage_of(pid)) is not None}
    return found, available_bytes()


def _refusal(
    model: ModelSpec,
    plan: MemoryPlan,
    needed: int,
    available: int,
    holders: Sequence[Holder],
    fitting: int | None,
) -> str:
    parts = [
        f"model {model.model_id!r} needs {_gb(needed)} ({_parts(plan)}), and {_gb(available)} "
        "of memory can be had"
    ]
    if able := [each for each in candidates(holders) if each.model_id]:
        names = ", ".join(repr(holder.model_id) for holder in able)
        freed = sum(holder.frees for holder in able)
        parts.append(f"to unload what is idle ({names}) would free {_gb(freed)}: not enough")
    stays = [repr(each.model_id) for each in holders if each.idle_s is None]
    if stays:
        parts.append(f"busy, pinned or not to be unloaded for this: {', '.join(stays)}")
    if fitting is not None:
        parts.append(f"with a context_length of {fitting} it would fit")
    return "; ".join(parts)


def _consent(model: ModelSpec, needed: int, unload: Sequence[Holder]) -> str:
    names = ", ".join(repr(holder.model_id) for holder in unload if holder.model_id)
    if not names:
        return f"model {model.model_id!r} needs {_gb(needed)}, which is available"
    return f"model {model.model_id!r} needs {_gb(needed)}; {names} would be unloaded for it"


def _parts(plan: MemoryPlan) -> str:
    text = (
        f"weights {_gb(plan.weights)}, KV cache {_gb(plan.kv)} for a context of "
        f"{plan.context_length} tokens, compute buffers {_gb(plan.compute)}, process "
        f"{_gb(plan.overhead)}"
    )
    if abs(plan.correction) >= 1e7:
        text += f", and {_gb(plan.correction)} as it was measured before"
    return text


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"

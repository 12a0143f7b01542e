"""May this be loaded now: a load on its way to an actor, until that begins.

All who ask for one model get the same actor. What they wait for is that it has left, if it is
leaving, and the memory, for which one load after the other has its turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from protocol.errors import CodedError, ErrorCode
from supervisor.actor import Actor
from supervisor.gate import NO_OPTIONS, Gate, LoadSpec, ModelSpec
from supervisor.ids import complaint_about_id
from supervisor.isolation import Quarters
from supervisor.memory_room import MemoryRoom
from supervisor.resting import Resting
from supervisor.services import Services
from supervisor.status import note_refusal


class Loads:
    """Adds to ``actors``, and takes out what is gone. Methods run on the event loop.

    ``gate`` tells the present one: a reload makes another.
    """

    def __init__(
        self,
        actors: dict[str, Actor],
        services: Services,
        gate: Callable[[], Gate],
        *,
        room: MemoryRoom,
        quarters: Quarters,
        resting: Resting,
    ) -> None:
        self._actors = actors
        self._services = services
        self._gate = gate
        self._room = room
        self._quarters = quarters
        self._resting = resting
        #: How what is loaded, or was until it was idle, was asked for.
        self._last: dict[str, LoadSpec] = {}
        #: Ids whose loads are being looked at, with their number.
        self._waiting: Counter[str] = Counter()
        self._closed = False

    def __contains__(self, model_id: str) -> bool:
        """Whether a load of the model is being looked at."""
        return self._waiting[model_id] > 0

    def announce(self, model_ids: Iterable[str]) -> None:
        """They are about to be loaded, each until it is ``left``."""
        self._waiting.update(model_ids)

    def leave(self, model_id: str) -> None:
        """One of those who wait for the model waits no more."""
        self._waiting[model_id] -= 1
        if not self._waiting[model_id]:
            del self._waiting[model_id]

    def forget(self, model_id: str) -> LoadSpec | None:
        """How it was loaded, which does not matter any more: an operator wants it gone."""
        return self._last.pop(model_id, None)

    def remember(self, model_id: str, spec: LoadSpec | None) -> None:
        """The operator does not, after all."""
        if spec is not None:
            self._last.setdefault(model_id, spec)

    def close(self) -> None:
        """From now on nothing is loaded: who waits gets ``server_shutting_down``."""
        self._closed = True

    def wanted(self, model_id: str) -> bool:
        """Whether a request for the model has to wait for ``prepare``."""
        actor = self._actors.get(model_id)
        return (
            self._services.settings.load_on_demand
            and (actor is None or actor.leaving)
            and self._resting.view(model_id) is None
            and not Path(model_id).is_absolute()
        )

    async def prepare(self, model_id: str, options: Mapping[str, Any] = NO_OPTIONS) -> None:
        """See ``Fleet.prepare``."""
        if not self.wanted(model_id):
            return
        if self._waiting[model_id] >= self._services.settings.max_queue:
            raise CodedError(
                ErrorCode.RATE_LIMIT_EXCEEDED,
                f"{self._waiting[model_id]} requests wait for model {model_id!r} to be loaded",
                retry_after_s=1.0,
            )
        # As it was loaded before, but for what an operator has to say each time.
        known = self._last.get(model_id, LoadSpec(model_id=model_id))
        known = msgspec.structs.replace(known, allow_unsupported_runtime=False, may_evict=True)
        spec = msgspec.structs.replace(known, **options)
        if complaint_about_id(model_id) or self._gate().id_of(spec) != model_id:
            return
        try:
            if model_id not in self._last:
                path = await self._gate().locate(spec)
                if any(other.spec.files.path == path for other in self._actors.values()):
                    return  # by another name it is loaded already
            await self.admit(spec)
        except CodedError as error:
            # A conflict: somebody else's load with other options was quicker, and will do.
            if error.code not in (ErrorCode.MODEL_NOT_FOUND, ErrorCode.MODEL_CONFLICT):
                raise

    async def admit(self, spec: LoadSpec) -> Actor:
        """The actor that loads, or has loaded, the model; a new one if the gate lets it pass.

        Raises ``CodedError``. Who is cancelled gives up their own wait, and nobody else's.
        """
        model_id = self._gate().id_of(spec)
        self._waiting[model_id] += 1
        try:
            while True:
                await self._settled(model_id)
                actor = self._actors.get(model_id)
                if actor is not None and not actor.rests:
                    await self._gate().check_same(actor.spec, spec)
                    same = self._actors.get(model_id) is actor
                    if same and actor.stays:
                        return actor
                    continue
                model = await self._gate().admit(spec)
                async with self._room.turn:
                    if not self._is_free(model_id, actor):
                        continue
                    account = self._services.accounts.get(model.account_key)
                    if spec.allow_unsupported_runtime or not account.quarantined:
                        plan = await self._room.make(model, may_evict=spec.may_evict)
                        model = replace(model, plan=plan)
                    # Nothing waits from here on: what is found now is what is used.
                    if self._is_free(model_id, actor):
                        return self._wake(actor, model, spec)
        except CodedError as error:
            note_refusal(self._services.journal, model_id, error)
            raise
        finally:
            self.leave(model_id)

    def _is_free(self, model_id: str, actor: Actor | None) -> bool:
        """Whether the model may be given a worker, as when ``actor`` was what there was."""
        if self._closed:
            raise CodedError(ErrorCode.SHUTTING_DOWN, "the server is shutting down")
        same = self._actors.get(model_id) is actor
        return same and (actor is None or (actor.rests and not actor.leaving))

    async def _settled(self, model_id: str) -> None:
        """Wait until the model is not on its way out."""
        while (actor := self._actors.get(model_id)) is not None and actor.leaving:
            await actor.changed()

    def _wake(self, actor: Actor | None, model: ModelSpec, spec: LoadSpec) -> Actor:
        """Start what the gate admitted: a new actor, or the quarantined one on probation."""
        self._resting.admitted(model.account_key)
        if actor is not None and actor.spec.account_key == model.account_key:
            if not spec.allow_unsupported_runtime:
                raise actor.unstable()
            actor.load_again(model)
            return actor
        if actor is not None:
            # Another file or backend version: its quarantine is none of ours.
            del self._actors[model.model_id]
            actor.abandon()
        return self._create(model, spec)

    def _create(self, model: ModelSpec, spec: LoadSpec) -> Actor:
        model_id = model.model_id

        def forget() -> None:
            del self._actors[model_id]

        self._last[model_id] = spec
        self._actors[model_id] = actor = Actor(model, self._services, self._quarters, forget)
        actor.start(probation=spec.allow_unsupported_runtime)
        if actor.rests:
            raise actor.unstable()
        return actor

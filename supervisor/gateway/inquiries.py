"""Asking a model's worker something that takes no slot, for as long as the client waits."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec

from protocol.messages import Detokenize, Detokenized, Tokenize, Tokenized
from supervisor.gate import NO_OPTIONS
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import DeadlinePassed
from supervisor.gateway.presence import while_there
from supervisor.gateway.routing import candidates
from supervisor.gateway.scheduling import Terms

T = TypeVar("T")


async def tokenize(
    gateway: Gateway, call: Call, model: str, inquiry: Tokenize, terms: Terms
) -> Tokenized:
    """Raises what ``Fleet.tokenize`` does, ``request_timeout`` and ``ClientDisconnected``."""
    asked = msgspec.structs.replace(inquiry.generate, client=terms.client, priority=terms.priority)
    inquiry = msgspec.structs.replace(inquiry, generate=asked)

    def ask(model_id: str) -> Awaitable[Tokenized]:
        return gateway.fleet.tokenize(model_id, inquiry)

    return await _answered(call, _asked(gateway, call, model, ask), terms)


async def detokenize(
    gateway: Gateway, call: Call, model: str, inquiry: Detokenize, terms: Terms
) -> Detokenized:
    """As ``tokenize``."""
    inquiry = msgspec.structs.replace(inquiry, client=terms.client, priority=terms.priority)

    def ask(model_id: str) -> Awaitable[Detokenized]:
        return gateway.fleet.detokenize(model_id, inquiry)

    return await _answered(call, _asked(gateway, call, model, ask), terms)


async def _asked(gateway: Gateway, call: Call, model: str, ask: Callable[[str], Awaitable[T]]) -> T:
    """By the model of this id, or the first that can of those that the name stands for."""

    async def attempt(model_id: str, options: Mapping[str, Any]) -> T:
        await gateway.fleet.prepare(model_id, options)
        call.model = gateway.fleet.model(model_id).id
        answer = await ask(model_id)
        call.served_by = call.model
        return answer

    route = gateway.names.routes.get(model)
    if route is None:
        return await attempt(model, NO_OPTIONS)
    return await (await candidates(gateway, model, route, attempt)).first()


async def _answered(call: Call, question: Coroutine[Any, Any, T], terms: Terms) -> T:
    remaining_s = None
    if terms.timeout_s is not None:
        remaining_s = terms.arrived + terms.timeout_s - time.perf_counter()
    try:
        return await while_there(call.receive, question, remaining_s)
    except TimeoutError as error:
        raise DeadlinePassed(terms.timeout_s or 0.0, 0) from error

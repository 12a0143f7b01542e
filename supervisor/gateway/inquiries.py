"""Asking a model's worker something that takes no slot, for as long as the client waits."""

from __future__ import annotations

import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec

from protocol.messages import Detokenize, Detokenized, Tokenize, Tokenized
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import DeadlinePassed
from supervisor.gateway.presence import while_there
from supervisor.gateway.scheduling import Terms

T = TypeVar("T")


async def tokenize(
    gateway: Gateway, call: Call, model: str, inquiry: Tokenize, terms: Terms
) -> Tokenized:
    """Raises what ``Fleet.tokenize`` does, ``request_timeout`` and ``ClientDisconnected``."""
    asked = msgspec.structs.replace(inquiry.generate, client=terms.client, priority=terms.priority)
    inquiry = msgspec.structs.replace(inquiry, generate=asked)

    async def ask() -> Tokenized:
        await gateway.fleet.prepare(model)
        call.model = gateway.fleet.model(model).id
        return await gateway.fleet.tokenize(model, inquiry)

    return await _answered(call, ask(), terms)


async def detokenize(
    gateway: Gateway, call: Call, model: str, inquiry: Detokenize, terms: Terms
) -> Detokenized:
    """As ``tokenize``."""
    inquiry = msgspec.structs.replace(inquiry, client=terms.client, priority=terms.priority)

    async def ask() -> Detokenized:
        await gateway.fleet.prepare(model)
        call.model = gateway.fleet.model(model).id
        return await gateway.fleet.detokenize(model, inquiry)

    return await _answered(call, ask(), terms)


async def _answered(call: Call, question: Coroutine[Any, Any, T], terms: Terms) -> T:
    remaining_s = None
    if terms.timeout_s is not None:
        remaining_s = terms.arrived + terms.timeout_s - time.perf_counter()
    try:
        return await while_there(call.receive, question, remaining_s)
    except TimeoutError as error:
        raise DeadlinePassed(terms.timeout_s or 0.0, 0) from error

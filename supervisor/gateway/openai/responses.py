"""``POST /v1/responses``."""

from __future__ import annotations

import time

import msgspec
from starlette.responses import Response as HttpResponse

from protocol.errors import CodedError, ErrorCode
from protocol.messages import FinishReason
from supervisor.gateway.body import read_json
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import json_response
from supervisor.gateway.generation import collect, submit
from supervisor.gateway.openai.responses_answers import Response, finished, new_response
from supervisor.gateway.openai.responses_background import Background
from supervisor.gateway.openai.responses_events import ResponseEvents
from supervisor.gateway.openai.responses_input import items_of
from supervisor.gateway.openai.responses_items import Item, Message
from supervisor.gateway.openai.responses_output import OutputBuilder
from supervisor.gateway.openai.responses_request import (
    LOGPROBS,
    SEALED_REASONING,
    ResponseRequest,
    to_generate,
)
from supervisor.gateway.openai.responses_store import Stored
from supervisor.gateway.openai.responses_tools import namespaced
from supervisor.gateway.openai.turns import SYSTEM_ROLES
from supervisor.gateway.preset_fields import add_preset
from supervisor.gateway.scheduling import key_digest, terms_of
from supervisor.gateway.streaming import open_event_stream

_decoder = msgspec.json.Decoder(ResponseRequest)


async def create_response(gateway: Gateway, call: Call) -> HttpResponse:
    started = time.perf_counter()
    request = await read_json(call, _decoder, gateway.settings)
    store, owner = gateway.responses, key_digest(call)
    previous = _previous(gateway, owner, request.previous_response_id)

    def find(item_id: str) -> Item | None:
        return store.item(owner, item_id)

    given = items_of(request.input, find)
    before = previous.conversation_items if previous is not None else []
    add_preset(gateway, request, has_system_prompt=any(map(_is_of_system, before)))
    generate = to_generate(request, [*before, *given])
    streaming, keeping = bool(request.stream), request.store is not False and store.keeps
    response = new_response(request, store=keeping)
    include = request.include or ()
    builder = OutputBuilder(
        sealed=SEALED_REASONING in include,
        summarised=response.reasoning.summary is not None,
        logprobs=LOGPROBS in include,
        namespaced=namespaced(request.tools),
    )

    def keep(response: Response) -> None:
        if keeping:
            encoded = msgspec.json.encode(response)
            store.put(owner, response.id, encoded, previous, given, response.output)

    def make_events() -> ResponseEvents:
        response.model = call.model or response.model
        response.status = "in_progress"
        return ResponseEvents(response, builder, keep)

    terms = terms_of(call, started, api_key=gateway.settings.api_key, claims=request.claims)
    if request.background:
        background = Background(gateway, call, response, make_events)
        await background.start(request.model, generate, terms, started)
        return background.followed() if streaming else background.answer()
    streams = await submit(gateway, call, request.model, [generate], terms, streaming=streaming)
    if streaming:
        return await open_event_stream(gateway, call, streams, make_events, started)
    [answer] = await collect(gateway, call, streams)
    response.model = call.model
    builder.feed(answer.text, answer.extras)
    finish = answer.finish or FinishReason.STOP
    builder.finish(finish)
    response = finished(response, builder.items, finish, streams[0])
    keep(response)
    return json_response(response)


def _is_of_system(item: Item) -> bool:
    return isinstance(item, Message) and item.role in SYSTEM_ROLES


def _previous(gateway: Gateway, owner: str, response_id: str | None) -> Stored | None:
    if response_id is None:
        return None
    stored = gateway.responses.get(owner, response_id)
    if stored is None:
        raise CodedError(
            ErrorCode.PREVIOUS_RESPONSE_NOT_FOUND,
            f"there is no response {response_id[:100]!r}: it was not stored, or is not any more; "
            "send the whole conversation as input",
            param="previous_response_id",
        )
    return stored

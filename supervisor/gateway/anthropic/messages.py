"""``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import time

import msgspec
from starlette.responses import Response

from protocol.messages import Tokenize
from supervisor.gateway import inquiries
from supervisor.gateway.anthropic.answers import answered_message
from supervisor.gateway.anthropic.errors import REQUEST_ID
from supervisor.gateway.anthropic.events import MessageEvents
from supervisor.gateway.anthropic.parameters import (
    MessageRequest,
    PromptRequest,
    to_generate,
    to_prompt,
)
from supervisor.gateway.body import read_json
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import json_response
from supervisor.gateway.generation import collect, submit
from supervisor.gateway.preset_fields import add_preset
from supervisor.gateway.scheduling import terms_of
from supervisor.gateway.streaming import open_event_stream

_message_decoder = msgspec.json.Decoder(MessageRequest)
_prompt_decoder = msgspec.json.Decoder(PromptRequest)


class TokenCount(msgspec.Struct):
    input_tokens: int


async def messages(gateway: Gateway, call: Call) -> Response:
    started = time.perf_counter()
    request = await read_json(call, _message_decoder, gateway.settings)
    add_preset(gateway, request)
    streaming = bool(request.stream)
    terms = terms_of(call, started, api_key=gateway.settings.api_key, claims=request.claims)
    generate = to_generate(request)
    streams = await submit(gateway, call, request.model, [generate], terms, streaming=streaming)
    shows_thinking = request.shows_thinking
    if streaming:

        def make_events() -> MessageEvents:
            return MessageEvents(call.model, call.request_id, shows_thinking=shows_thinking)

        return _named(call, await open_event_stream(gateway, call, streams, make_events, started))
    [answer] = await collect(gateway, call, streams)
    whole = answered_message(call.model, answer, streams[0], shows_thinking=shows_thinking)
    return _named(call, json_response(whole))


async def count_tokens(gateway: Gateway, call: Call) -> Response:
    """Of the prompt as the model would get it, tools and all."""
    started = time.perf_counter()
    request = await read_json(call, _prompt_decoder, gateway.settings)
    add_preset(gateway, request)
    terms = terms_of(call, started, api_key=gateway.settings.api_key)
    inquiry = Tokenize(0, to_prompt(request), count_only=True)
    told = await inquiries.tokenize(gateway, call, request.model, inquiry, terms)
    return _named(call, json_response(TokenCount(told.count)))


def _named(call: Call, response: Response) -> Response:
    response.raw_headers.append((REQUEST_ID, call.request_id))
    return response

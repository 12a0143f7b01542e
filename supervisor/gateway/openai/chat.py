"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from starlette.responses import Response

from protocol.chat import ChatMessage
from protocol.errors import CodedError, ErrorCode
from protocol.messages import FinishReason, Generate
from supervisor.gateway.body import read_json
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import json_response
from supervisor.gateway.generation import collect, fingerprint, submit
from supervisor.gateway.openai.answers import (
    ChatAnswerMessage,
    ChatChoice,
    ChatChunks,
    ChatCompletion,
    new_id,
    usage,
)
from supervisor.gateway.openai.parameters import (
    Parameters,
    PositiveInt,
    invalid_value,
    refuse_unsupported,
    unsupported,
)
from supervisor.gateway.scheduling import terms_of
from supervisor.gateway.streaming import open_event_stream


class Part(msgspec.Struct):
    type: str
    text: str | None = None


class Turn(msgspec.Struct, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None
    refusal: Any = None


class ChatRequest(Parameters, kw_only=True):
    messages: list[Turn]
    max_completion_tokens: PositiveInt | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


#: Documented fields that cannot be honoured, with the values that ask for nothing.
_REQUEST_LIMITS: Mapping[str, Sequence[Any]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "modalities": (["text"], []),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_TURN_LIMITS: Mapping[str, Sequence[Any]] = {
    "tool_calls": ([],),
    "function_call": (),
    "audio": (),
    "refusal": ("",),
}

_decoder = msgspec.json.Decoder(ChatRequest)


async def chat_completions(gateway: Gateway, call: Call) -> Response:
    started = time.perf_counter()
    request = await read_json(call, _decoder, gateway.settings)
    streaming = bool(request.stream)
    terms = terms_of(call, started, api_key=gateway.settings.api_key, claims=request.claims)
    generates = [to_generate(request)]
    streams = submit(gateway, call, request.model, generates, terms, streaming=streaming)
    system_fingerprint = fingerprint(gateway, request.model)
    if streaming:
        events = ChatChunks(request.model, system_fingerprint, include_usage=request.include_usage)
        return await open_event_stream(gateway, call, streams[0], events, started)
    [answer] = await collect(gateway, call, streams)
    completion = ChatCompletion(
        id=new_id("chatcmpl"),
        created=int(time.time()),
        model=request.model,
        choices=[ChatChoice(ChatAnswerMessage(answer.text), answer.finish or FinishReason.STOP)],
        usage=usage(streams),
        system_fingerprint=system_fingerprint,
    )
    return json_response(completion)


def to_generate(request: ChatRequest) -> Generate:
    """Raises ``CodedError`` for what the decoder cannot see."""
    refuse_unsupported(request, _REQUEST_LIMITS)
    if not request.messages:
        raise invalid_value("messages", "must not be empty")
    max_tokens = request.max_completion_tokens
    return Generate(
        request_id=0,
        messages=[_message(turn, f"messages[{i}]") for i, turn in enumerate(request.messages)],
        sampling=request.sampling(),
        max_tokens=request.max_tokens if max_tokens is None else max_tokens,
        stop=request.stops(),
        ignore_eos=bool(request.ignore_eos),
    )


def _message(turn: Turn, at: str) -> ChatMessage:
    try:
        refuse_unsupported(turn, _TURN_LIMITS)
    except CodedError as error:
        raise unsupported(f"{at}.{error.param}") from None
    # Chat templates know the role under its older name.
    role = "system" if turn.role == "developer" else turn.role
    return ChatMessage(role, _content(turn.content, f"{at}.content"), turn.name)


def _content(content: str | list[Part] | None, at: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise CodedError(ErrorCode.MISSING_PARAMETER, f"{at} is required", param=at)
    if not content:
        raise invalid_value(at, "must not be empty")
    texts = []
    for i, part in enumerate(content):
        if part.type != "text":
            raise unsupported(f"{at}[{i}]", f"parts of type {part.type[:50]!r} are")
        if part.text is None:
            param = f"{at}[{i}].text"
            raise CodedError(ErrorCode.MISSING_PARAMETER, f"{param} is required", param=param)
        texts.append(part.text)
    return "\n".join(texts)

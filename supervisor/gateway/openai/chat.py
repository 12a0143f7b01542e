"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.responses import Response

from protocol.messages import Generate
from supervisor.gateway.body import read_json
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import json_response
from supervisor.gateway.generation import collect, fingerprint, submit
from supervisor.gateway.openai.answers import (
    ChatChunks,
    ChatCompletion,
    chat_choice,
    new_id,
    timings,
    usage,
)
from supervisor.gateway.openai.parameters import (
    Parameters,
    PositiveInt,
    invalid_value,
    refuse_unsupported,
    several,
)
from supervisor.gateway.openai.tools import (
    Choice,
    ResponseFormat,
    ToolSpec,
    constraint_of,
    tool_use,
)
from supervisor.gateway.openai.turns import SYSTEM_ROLES, Turn, checked_options, messages_of
from supervisor.gateway.preset_fields import add_preset, settled_by_effort
from supervisor.gateway.scheduling import terms_of
from supervisor.gateway.streaming import open_event_stream


class ChatRequest(Parameters, kw_only=True):
    messages: list[Turn]
    max_completion_tokens: PositiveInt | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    reasoning_effort: str | None = None
    #: Further variables for the model's chat template, such as ``enable_thinking``.
    chat_template_kwargs: dict[str, Any] | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    @property
    def has_system_prompt(self) -> bool:
        return any(turn.role in SYSTEM_ROLES for turn in self.messages)

    @property
    def settled_options(self) -> Collection[str]:
        return settled_by_effort(self.reasoning_effort)

    def add_system_prompt(self, prompt: str) -> None:
        self.messages = [Turn(role="system", content=prompt), *self.messages]


#: Documented fields that cannot be honoured, with the values that ask for nothing.
_LIMITS: Mapping[str, Sequence[Any]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"], []),
    "audio": (),
    "prediction": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}

_decoder = msgspec.json.Decoder(ChatRequest)


async def chat_completions(gateway: Gateway, call: Call) -> Response:
    started = time.perf_counter()
    request = await read_json(call, _decoder, gateway.settings)
    add_preset(gateway, request)
    streaming = bool(request.stream)
    terms = terms_of(call, started, api_key=gateway.settings.api_key, claims=request.claims)
    answers = request.n or 1
    generates = several(to_generate(request), answers)
    streams = await submit(gateway, call, request.model, generates, terms, streaming=streaming)
    if streaming:

        def make_events() -> ChatChunks:
            return ChatChunks(
                call.model,
                fingerprint(gateway, call.model),
                include_usage=request.include_usage,
                answers=answers,
                logprobs=bool(request.logprobs),
            )

        return await open_event_stream(gateway, call, streams, make_events, started)
    chunks = await collect(gateway, call, streams)
    completion = ChatCompletion(
        id=new_id("chatcmpl"),
        created=int(time.time()),
        model=call.model,
        choices=[
            chat_choice(i, chunk, logprobs=bool(request.logprobs)) for i, chunk in enumerate(chunks)
        ],
        usage=usage(streams, answers),
        system_fingerprint=fingerprint(gateway, call.model),
        timings=timings(streams),
    )
    return json_response(completion)


def to_generate(request: ChatRequest) -> Generate:
    """Raises ``CodedError`` for what the decoder cannot see."""
    refuse_unsupported(request, _LIMITS)
    max_tokens = request.max_completion_tokens
    use = tool_use(request.tools, request.tool_choice)
    return Generate(
        request_id=0,
        messages=messages_of(request.messages),
        sampling=request.sampling(),
        max_tokens=request.max_tokens if max_tokens is None else max_tokens,
        stop=request.stops(),
        ignore_eos=bool(request.ignore_eos),
        tools=use.tools,
        tool_choice=use.choice,
        named_tool=use.named,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        template_options=template_options(request.chat_template_kwargs, request.reasoning_effort),
        constraint=constraint_of(request.response_format),
        top_logprobs=_top_logprobs(request),
        cache_prompt=request.cache_prompt is not False,
    )


def template_options(given: dict[str, Any] | None, effort: str | None) -> dict[str, Any]:
    """Further variables for the chat template; an ``effort`` is one to those that know it."""
    options = checked_options(given)
    if effort is not None:
        options.setdefault("reasoning_effort", effort)
        if effort == "none":
            options.setdefault("enable_thinking", False)
    return options


def _top_logprobs(request: ChatRequest) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise invalid_value("top_logprobs", "needs logprobs to be true")
    return None

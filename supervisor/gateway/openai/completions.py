"""``POST /v1/completions``: text in, text out, no chat template."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import msgspec
from starlette.responses import Response

from protocol.errors import CodedError, ErrorCode
from protocol.messages import FinishReason, Generate
from supervisor.gateway.body import read_json
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import json_response
from supervisor.gateway.generation import collect, fingerprint, submit
from supervisor.gateway.openai.answers import (
    TextChoice,
    TextChunks,
    TextCompletion,
    new_id,
    usage,
)
from supervisor.gateway.openai.parameters import (
    Parameters,
    TokenId,
    invalid_value,
    refuse_unsupported,
)
from supervisor.gateway.scheduling import terms_of
from supervisor.gateway.streaming import open_event_stream

Prompt = str | list[int]


class CompletionRequest(Parameters, kw_only=True):
    prompt: str | list[str | TokenId | list[TokenId]]
    suffix: Any = None
    echo: Any = None
    logprobs: Any = None
    best_of: Any = None


#: Documented fields that cannot be honoured, with the values that ask for nothing.
_LIMITS: Mapping[str, Sequence[Any]] = {
    "n": (1,),
    "suffix": ("",),
    "echo": (False,),
    "logprobs": (),
    "best_of": (1,),
}

_decoder = msgspec.json.Decoder(CompletionRequest)


async def completions(gateway: Gateway, call: Call) -> Response:
    started = time.perf_counter()
    request = await read_json(call, _decoder, gateway.settings)
    requests = to_generates(request, gateway.settings.max_queue)
    streaming = bool(request.stream)
    if streaming and len(requests) > 1:
        raise CodedError(
            ErrorCode.UNSUPPORTED_PARAMETER,
            "prompt: a stream answers one prompt; send one request for each",
            param="prompt",
        )
    terms = terms_of(call, started, api_key=gateway.settings.api_key, claims=request.claims)
    streams = submit(gateway, call, request.model, requests, terms, streaming=streaming)
    system_fingerprint = fingerprint(gateway, request.model)
    if streaming:
        events = TextChunks(request.model, system_fingerprint, include_usage=request.include_usage)
        return await open_event_stream(gateway, call, streams[0], events, started)
    answers = await collect(gateway, call, streams)
    completion = TextCompletion(
        id=new_id("cmpl"),
        created=int(time.time()),
        model=request.model,
        choices=[
            TextChoice(answer.text, i, answer.finish or FinishReason.STOP)
            for i, answer in enumerate(answers)
        ],
        usage=usage(streams),
        system_fingerprint=system_fingerprint,
    )
    return json_response(completion)


def to_generates(request: CompletionRequest, max_prompts: int) -> list[Generate]:
    """One for each prompt. Raises ``CodedError`` for what the decoder cannot see."""
    refuse_unsupported(request, _LIMITS)
    prompts = _prompts(request.prompt)
    if len(prompts) > max_prompts:
        raise invalid_value("prompt", f"at most {max_prompts} prompts, as many as fit the queue")
    sampling, stops = request.sampling(), request.stops()
    return [
        Generate(
            request_id=0,
            prompt=prompt,
            sampling=sampling,
            max_tokens=request.max_tokens,
            stop=stops,
            ignore_eos=bool(request.ignore_eos),
        )
        for prompt in prompts
    ]


def _prompts(prompt: str | list[str | int | list[int]]) -> list[Prompt]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt or [] in prompt:
        raise invalid_value("prompt", "must not be empty")
    if _all_ids(prompt):
        return [prompt]
    if _all_texts(prompt) or _all_id_lists(prompt):
        return list(prompt)
    raise CodedError(
        ErrorCode.INVALID_TYPE,
        "prompt: must be a string, a list of token ids, or a list of either",
        param="prompt",
    )


def _all_ids(prompt: Sequence[object]) -> TypeGuard[list[int]]:
    return all(isinstance(item, int) for item in prompt)


def _all_texts(prompt: Sequence[object]) -> TypeGuard[list[str]]:
    return all(isinstance(item, str) for item in prompt)


def _all_id_lists(prompt: Sequence[object]) -> TypeGuard[list[list[int]]]:
    return all(isinstance(item, list) for item in prompt)

"""``POST /v1/completions``: text in, text out, no chat template."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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
    TextChunks,
    TextCompletion,
    new_id,
    text_choice,
    timings,
    usage,
)
from supervisor.gateway.openai.parameters import (
    Parameters,
    TokenId,
    invalid_value,
    refuse_unsupported,
    several,
    texts_or_tokens,
    unsupported,
)
from supervisor.gateway.preset_fields import add_preset
from supervisor.gateway.scheduling import terms_of
from supervisor.gateway.streaming import open_event_stream
from supervisor.places import most_of_one


class CompletionRequest(Parameters, kw_only=True):
    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    suffix: Any = None
    best_of: Any = None


#: Documented fields that cannot be honoured, with the values that ask for nothing.
_LIMITS: Mapping[str, Sequence[Any]] = {
    "suffix": ("",),
    "best_of": (1,),
}

_decoder = msgspec.json.Decoder(CompletionRequest)


async def completions(gateway: Gateway, call: Call) -> Response:
    started = time.perf_counter()
    request = await read_json(call, _decoder, gateway.settings)
    add_preset(gateway, request)
    requests = to_generates(request, most_of_one(gateway.settings.max_queue))
    streaming = bool(request.stream)
    answers_per_prompt = request.n or 1
    terms = terms_of(call, started, api_key=gateway.settings.api_key, claims=request.claims)
    streams = await submit(gateway, call, request.model, requests, terms, streaming=streaming)
    if streaming:

        def make_events() -> TextChunks:
            return TextChunks(
                call.model,
                fingerprint(gateway, call.model),
                include_usage=request.include_usage,
                answers=len(requests),
                answers_per_prompt=answers_per_prompt,
                top_logprobs=request.logprobs,
            )

        return await open_event_stream(gateway, call, streams, make_events, started)
    answers = await collect(gateway, call, streams)
    completion = TextCompletion(
        id=new_id("cmpl"),
        created=int(time.time()),
        model=call.model,
        choices=[
            text_choice(i, answer, logprobs=request.logprobs is not None)
            for i, answer in enumerate(answers)
        ],
        usage=usage(streams, answers_per_prompt),
        system_fingerprint=fingerprint(gateway, call.model),
        timings=timings(streams),
    )
    return json_response(completion)


def to_generates(request: CompletionRequest, max_prompts: int) -> list[Generate]:
    """``n`` for each prompt. Raises ``CodedError`` for what the decoder cannot see."""
    refuse_unsupported(request, _LIMITS)
    if request.echo and request.logprobs is not None:
        raise unsupported("echo", "log probabilities of the prompt are")
    prompts, answers = texts_or_tokens(request.prompt, "prompt"), request.n or 1
    if len(prompts) * answers > max_prompts:
        raise invalid_value(
            "prompt", f"at most {max_prompts} answers, prompts times n, as many as fit the queue"
        )
    sampling, stops = request.sampling(), request.stops()
    requests = [
        Generate(
            request_id=0,
            prompt=prompt,
            sampling=sampling,
            max_tokens=request.max_tokens,
            stop=stops,
            ignore_eos=bool(request.ignore_eos),
            top_logprobs=request.logprobs,
            echo=bool(request.echo),
            cache_prompt=request.cache_prompt is not False,
        )
        for prompt in prompts
    ]
    return [each for request in requests for each in several(request, answers)]

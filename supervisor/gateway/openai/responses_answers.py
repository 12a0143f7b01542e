"""The response object: what was asked, echoed with its defaults, and what was answered."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Literal

import msgspec

from protocol.errors import CodedError
from protocol.messages import FinishReason, Sampling
from supervisor.gateway.errors import error_object
from supervisor.gateway.openai.responses_items import OutputItem
from supervisor.gateway.openai.responses_request import Format, ResponseRequest
from supervisor.gateway.openai.responses_tools import (
    AnsweredNamespace,
    AnsweredTool,
    ToolChoice,
    answered_tools,
)
from supervisor.gateway.openai.tools import TextFormat
from supervisor.stream import RequestStream

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class IncompleteDetails(msgspec.Struct):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class InputTokensDetails(msgspec.Struct):
    cached_tokens: int
    #: Writing to the prompt cache is no extra work here.
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class AnsweredText(msgspec.Struct):
    format: Format
    verbosity: Literal["medium"] = "medium"


class AnsweredReasoning(msgspec.Struct):
    effort: str | None
    summary: str | None


class Response(msgspec.Struct, kw_only=True):
    """As it begins; ``finished``, ``failed`` and ``cancelled`` say how it ends."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status = "in_progress"
    background: bool = False
    completed_at: int | None = None
    conversation: None = None
    error: dict[str, str | int | None] | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: Sequence[OutputItem] = ()
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: AnsweredReasoning
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: AnsweredText
    tool_choice: Literal["none", "auto", "required"] | ToolChoice
    tools: list[AnsweredTool | AnsweredNamespace]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


def new_response(request: ResponseRequest, *, store: bool) -> Response:
    """To a request that has been found valid."""
    sampling: Sampling = request.sampling()
    max_tokens = request.max_output_tokens
    reasoning = request.reasoning
    text_format = request.text.format if request.text is not None else None
    return Response(
        # Who has the id can read the response: it must not be guessed.
        id=f"resp_{secrets.token_hex(24)}",
        created_at=int(time.time()),
        status="queued" if request.background else "in_progress",
        background=bool(request.background),
        instructions=request.instructions,
        max_output_tokens=request.max_tokens if max_tokens is None else max_tokens,
        max_tool_calls=request.max_tool_calls,
        metadata=request.metadata or {},
        model=request.model,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id,
        prompt_cache_key=_text_or_none(request.prompt_cache_key),
        reasoning=AnsweredReasoning(
            effort=reasoning.effort if reasoning is not None else None,
            summary=reasoning.wanted_summary if reasoning is not None else None,
        ),
        safety_identifier=_text_or_none(request.safety_identifier),
        store=store,
        temperature=sampling.temperature,
        text=AnsweredText(text_format or TextFormat()),
        tool_choice=request.tool_choice or "auto",
        tools=answered_tools(request.tools),
        top_logprobs=request.top_logprobs or 0,
        top_p=sampling.top_p,
        user=_text_or_none(request.user),
    )


def finished(
    response: Response, items: Sequence[OutputItem], finish: FinishReason, stream: RequestStream
) -> Response:
    """The response with its answer, which may have been cut off."""
    cut_off = finish is FinishReason.LENGTH
    return msgspec.structs.replace(
        response,
        status="incomplete" if cut_off else "completed",
        completed_at=None if cut_off else int(time.time()),
        incomplete_details=IncompleteDetails() if cut_off else None,
        output=items,
        usage=_usage(stream),
    )


def failed(response: Response, items: Sequence[OutputItem], error: CodedError) -> Response:
    """The response with what there is of an answer, and the error object of an envelope."""
    return msgspec.structs.replace(
        response, status="failed", output=items, error=error_object(error)
    )


def cancelled(response: Response, items: Sequence[OutputItem]) -> Response:
    """The response as far as it was when somebody asked for its end."""
    return msgspec.structs.replace(response, status="cancelled", output=items)


def _usage(stream: RequestStream) -> ResponseUsage:
    return ResponseUsage(
        stream.prompt_tokens,
        InputTokensDetails(stream.cached_tokens),
        stream.completion_tokens,
        OutputTokensDetails(stream.reasoning_tokens),
        stream.prompt_tokens + stream.completion_tokens,
    )


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None

"""What ``POST /v1/responses`` takes, and the request to a worker that it asks for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from protocol.chat import Constraint
from protocol.messages import Generate
from supervisor.gateway.openai.chat import template_options
from supervisor.gateway.openai.parameters import (
    Parameters,
    PositiveInt,
    StreamOptions,
    invalid_value,
    refuse_unsupported,
)
from supervisor.gateway.openai.responses_input import InputItem, messages_of
from supervisor.gateway.openai.responses_items import Item
from supervisor.gateway.openai.responses_tools import ResponseTool, ToolChoice, tool_use_of
from supervisor.gateway.openai.tools import (
    GrammarFormat,
    JsonFormat,
    Name,
    RegexFormat,
    SchemaFormat,
    SchemaSpec,
    TextFormat,
    constraint_of,
)
from supervisor.gateway.openai.turns import SYSTEM_ROLES
from supervisor.gateway.preset_fields import settled_by_effort

LOGPROBS = "message.output_text.logprobs"
SEALED_REASONING = "reasoning.encrypted_content"

#: The others are about items of tools that are refused: there are none to include.
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
Metadata = dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]]


class ObfuscatedStreamOptions(StreamOptions):
    include_obfuscation: bool | None = None


class FlatSchemaFormat(msgspec.Struct, tag="json_schema"):
    name: Name
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


Format = TextFormat | JsonFormat | FlatSchemaFormat | RegexFormat | GrammarFormat


class TextConfig(msgspec.Struct):
    format: Format | None = None
    verbosity: Any = None


class ReasoningConfig(msgspec.Struct):
    effort: str | None = None
    summary: Any = None
    generate_summary: Any = None
    context: Any = None
    mode: Any = None

    @property
    def wanted_summary(self) -> Literal["auto", "detailed"] | None:
        """Of a request that has been found valid; the second name is the older one."""
        wanted: Literal["auto", "detailed"] | None = self.summary or self.generate_summary
        return wanted


class ResponseRequest(Parameters, kw_only=True):
    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: PositiveInt | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: list[Includable] | None = None
    metadata: Annotated[Metadata, Meta(max_length=16)] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    stream_options: ObfuscatedStreamOptions | None = None
    #: Of tools that run on the server, of which there are none.
    max_tool_calls: PositiveInt | None = None
    prompt_cache_key: Any = None
    #: Further variables for the model's chat template, such as ``enable_thinking``.
    chat_template_kwargs: dict[str, Any] | None = None
    access_programs: Any = None
    background: bool | None = None
    background_options: Any = None
    context_management: Any = None
    conversation: Any = None
    image: Any = None
    moderation: Any = None
    prompt: Any = None
    prompt_cache_options: Any = None
    truncation: Any = None

    @property
    def has_system_prompt(self) -> bool:
        if self.instructions:
            return True
        items = [] if isinstance(self.input, str) else self.input
        return any(item.role in SYSTEM_ROLES for item in items)

    @property
    def settled_options(self) -> Collection[str]:
        return settled_by_effort(self.reasoning.effort if self.reasoning is not None else None)

    def add_system_prompt(self, prompt: str) -> None:
        self.instructions = prompt


#: Documented fields that cannot be honoured, with the values that ask for nothing.
_LIMITS: Mapping[str, Sequence[Any]] = {
    "n": (1,),
    "access_programs": (),
    "background_options": ({},),
    "context_management": ([],),
    "conversation": (),
    "image": ({},),
    "moderation": (),
    "prompt": (),
    "prompt_cache_options": ({}, {"mode": "implicit"}),
    "truncation": ("disabled",),
}
_TEXT_LIMITS: Mapping[str, Sequence[Any]] = {"verbosity": ("medium",)}
#: Who asks for a summary gets the reasoning itself, which is the most detailed one there is.
_SUMMARIES = ("auto", "detailed")
_REASONING_LIMITS: Mapping[str, Sequence[Any]] = {
    "summary": _SUMMARIES,
    "generate_summary": _SUMMARIES,
    "context": ("auto",),
    "mode": ("standard",),
}
_STREAM_LIMITS: Mapping[str, Sequence[Any]] = {"include_obfuscation": (False,)}


def to_generate(request: ResponseRequest, items: Sequence[Item]) -> Generate:
    """``items`` are the whole conversation.

    Raises ``CodedError`` for what the decoder cannot see.
    """
    refuse_unsupported(request, _LIMITS)
    for name, fields, limits in (
        ("text", request.text, _TEXT_LIMITS),
        ("reasoning", request.reasoning, _REASONING_LIMITS),
        ("stream_options", request.stream_options, _STREAM_LIMITS),
    ):
        if fields is not None:
            refuse_unsupported(fields, limits, at=f"{name}.")
    use = tool_use_of(request.tools, request.tool_choice)
    max_tokens = request.max_output_tokens
    effort = request.reasoning.effort if request.reasoning is not None else None
    return Generate(
        request_id=0,
        messages=messages_of(request.instructions, items),
        sampling=request.sampling(),
        max_tokens=request.max_tokens if max_tokens is None else max_tokens,
        stop=request.stops(),
        ignore_eos=bool(request.ignore_eos),
        tools=use.tools,
        tool_choice=use.choice,
        named_tool=use.named,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        template_options=template_options(request.chat_template_kwargs, effort),
        constraint=_constraint(request.text),
        top_logprobs=_top_logprobs(request),
        cache_prompt=request.cache_prompt is not False,
    )


def _constraint(text: TextConfig | None) -> Constraint | None:
    asked = text.format if text is not None else None
    if isinstance(asked, FlatSchemaFormat):
        spec = SchemaSpec(asked.name, asked.schema, asked.description, asked.strict)
        return constraint_of(SchemaFormat(spec))
    return constraint_of(asked)


def _top_logprobs(request: ResponseRequest) -> int | None:
    if LOGPROBS in (request.include or ()):
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise invalid_value("top_logprobs", f"needs {LOGPROBS!r} in include")
    return None

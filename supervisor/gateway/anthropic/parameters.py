"""The fields of a request, and what the worker is asked for.

The rule for what cannot be honoured is that of ``openai.parameters``: refused by name.
``service_tier``, ``cache_control`` and their like change no answer and are ignored, as
are fields that nobody documents. The last fields of each struct are other servers'
extensions that work on every route here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from protocol.chat import Constraint, ConstraintKind
from protocol.errors import CodedError, ErrorCode
from protocol.messages import Generate, Sampling
from supervisor.gateway.anthropic.blocks import Block, Turn, messages_of
from supervisor.gateway.anthropic.tools import Choice, ToolSpec, tool_use
from supervisor.gateway.openai.parameters import (
    PositiveInt,
    invalid_value,
    refuse_unsupported,
    unsupported,
)
from supervisor.gateway.openai.turns import checked_options
from supervisor.gateway.preset_fields import settled_by_effort

MAX_STOP_SEQUENCES = 64


class Thinking(msgspec.Struct, kw_only=True):
    """``budget_tokens`` is told to the chat template, which may know what to do with it;
    nothing else limits the thinking but ``max_tokens``, of which it is part."""

    type: str
    budget_tokens: PositiveInt | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(msgspec.Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct):
    #: Told to the chat template, as OpenAI's ``reasoning_effort`` is.
    effort: str | None = None
    format: OutputFormat | None = None
    task_budget: Any = None


class PromptRequest(msgspec.Struct, kw_only=True):
    """What decides about the prompt: all that the tokens of one are counted from."""

    model: str
    messages: list[Turn]
    system: str | list[Block] | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    #: The older place of ``output_config.format``.
    output_format: OutputFormat | None = None
    context_management: Any = None
    mcp_servers: Any = None
    speed: Any = None
    #: Further variables for the model's chat template.
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def has_system_prompt(self) -> bool:
        return bool(self.system) or any(turn.role == "system" for turn in self.messages)

    @property
    def settled_options(self) -> Collection[str]:
        effort = self.output_config.effort if self.output_config is not None else None
        if self.thinking is None:
            return settled_by_effort(effort)
        return ("enable_thinking", "thinking_budget", *settled_by_effort(effort))

    def add_system_prompt(self, prompt: str) -> None:
        self.system = prompt


class MessageRequest(PromptRequest, kw_only=True):
    """Bounds are checked by the decoder."""

    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    #: Its ``user_id`` names the client, if it is a text; see ``gateway.scheduling``.
    metadata: dict[str, Any] | None = None
    container: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    #: False: nothing of the prompt is taken from the prompt cache.
    cache_prompt: bool | None = None

    @property
    def claims(self) -> tuple[Any, ...]:
        """What may name the client."""
        return () if self.metadata is None else (self.metadata.get("user_id"),)

    @property
    def shows_thinking(self) -> bool:
        return self.thinking is None or self.thinking.display != "omitted"


#: Documented fields that cannot be honoured, with the values that ask for nothing.
_PROMPT_LIMITS: Mapping[str, Sequence[Any]] = {
    "context_management": (
        {},
        {"edits": []},
        {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    ),
    "mcp_servers": ([],),
    "speed": ("standard",),
}
_LIMITS: Mapping[str, Sequence[Any]] = {
    "container": (),
    "diagnostics": ({}, {"previous_message_id": None}),
    "inference_geo": ("global",),
}


def to_prompt(request: PromptRequest) -> Generate:
    """All that the prompt depends on. Raises ``CodedError`` for what the decoder cannot see."""
    refuse_unsupported(request, _PROMPT_LIMITS)
    use = tool_use(request.tools, request.tool_choice)
    config = request.output_config or OutputConfig()
    if config.task_budget is not None:
        raise unsupported("output_config.task_budget")
    format = config.format or request.output_format
    return Generate(
        request_id=0,
        messages=messages_of(request.system, request.messages),
        tools=use.tools,
        tool_choice=use.choice,
        named_tool=use.named,
        parallel_tool_calls=use.parallel,
        template_options=_template_options(request, config.effort),
        constraint=None if format is None else _constraint(format),
    )


def to_generate(request: MessageRequest) -> Generate:
    """Raises ``CodedError`` for what the decoder cannot see."""
    refuse_unsupported(request, _LIMITS)
    prompt = to_prompt(request)
    if request.max_tokens == 0:
        raise unsupported("max_tokens", "0, to fill the prompt cache alone, is")
    if request.messages[-1].role == "assistant":
        last = f"messages[{len(request.messages) - 1}]"
        raise unsupported(last, "to go on from the beginning of an answer (prefill) is")
    return msgspec.structs.replace(
        prompt,
        sampling=_sampling(request),
        max_tokens=request.max_tokens,
        stop=_stops(request.stop_sequences or []),
        cache_prompt=request.cache_prompt is not False,
    )


def _sampling(request: MessageRequest) -> Sampling:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    given = {name: getattr(request, name) for name in names}
    found = {name: value for name, value in given.items() if value is not None}
    if "top_k" in found:
        # -1 is how other servers' clients say "off".
        found["top_k"] = max(0, found["top_k"])
    return Sampling(**found)


def _stops(stops: list[str]) -> list[str]:
    if len(stops) > MAX_STOP_SEQUENCES:
        raise invalid_value("stop_sequences", f"at most {MAX_STOP_SEQUENCES} of them")
    if "" in stops:
        raise invalid_value("stop_sequences", "a stop sequence must not be empty")
    return stops


def _constraint(format: OutputFormat) -> Constraint:
    return Constraint(ConstraintKind.SCHEMA, msgspec.json.encode(format.schema).decode())


def _template_options(request: PromptRequest, effort: str | None) -> dict[str, Any]:
    options = checked_options(request.chat_template_kwargs)
    if effort is not None:
        options.setdefault("reasoning_effort", effort)
    if (thinking := request.thinking) is None:
        return options
    match thinking.type:
        case "enabled":
            if thinking.budget_tokens is None:
                param = "thinking.budget_tokens"
                raise CodedError(ErrorCode.MISSING_PARAMETER, f"{param} is required", param=param)
            options.setdefault("enable_thinking", True)
            options.setdefault("thinking_budget", thinking.budget_tokens)
        case "adaptive":
            options.setdefault("enable_thinking", True)
        case "disabled":
            options.setdefault("enable_thinking", False)
        case _:
            raise unsupported("thinking.type", f"{thinking.type[:50]!r} is")
    return options

"""What constrains the answer to a chat: an output format, calls that it has to make, or both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from protocol.chat import Constraint, ConstraintKind, Tool, ToolChoice
from protocol.errors import CodedError, ErrorCode
from protocol.messages import Generate
from worker.chat.formats import Format
from worker.chat.grammar import JSON_OPTIONS
from worker.chat.reasoning import Reasoning
from worker.chat.tool_formats import harmony
from worker.chat.tool_grammar import call_grammar, text_with_calls_grammar
from worker.compiler import Source

_FORCED = frozenset({ToolChoice.REQUIRED, ToolChoice.NAMED})


def constraint_of(
    request: Generate, tools: Sequence[Tool], format: Format, reasoning: Reasoning | None = None
) -> tuple[Source | None, str]:
    """The constraint, None for a free answer, and the request's field that it comes from.

    Where calls are possible, an output format is what an answer without a call has, and
    ``strict`` tools are called with what fits their schemas, if the format can be kept to.
    Raises ``CodedError`` for what this model's format cannot be kept to.
    """
    constraint = request.constraint
    forced = request.tool_choice in _FORCED
    if not tools:
        return constraint, "response_format"
    if constraint is None and not forced:
        strict = any(tool.strict for tool in tools)
        return _strict_calls(tools, format, reasoning) if strict else None, "tools"
    if request.tool_choice is ToolChoice.NAMED:
        tools = [tool for tool in tools if tool.name == request.named_tool]
    param = "tool_choice" if forced else "response_format"
    # Refuses what it has to refuse while the request is looked at.
    call_grammar(format, tools, parallel=request.parallel_tool_calls)

    def create(special: Mapping[str, int]) -> Constraint:
        grammar = call_grammar(format, tools, parallel=request.parallel_tool_calls, special=special)
        if constraint is not None and not forced:
            grammar = _either(grammar, constraint)
        return Constraint(ConstraintKind.LARK, grammar)

    return create, param


def _strict_calls(
    tools: Sequence[Tool], format: Format, reasoning: Reasoning | None
) -> Source | None:
    """Free text, but for the calls in it; None where they cannot be told from it."""
    if text_with_calls_grammar(format, tools) is None:
        return None
    free = reasoning.markers if reasoning is not None else ()

    def create(special: Mapping[str, int]) -> Constraint:
        grammar = text_with_calls_grammar(format, tools, special=special, free=free)
        assert grammar is not None
        return Constraint(ConstraintKind.LARK, grammar)

    return create


def closer_of(format: Format, reasoning: Reasoning | None, prompt_tail: str, *, calls: bool) -> str:
    """The text before which an answer is not constrained; empty: it is from its beginning.

    ``calls``: the constraint is of calls; Harmony's has its reasoning in it.
    """
    if format.name == "harmony":
        return "" if calls else f"{harmony.CHANNEL}final{harmony.MESSAGE}"
    if reasoning is not None and reasoning.opened_by(prompt_tail):
        return reasoning.close
    return ""


def _either(calls: str, constraint: Constraint) -> str:
    """A grammar of calls, or of an answer in an output format. Raises ``CodedError``."""
    if constraint.kind is ConstraintKind.JSON:
        schema = {"type": "object"}
    elif constraint.kind is ConstraintKind.SCHEMA:
        schema = json.loads(constraint.text)
    else:
        raise CodedError(
            ErrorCode.UNSUPPORTED_PARAMETER,
            f"response_format: a {constraint.kind.value} does not go with tools; "
            'set tool_choice to "none"',
            param="response_format",
        )
    answer = json.dumps({**schema, "x-guidance": JSON_OPTIONS})
    return f"start: calls | answer\nanswer: %json {answer}\n" + calls.replace("start:", "calls:", 1)

"""Which constraint an answer has: a format, calls, or a choice of both."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.chat import Constraint, ConstraintKind, Tool, ToolChoice
from protocol.errors import CodedError, ErrorCode
from protocol.messages import Generate
from worker.chat.formats import FORMATS
from worker.chat.reasoning import choose_reasoning
from worker.constrained import closer_of, constraint_of

TOOLS = [Tool("f"), Tool("g")]
HERMES = FORMATS["hermes"]
SCHEMA = Constraint(ConstraintKind.SCHEMA, '{"type": "null"}')


def request(**more: Any) -> Generate:
    return Generate(1, messages=[], **more)


def lark(source: object) -> str:
    assert callable(source)
    made = source({})
    assert made.kind is ConstraintKind.LARK
    text = made.text
    assert isinstance(text, str)
    return text


def test_a_free_answer_has_none() -> None:
    assert constraint_of(request(), TOOLS, HERMES)[0] is None
    assert constraint_of(request(), [], HERMES)[0] is None


def test_strict_tools_are_called_by_their_schemas_only() -> None:
    tools = [Tool("f", strict=True), Tool("g")]
    source, param = constraint_of(request(), tools, HERMES, choose_reasoning("<think></think>"))
    assert param == "tools"
    assert callable(source)
    text = source({"<think>": 7, "</think>": 8}).text
    assert isinstance(text, str)
    assert "TEXT <[7]>" in text
    assert '\\"g\\"' in text
    assert constraint_of(request(), tools, FORMATS["llama3"])[0] is None


def test_without_tools_the_format_is_the_constraint() -> None:
    assert constraint_of(request(constraint=SCHEMA), [], HERMES) == (SCHEMA, "response_format")


def test_required_calls_are_of_any_tool_and_named_ones_of_one() -> None:
    source, param = constraint_of(request(tool_choice=ToolChoice.REQUIRED), TOOLS, HERMES)
    assert param == "tool_choice"
    assert '\\"f\\"' in lark(source)
    assert '\\"g\\"' in lark(source)
    named = request(tool_choice=ToolChoice.NAMED, named_tool="g", constraint=SCHEMA)
    source, _ = constraint_of(named, TOOLS, HERMES)
    assert '\\"f\\"' not in lark(source)
    assert "answer" not in lark(source)


def test_a_format_beside_tools_is_an_alternative() -> None:
    source, param = constraint_of(request(constraint=SCHEMA), TOOLS, HERMES)
    assert param == "response_format"
    assert lark(source).startswith("start: calls | answer\n")
    assert lark(source).count("start:") == 1


@pytest.mark.parametrize("kind", [ConstraintKind.REGEX, ConstraintKind.LARK])
def test_only_json_goes_with_tools(kind: ConstraintKind) -> None:
    source, _ = constraint_of(request(constraint=Constraint(kind, "x")), TOOLS, HERMES)
    with pytest.raises(CodedError) as refused:
        lark(source)
    assert refused.value.param == "response_format"


def test_tools_whose_calls_cannot_be_constrained_are_refused() -> None:
    tools = [Tool("f", parameters={"properties": {"a b": {}}})]
    with pytest.raises(CodedError) as refused:
        constraint_of(request(tool_choice=ToolChoice.REQUIRED), tools, FORMATS["pythonic"])
    assert refused.value.code is ErrorCode.UNSUPPORTED_PARAMETER
    assert refused.value.param == "tools"


def test_where_the_constraint_begins() -> None:
    think = choose_reasoning("<think></think>")
    assert closer_of(HERMES, think, "assistant\n<think>\n", calls=False) == "</think>"
    assert closer_of(HERMES, think, "assistant\n", calls=False) == ""
    assert closer_of(HERMES, None, "assistant\n", calls=True) == ""
    assert closer_of(FORMATS["harmony"], None, "", calls=False).endswith("final<|message|>")
    assert closer_of(FORMATS["harmony"], None, "", calls=True) == ""

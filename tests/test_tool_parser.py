"""Whatever a model writes and however it is cut: content, reasoning and tool calls."""

import json
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.chat import Tool
from worker.chat.output import (
    FORMATS,
    OutputParser,
    Parsed,
    Reasoning,
    choose_format,
    choose_reasoning,
    create_parser,
    markers,
)

WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "limit": {"type": "number"},
            "metric": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "where": {"anyOf": [{"$ref": "#/$defs/Place"}, {"type": "null"}]},
            "note": {"type": ["string", "null"]},
            "unit": {"enum": ["C", "F"]},
            "any": {},
        },
        "$defs": {"Place": {"type": "object"}},
    },
)
TIME = Tool(name="get_time")
TOOLS = [WEATHER, TIME]
THINK = choose_reasoning("<think>")


class Result(NamedTuple):
    content: str
    reasoning: str
    calls: list[tuple[str, str]]


def parser_for(
    format: str,
    *,
    tools: list[Tool] = TOOLS,
    reasoning: Reasoning | None = None,
    prompt_tail: str = "",
    parallel: bool = True,
) -> OutputParser:
    return create_parser(
        FORMATS[format], reasoning, tools, prompt_tail=prompt_tail, parallel=parallel
    )


def collect(parts: Iterable[Parsed]) -> Result:
    """What a client has at the end; checks the order of a call's pieces."""
    content = reasoning = ""
    calls: list[tuple[str, str]] = []
    ids = set()
    for part in parts:
        content += part.content
        reasoning += part.reasoning
        for piece in part.calls:
            if piece.id is not None:
                assert piece.name is not None
                assert (piece.index, piece.arguments) == (len(calls), "")
                assert piece.id.startswith("call_")
                assert len(piece.id) == len("call_") + 24
                ids.add(piece.id)
                calls.append((piece.name, ""))
            else:
                assert piece.name is None
                assert piece.arguments
                name, arguments = calls[piece.index]
                calls[piece.index] = (name, arguments + piece.arguments)
    assert len(ids) == len(calls)
    return Result(content, reasoning, calls)


def parse(parser: OutputParser, pieces: Iterable[str]) -> Result:
    result = collect([*(parser.feed(piece) for piece in pieces), parser.finish()])
    assert parser.called == bool(result.calls)
    for _, arguments in result.calls:
        assert isinstance(json.loads(arguments), dict)
    return result


def parse_every_way(format: str, text: str, **options: Any) -> Result:
    """The result of the whole text, which is that of its characters."""
    whole = parse(parser_for(format, **options), [text])
    assert parse(parser_for(format, **options), text) == whole
    return whole


# Samples, as models write them.


class Sample(NamedTuple):
    format: str
    text: str
    calls: list[tuple[str, dict[str, Any]]]
    content: str = ""
    reasoning: str = ""


PARIS: tuple[str, dict[str, Any]] = ("get_weather", {"city": "Paris"})
NOW: tuple[str, dict[str, Any]] = ("get_time", {})
NASTY = 'say "hi" {to} [it], C:\\new\ttab\n</b> naïve 🎉'

SAMPLES = {
    "hermes": Sample(
        "hermes",
        'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
        [PARIS, NOW],
        "Let me look.",
    ),
    "hermes: text after, nested values": Sample(
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": '
        '{"where": {"a": [1, -2.5e3, {"b": null}], "c": {}}, "tags": [], "metric": true}}'
        "</tool_call>\nDone.",
        [
            (
                "get_weather",
                {
                    "where": {"a": [1, -2500.0, {"b": None}], "c": {}},
                    "tags": [],
                    "metric": True,
                },
            )
        ],
        "Done.",
    ),
    "hermes: braces, quotes and escapes in strings": Sample(
        "hermes",
        f'<tool_call>{{"name": "get_weather", "arguments": {{"city": {json.dumps(NASTY)}}}}}'
        "</tool_call>",
        [("get_weather", {"city": NASTY})],
    ),
    "hermes: a tag in a string": Sample(
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "</tool_call>"}}</tool_call>',
        [("get_weather", {"city": "</tool_call>"})],
    ),
    "hermes: arguments first, other keys": Sample(
        "hermes",
        '<tool_call>{"id": 7, "parameters": {"city": "Paris"}, "name": "get_weather", "x": [{}]}'
        "</tool_call>",
        [PARIS],
    ),
    "hermes: arguments as a string": Sample(
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": '
        + json.dumps(json.dumps({"city": NASTY}))
        + "}</tool_call>",
        [("get_weather", {"city": NASTY})],
    ),
    "hermes: no arguments": Sample(
        "hermes",
        '<tool_call>{"name": "get_time"}</tool_call>'
        '<tool_call>{"name": "get_time", "arguments": null}</tool_call>'
        '<tool_call>{"name": "get_time", "arguments": ""}</tool_call>',
        [NOW, NOW, NOW],
    ),
    "hermes: raw line breaks and bad escapes in strings": Sample(
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "a\nb\\d"}}</tool_call>',
        [("get_weather", {"city": "a\nb\\d"})],
    ),
    "hermes: closing tag forgotten": Sample(
        "hermes", '<tool_call>\n{"name": "get_time", "arguments": {}}\n', [NOW]
    ),
    "hermes: two in one tag": Sample(
        "hermes",
        '<tool_call>\n{"name": "get_time"}\n{"name": "get_time"}\n</tool_call>',
        [NOW, NOW],
    ),
    "qwen3-coder": Sample(
        "qwen3-coder",
        "I'll check.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n"
        "</parameter>\n<parameter=days>\n5\n</parameter>\n<parameter=metric>\nTrue\n</parameter>\n"
        '<parameter=tags>\n["a", "b"]\n</parameter>\n<parameter=where>\n{"x": {"y": 1}}\n'
        "</parameter>\n</function>\n</tool_call>",
        [
            (
                "get_weather",
                {
                    "city": "Paris",
                    "days": 5,
                    "metric": True,
                    "tags": ["a", "b"],
                    "where": {"x": {"y": 1}},
                },
            )
        ],
        "I'll check.",
    ),
    "qwen3-coder: code as a string": Sample(
        "qwen3-coder",
        f"<tool_call>\n<function=get_weather>\n<parameter=city>\n{NASTY}\n\n</parameter>\n"
        "</function>\n</tool_call>",
        [("get_weather", {"city": NASTY + "\n"})],
    ),
    "qwen3-coder: section's opener forgotten": Sample(
        "qwen3-coder",
        "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        [PARIS],
    ),
    "qwen3-coder: types that do not fit": Sample(
        "qwen3-coder",
        "<tool_call>\n<function=get_weather>\n<parameter=days>\nmany\n</parameter>\n"
        "<parameter=limit>\n1e3\n</parameter>\n<parameter=note>\nnull\n</parameter>\n"
        "<parameter=unit>\nC\n</parameter>\n<parameter=any>\n12\n</parameter>\n"
        "<parameter=tags>\n['a', None]\n</parameter>\n<parameter=other>\n[1]\n</parameter>\n"
        "</function>\n</tool_call>",
        [
            (
                "get_weather",
                {
                    "days": "many",
                    "limit": 1000.0,
                    "note": None,
                    "unit": "C",
                    "any": "12",
                    "tags": ["a", None],
                    "other": [1],
                },
            )
        ],
    ),
    "qwen3-coder: no parameters, no line breaks": Sample(
        "qwen3-coder", "<tool_call><function=get_time></function></tool_call>", [NOW]
    ),
    "qwen3-coder: JSON in the tag, as Llama writes it": Sample(
        "qwen3-coder", '<function=get_weather>{"city": "Paris"}</function>', [PARIS]
    ),
    "seed": Sample(
        "seed",
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n"
        "</function>\n</seed:tool_call>",
        [PARIS],
    ),
    "llama3": Sample("llama3", '{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
    "llama3: tag, two calls": Sample(
        "llama3",
        'Well. <|python_tag|>{"type": "function", "name": "get_weather", "parameters": '
        '{"city": "Paris"}}; {"name": "get_time", "parameters": {}}',
        [PARIS, NOW],
        "Well.",
    ),
    "llama3: built-in": Sample("llama3", '<|python_tag|>get_weather.call(city="Paris")', [PARIS]),
    "llama3: an answer in JSON": Sample(
        "llama3", '{"name": "Paris", "parameters": {}}', [], '{"name": "Paris", "parameters": {}}'
    ),
    "llama3: code for an interpreter": Sample(
        "llama3", "<|python_tag|>print(1)", [], "<|python_tag|>print(1)"
    ),
    "pythonic": Sample(
        "pythonic",
        "[get_weather(city='Par\\'is', days=3, tags=[\"a\", 'b'], where={'x': (1, .5)}, "
        "metric=True, note=None), get_time()]",
        [
            (
                "get_weather",
                {
                    "city": "Par'is",
                    "days": 3,
                    "tags": ["a", "b"],
                    "where": {"x": [1, 0.5]},
                    "metric": True,
                    "note": None,
                },
            ),
            NOW,
        ],
    ),
    "pythonic: escapes": Sample(
        "pythonic",
        r'[get_weather(city="\u00e9\x41\U0001f389\ud83c\udf89\n\d")]',
        [("get_weather", {"city": "éA🎉🎉\n\\d"})],
    ),
    "pythonic: LFM2's tags, JSON constants": Sample(
        "pythonic",
        "Checking.<|tool_call_start|>[get_weather(city='Paris', where={\"a\": true})]"
        "<|tool_call_end|>Wait.",
        [("get_weather", {"city": "Paris", "where": {"a": True}})],
        "Checking.Wait.",
    ),
    "pythonic: a list in an answer": Sample("pythonic", "[1] says (so)", [], "[1] says (so)"),
    "mistral": Sample(
        "mistral",
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}, '
        '{"name": "get_time", "arguments": {}}]',
        [PARIS, NOW],
    ),
    "mistral-args": Sample(
        "mistral-args",
        'Hm.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[CALL_ID]abcdefghi'
        "[ARGS]{}",
        [PARIS, NOW],
        "Hm.",
    ),
    "mistral: no array": Sample(
        "mistral", '[TOOL_CALLS]{"name": "get_time", "arguments": {}}', [NOW]
    ),
    "deepseek: V3.1": Sample(
        "deepseek",
        "Ok.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [PARIS, NOW],
        "Ok.",
    ),
    "deepseek: V3 and R1": Sample(
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>'
        "get_time\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [PARIS, NOW],
    ),
    "kimi-k2": Sample(
        "kimi-k2",
        "Ok.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>'
        "functions.get_time:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        [PARIS, NOW],
        "Ok.",
    ),
    "glm": Sample(
        "glm",
        "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n"
        "<tool_call>get_time\n</tool_call>",
        [("get_weather", {"city": "Paris", "days": 3}), NOW],
    ),
    "glm: without line breaks": Sample(
        "glm",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Pa\nris</arg_value></tool_call>",
        [("get_weather", {"city": "Pa\nris"})],
    ),
    "minimax": Sample(
        "minimax",
        'Ok.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris'
        '</parameter>\n<parameter name="days">2</parameter>\n</invoke>\n<invoke name="get_time">\n'
        "</invoke>\n</minimax:tool_call>",
        [("get_weather", {"city": "Paris", "days": 2}), NOW],
        "Ok.",
    ),
    "dsml": Sample(
        "dsml",
        '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="any" string="true">[1]</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="tags" string="false">["a"]</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        [("get_weather", {"any": "[1]", "city": "Paris", "tags": ["a"]})],
    ),
    "dsml: undeclared": Sample(
        "dsml",
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_time">\n<｜DSML｜parameter name="x" '
        'string="false">5</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
        [("get_time", {"x": 5})],
    ),
    "function-gemma": Sample(
        "function-gemma",
        "<start_function_call>call:get_weather{city:<escape>Paris, {1}<escape>,days:4,"
        "tags:[<escape>a<escape>],where:{k:<escape>v<escape>},metric:false,unit:C}"
        "<end_function_call><start_function_call>call:get_time{}<end_function_call>",
        [
            (
                "get_weather",
                {
                    "city": "Paris, {1}",
                    "days": 4,
                    "tags": ["a"],
                    "where": {"k": "v"},
                    "metric": False,
                    "unit": "C",
                },
            ),
            NOW,
        ],
    ),
    "function-gemma: the schema knows better": Sample(
        "function-gemma",
        "<start_function_call>call:get_weather{city:12,days:<escape>3<escape>,any:1.5,note:x y}"
        "<end_function_call>",
        [("get_weather", {"city": "12", "days": 3, "any": 1.5, "note": "x y"})],
    ),
    "gemma4": Sample(
        "gemma4",
        '<|tool_call>call:get_weather{city:<|"|>Pa"ris<|"|>,where:{<|"|>k<|"|>:[1,true]}}'
        "<tool_call|><|tool_call>call:get_time{}<tool_call|>",
        [("get_weather", {"city": 'Pa"ris', "where": {"k": [1, True]}}), NOW],
    ),
    "harmony": Sample(
        "harmony",
        "<|channel|>analysis<|message|>They want weather.<|end|><|start|>assistant<|channel|>"
        "commentary<|message|>Let me check.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>',
        [PARIS],
        "Let me check.",
        "They want weather.",
    ),
    "harmony: the recipient before the channel": Sample(
        "harmony",
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}',
        [PARIS],
    ),
    "harmony: final": Sample(
        "harmony",
        "<|channel|>analysis<|message|>a < b<|end|><|start|>assistant<|channel|>final<|message|>"
        "So a <b>.<|return|>",
        [],
        "So a <b>.",
        "a < b",
    ),
    "harmony: no channels at all": Sample("harmony", "Hello <you>", [], "Hello <you>"),
}


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_samples(sample: Sample) -> None:
    result = parse_every_way(sample.format, sample.text)
    calls = [(name, json.loads(arguments)) for name, arguments in result.calls]
    assert calls == sample.calls
    assert (result.content, result.reasoning) == (sample.content, sample.reasoning)


def test_every_format_has_a_sample() -> None:
    assert {sample.format for sample in SAMPLES.values()} == set(FORMATS)


# What arrives when.


def test_a_call_streams_name_first_then_arguments_as_they_are_written() -> None:
    parser = parser_for("hermes")
    assert parser.feed('Hi <tool_call>{"name": "get_wea').content == "Hi"
    [first] = parser.feed('ther"').calls
    assert (first.index, first.name, first.arguments) == (0, "get_weather", "")
    assert parser.feed(', "arguments": ').calls == []
    assert [piece.arguments for piece in parser.feed('{"city": "Pa').calls] == ['{"city": "Pa']
    assert [piece.arguments for piece in parser.feed("ris").calls] == ["ris"]
    assert [piece.arguments for piece in parser.feed('"}}</tool_call>').calls] == ['"}']


def test_a_string_parameter_streams() -> None:
    parser = parser_for("qwen3-coder")
    parser.feed("<tool_call>\n<function=get_weather>\n<parameter=city>\n")
    pieces = [parser.feed(text).calls for text in ('Pa"', "ris\n", "</para", "meter>")]
    assert [[piece.arguments for piece in calls] for calls in pieces] == [
        ['Pa\\"'],
        ["ris"],
        [],
        ['"'],
    ]


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_ordinary_content_is_not_held_back(format: str) -> None:
    parser = parser_for(format, reasoning=THINK)
    for word in ("Certainly:", " a<b,", " [1]", ' {"x"}', " and", " so", " on."):
        assert parser.feed(word).content.endswith(word.strip()[-1])


# What is no call.

UNTOUCHED = {
    "an unknown tool": ("hermes", '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call> ok'),
    "an unknown tool with a call in its arguments": (
        "hermes",
        '<tool_call>{"name": "rm", "arguments": {"x": "<tool_call>{\\"name\\": \\"get_time\\"}'
        '</tool_call>"}}</tool_call>',
    ),
    "no JSON": ("hermes", "Use <tool_call> tags, {so}."),
    "broken before the name": ("hermes", '<tool_call>{name: "get_time"}</tool_call>'),
    "cut before the name": ("hermes", '<tool_call>{"name": "get_ti'),
    "no name": ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    "an unknown function": (
        "qwen3-coder",
        "<tool_call>\n<function=rm>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>\n",
    ),
    "an unknown one of a section": (
        "kimi-k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.rm:0"
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
    ),
    "unknown ones in an array": (
        "mistral",
        ' [TOOL_CALLS] [{"name": "rm", "arguments": {}}, {"name": "ls", "arguments": {}}] ',
    ),
    "an unknown recipient": (
        "harmony",
        "<|channel|>commentary to=functions.rm <|constrain|>json<|message|>{}<|call|>",
    ),
    "an unknown Gemma call": (
        "gemma4",
        '<|tool_call>call:rm{x:<|"|>y<|"|>,z:[1,{}]}<tool_call|>',
    ),
    "an unknown GLM call": (
        "glm",
        "<tool_call>rm\n<arg_key>x</arg_key>\n<arg_value>y</arg_value>\n</tool_call>",
    ),
    "an unknown invoke": (
        "minimax",
        '<minimax:tool_call>\n<invoke name="rm">\n<parameter name="x">y</parameter>\n</invoke>\n'
        "</minimax:tool_call>",
    ),
    "unknown code": ("pythonic", "<|tool_call_start|>[rm(x=[1, 'a'])]<|tool_call_end|>"),
}


@pytest.mark.parametrize(("format", "text"), UNTOUCHED.values(), ids=UNTOUCHED)
def test_what_is_no_call_is_handed_back_unchanged(format: str, text: str) -> None:
    assert parse_every_way(format, text) == Result(text, "", [])


def test_a_call_after_a_broken_one_is_read() -> None:
    text = '<tool_call>\n<tool_call>{"name": "get_time"}</tool_call>'
    assert parse_every_way("hermes", text) == Result("<tool_call>\n", "", [("get_time", "{}")])


def test_an_unknown_one_between_calls_is_handed_back_alone() -> None:
    text = (
        '[TOOL_CALLS][{"name": "get_time", "arguments": {}}, {"name": "rm", "arguments": {"a": 1}},'
        ' {"name": "get_time", "arguments": {}}]'
    )
    assert parse_every_way("mistral", text) == Result(
        ', {"name": "rm", "arguments": {"a": 1}}', "", [("get_time", "{}")] * 2
    )


BROKEN = {
    "cut in a string": ('{"city": "Par', '{"city": "Par"}', ""),
    "cut in an escape": ('{"city": "Par\\u00', '{"city": "Par"}', ""),
    "cut in a number": ('{"city": "Paris", "days": 12', '{"city": "Paris"}', ""),
    "cut in a key": ('{"city": "Paris", "da', '{"city": "Paris"}', ""),
    "cut in a list": ('{"tags": ["a", ["b"', '{"tags": ["a", ["b"]]}', ""),
    "cut before all arguments": ("", "{}", ""),
    "broken between members": (
        '{"city": "Paris", days: 1}}</tool_call>',
        '{"city": "Paris"}',
        ", days: 1}}</tool_call>",
    ),
    "broken in a value": (
        '{"days": 012, "x": 1}}</tool_call> hm',
        "{}",
        '"days": 012, "x": 1}}</tool_call> hm',
    ),
    "no object": ("[1]}</tool_call>", "{}", ', "arguments": [1]}</tool_call>'),
}


@pytest.mark.parametrize(("text", "arguments", "content"), BROKEN.values(), ids=BROKEN)
def test_a_call_that_breaks_off_is_closed(text: str, arguments: str, content: str) -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": ' + text
    result = parse_every_way("hermes", text)
    assert json.loads(result.calls[0][1]) == json.loads(arguments)
    assert [name for name, _ in result.calls] == ["get_weather"]
    assert result.content == content


def test_typed_values_that_break_off_are_left_out() -> None:
    head = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis"
    assert parse_every_way("qwen3-coder", head).calls == [("get_weather", '{"city": "Paris"}')]
    more = head + "\n</parameter>\n<parameter=days>\n1"
    assert parse_every_way("qwen3-coder", more).calls == [("get_weather", '{"city": "Paris"}')]


def test_only_one_call_where_they_are_not_parallel() -> None:
    one = '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'
    result = parse_every_way("hermes", f"a{one}\n{one}b", parallel=False)
    assert result == Result(f"a\n{one}b", "", [("get_time", "{}")])


def test_without_tools_nothing_is_a_call() -> None:
    text = '  <tool_call>{"name": "get_time", "arguments": {}}</tool_call>\n\n'
    assert parse_every_way("hermes", text, tools=[]) == Result(text, "", [])
    thought = parse_every_way("hermes", "<think>hm</think>\n" + text, tools=[], reasoning=THINK)
    assert thought == Result(text.lstrip(), "hm", [])
    for format in sorted(FORMATS.keys() - {"harmony"}):
        samples = [sample for sample in SAMPLES.values() if sample.format == format]
        for sample in samples:
            assert parse(parser_for(format, tools=[]), [sample.text]).content == sample.text


# Reasoning.

ONE_CALL = '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'
REASONED = {
    "with opener": ("<think>\nHm, <b>.\n</think>\n\nYes.", "", "Yes.", "Hm, <b>."),
    "opened by the prompt": ("Hm.\n</think>\n\nYes.", "user\n<think>\n", "Yes.", "Hm."),
    "opened by the prompt and by the model": ("<think>Hm.</think>Yes.", "x", "Yes.", "Hm."),
    "opener alone": ("<think>", "", "", ""),
    "never closed": ("\n<think> Hm. ", "", "", "Hm. "),
    "empty": ("<think>\n\n</think>\n\nYes.", "", "Yes.", ""),
    "closed by the prompt": ("Yes </think> no", "<think>\n\n</think>\n\n", "Yes </think> no", ""),
    "none": (" Yes <think>no</think>", "", " Yes <think>no</think>", ""),
    "the prompt only mentions it": ("Yes.", "what is <think>?\nassistant\n", "Yes.", ""),
}


@pytest.mark.parametrize(("text", "tail", "content", "reasoning"), REASONED.values(), ids=REASONED)
@pytest.mark.parametrize("tools", [TOOLS, []], ids=["tools", "no tools"])
def test_reasoning(text: str, tail: str, content: str, reasoning: str, tools: list[Tool]) -> None:
    result = parse_every_way("hermes", text, reasoning=THINK, prompt_tail=tail, tools=tools)
    assert result == Result(content, reasoning, [])


def test_calls_follow_reasoning_and_are_not_read_in_it() -> None:
    text = f"<think>I could {ONE_CALL}</think>\n\nYes.\n{ONE_CALL}"
    result = parse_every_way("hermes", text, reasoning=THINK)
    assert result == Result("Yes.", f"I could {ONE_CALL}", [("get_time", "{}")])


def test_a_section_of_calls_ends_reasoning_that_was_left_open() -> None:
    sample = SAMPLES["kimi-k2"]
    result = parse_every_way("kimi-k2", "hm " + sample.text, reasoning=THINK, prompt_tail="<think>")
    assert (result.content, result.reasoning) == ("", "hm Ok.")
    assert [name for name, _ in result.calls] == ["get_weather", "get_time"]


def test_in_reasoning_follows_the_text() -> None:
    parser = parser_for("hermes", reasoning=THINK, prompt_tail="<think>\n")
    parser.feed("")
    assert parser.in_reasoning
    states = []
    for piece in ("Hm", "</thi", "nk>", "\nYes"):
        parser.feed(piece)
        states.append(parser.in_reasoning)
    assert states == [True, True, False, False]


def test_harmony_reasons_in_channels() -> None:
    parser = parser_for("harmony", tools=[])
    states = []
    for piece, parsed in {
        "<|channel|>analysis<|message|>Hm": Parsed("", "Hm", []),
        "<|end|><|start|>assistant<|channel|>fin": Parsed("", "", []),
        "al<|message|>Yes": Parsed("Yes", "", []),
    }.items():
        assert parser.feed(piece) == parsed
        states.append(parser.in_reasoning)
    assert states == [True, False, False]


def test_harmony_where_the_prompt_wrote_the_header() -> None:
    tail = "<|start|>assistant<|channel|>final<|message|>"
    assert parse_every_way("harmony", '{"a": 1}', prompt_tail=tail).content == '{"a": 1}'


def test_gemma_reasons_anywhere() -> None:
    gemma = choose_reasoning("'<|channel>thought\\n' + text + '\\n<channel|>'")
    assert gemma is not None
    text = "<|channel>thought\nHm.\n<channel|>Yes.<|channel>thought\nOh.<channel|> No."
    for tools in (TOOLS, []):
        result = parse_every_way("gemma4", text, reasoning=gemma, tools=tools)
        assert result == Result("Yes.No.", "Hm.Oh.", [])


# Which format.

TEMPLATES = {
    "hermes": '{{- \'<tool_call>\\n{"name": "\' }}{{- tool_call.name }}',
    "qwen3-coder": "'<tool_call>\\n<function=' + tool_call.name + '>\\n' '<parameter=' + name",
    "glm": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>",
    "seed": "'<seed:tool_call>' '<function=' '<parameter='",
    "minimax": "{%- set toolcall_begin_token = '<minimax:tool_call>' -%} '<parameter name=\"'",
    "dsml": "{%- set dsml_token = '｜DSML｜' -%}",
    "llama3": '"<|python_tag|>" + tool_call.name + ".call(" \'{"name": "\' "parameters": \'',
    "pythonic": '"<|tool_call_start|>[" + calls + "]<|tool_call_end|>"',
    "mistral": '"[TOOL_CALLS][" {%- set out = tool_call.function|tojson %}',
    "mistral-args": "'[TOOL_CALLS]' + name + '[CALL_ID]' + id + '[ARGS]' + arguments",
    "deepseek": "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>'",
    "kimi-k2": "{{render_content(message)}}<|tool_calls_section_begin|>",
    "function-gemma": "'<start_function_call>call:' + name + '{'",
    "gemma4": "'<|tool_call>call:' + name + '{' '}<tool_call|>'",
    "harmony": "<|start|>assistant<|channel|>commentary <|message|>",
}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_template_tells_its_format(name: str) -> None:
    assert choose_format(TEMPLATES[name]) is FORMATS[name]


def test_what_is_unknown_is_taken_for_hermes() -> None:
    assert choose_format("").name == "hermes"
    assert choose_format("{{ messages[0].content }}").name == "hermes"
    assert choose_format("<|plugin|>{{ tools }}").name == "hermes"


def test_the_choice_can_be_overridden() -> None:
    assert choose_format(TEMPLATES["hermes"], "glm").name == "glm"
    with pytest.raises(ValueError, match="qwen3-coder"):
        choose_format("", "gpt")


def test_a_template_tells_its_reasoning() -> None:
    chosen = {
        "'<think>\\n' + reasoning + '\\n</think>'": "think",
        "content.split('</think>')[-1]": "think",
        "'[THINK]' + block['thinking'] + '[/THINK]'": "mistral",
    }
    for source, name in chosen.items():
        reasoning = choose_reasoning(source)
        assert reasoning is not None
        assert reasoning.name == name
    assert choose_reasoning("{{ content }}") is None
    assert choose_reasoning(TEMPLATES["harmony"] + "<think>") is None


def test_markers_are_of_the_format_and_of_the_reasoning() -> None:
    assert markers(FORMATS["hermes"], THINK) == (
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
    )


# Any split, of anything.


def call_renderers() -> dict[str, Callable[[str, dict[str, Any]], str]]:
    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    def tags(call: str, argument: str, key_end: str) -> Callable[[str, dict[str, Any]], str]:
        """``argument`` has places for the key and the value."""
        return lambda name, arguments: call.format(
            name, "".join(argument.format(key, text(value)) for key, value in arguments.items())
        )

    def gemma(value: Any, quote: str) -> str:
        if isinstance(value, str):
            return f"{quote}{value}{quote}"
        if isinstance(value, list):
            return f"[{','.join(gemma(each, quote) for each in value)}]"
        if isinstance(value, dict):
            return f"{{{','.join(f'{k}:{gemma(v, quote)}' for k, v in value.items())}}}"
        return json.dumps(value)

    def python(name: str, arguments: dict[str, Any]) -> str:
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"

    def invoke(prefix: str) -> Callable[[str, dict[str, Any]], str]:
        return tags(
            f'<{prefix}invoke name="{{}}">\n{{}}</{prefix}invoke>\n',
            f'<{prefix}parameter name="{{}}">{{}}</{prefix}parameter>\n',
            '">',
        )

    dumps = json.dumps
    qwen = tags(
        "<tool_call>\n<function={}>\n{}</function>\n</tool_call>",
        "<parameter={}>\n{}\n</parameter>\n",
        ">",
    )
    return {
        "hermes": lambda name, arguments: (
            f"<tool_call>\n{dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
        ),
        "qwen3-coder": qwen,
        "glm": tags(
            "<tool_call>{}\n{}</tool_call>",
            "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n",
            "",
        ),
        "seed": tags(
            "<seed:tool_call>\n<function={}>\n{}</function>\n</seed:tool_call>",
            "<parameter={}>{}</parameter>\n",
            ">",
        ),
        "minimax": lambda name, arguments: (
            f"<minimax:tool_call>\n{invoke('')(name, arguments)}</minimax:tool_call>"
        ),
        "dsml": lambda name, arguments: (
            f"<｜DSML｜tool_calls>\n{invoke('｜DSML｜')(name, arguments)}</｜DSML｜tool_calls>"
        ),
        "llama3": lambda name, arguments: (
            f"<|python_tag|>{dumps({'name': name, 'parameters': arguments}, ensure_ascii=False)}"
        ),
        "pythonic": lambda name, arguments: (
            f"<|tool_call_start|>[{python(name, arguments)}]<|tool_call_end|>"
        ),
        "mistral": lambda name, arguments: (
            f"[TOOL_CALLS][{dumps({'arguments': arguments, 'name': name})}]"
        ),
        "mistral-args": lambda name, arguments: f"[TOOL_CALLS]{name}[ARGS]{dumps(arguments)}",
        "deepseek": lambda name, arguments: (
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{dumps(arguments)}"
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
        "kimi-k2": lambda name, arguments: (
            f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:0"
            f"<|tool_call_argument_begin|>{dumps(arguments)}<|tool_call_end|>"
            "<|tool_calls_section_end|>"
        ),
        "function-gemma": lambda name, arguments: (
            f"<start_function_call>call:{name}{gemma(arguments, '<escape>')}<end_function_call>"
        ),
        "gemma4": lambda name, arguments: (
            f"<|tool_call>call:{name}{gemma(arguments, chr(60) + '|' + chr(34) + '|>')}<tool_call|>"
        ),
        "harmony": lambda name, arguments: (
            f"<|start|>assistant<|channel|>commentary to=functions.{name} <|constrain|>json"
            f"<|message|>{dumps(arguments)}<|call|>"
        ),
    }


RENDER = call_renderers()
#: No value that a format without escapes could not write.
strings = st.text(st.sampled_from('ab "{}[]()\\\n,:é🎉='), max_size=12)
values: dict[str, st.SearchStrategy[Any]] = {
    "city": strings,
    "days": st.integers(-(10**20), 10**20),
    "metric": st.booleans(),
    "tags": st.lists(strings, max_size=2),
    "where": st.none() | st.dictionaries(st.sampled_from("xyz"), st.lists(strings | st.integers())),
}
arguments = st.lists(st.sampled_from(sorted(values)), unique=True, max_size=3).flatmap(
    lambda keys: st.fixed_dictionaries({key: values[key] for key in keys})
)
calls = st.tuples(st.sampled_from(["get_weather", "get_weather", "get_time"]), arguments).map(
    lambda call: (call[0], call[1] if call[0] == "get_weather" else {})
)
prose = st.sampled_from(["", "Well,", "a < b", "x.\n\ny", "[1]", "{}"])


def cut(text: str, data: st.DataObject) -> list[str]:
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=12).map(sorted))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


few = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.mark.parametrize("format", sorted(FORMATS))
@few
@given(data=st.data())
def test_well_formed_calls_are_read_however_they_are_cut(format: str, data: st.DataObject) -> None:
    wanted = data.draw(st.lists(calls, min_size=1, max_size=3))
    before, after = data.draw(prose), data.draw(prose)
    gap = data.draw(st.sampled_from(["", "\n", " \n\n"]))
    if format == "harmony":
        gap = ""
    text = before + gap + gap.join(RENDER[format](*call) for call in wanted) + after
    result = parse(parser_for(format), cut(text, data))
    assert [(name, json.loads(args)) for name, args in result.calls] == wanted
    assert result.content == before + after


#: What could confuse a parser most: the signs of all formats, whole and in part.
FRAGMENTS = sorted(
    {
        *("get_weather", "get_time", "rm", "city", "{", "}", "[", "]", '"', "'", "\\", ",", ":"),
        *('"name"', '"arguments"', '"parameters"', '{"name": "', '"arguments": {', "null", "1"),
        *(
            "(",
            ")",
            "=",
            " ",
            "\n",
            "<",
            ">",
            "|",
            "x",
            "é",
            "-0.5e1",
            "true",
            "```json\n",
            "call:",
        ),
        *("</tool_call", "<function=", "<parameter=city>", "</parameter>", "</function>", "to="),
        *('<invoke name="', '<parameter name="', "</invoke>", "\\u00", "\\ud83c", "<think>", ";"),
        *("functions.", "function", ".call(", "assistant", "analysis", "final", "</think>"),
    }
)


def soup(format: str) -> st.SearchStrategy[str]:
    signs = [*FORMATS[format].markers, *FORMATS[format].openers]
    return st.lists(st.sampled_from([*FRAGMENTS, *signs * 4]), max_size=25).map("".join)


def mutated(text: str, format: str, data: st.DataObject) -> str:
    """With parts left out, doubled, or put in."""
    for _ in range(data.draw(st.integers(0, 3))):
        a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        b = min(b, a + 8)
        text = text[:a] + data.draw(st.just("") | st.just(text[a:b] * 2) | soup(format)) + text[b:]
    return text[: data.draw(st.integers(0, len(text)))] if data.draw(st.booleans()) else text


@pytest.mark.parametrize("format", sorted(FORMATS))
@few
@given(data=st.data())
def test_any_split_gives_the_result_of_the_whole(format: str, data: st.DataObject) -> None:
    parts = calls.map(lambda call: RENDER[format](*call)) | prose | soup(format)
    text = mutated("".join(data.draw(st.lists(parts, max_size=4))), format, data)
    reasoning = data.draw(st.sampled_from([None, THINK, choose_reasoning("<|channel>thought")]))
    options: dict[str, Any] = {
        "reasoning": reasoning,
        "prompt_tail": data.draw(st.sampled_from(["", "<think>\n"])),
        "parallel": data.draw(st.booleans()),
    }
    whole = parse_every_way(format, text, **options)
    assert parse(parser_for(format, **options), cut(text, data)) == whole
    if not options["parallel"]:
        assert len(whole.calls) <= 1


@pytest.mark.parametrize("format", sorted(FORMATS.keys() - {"harmony"}))
@few
@given(data=st.data())
def test_nothing_is_lost_of_what_is_no_call(format: str, data: st.DataObject) -> None:
    parts = calls.map(lambda call: RENDER[format](*call)) | prose | soup(format)
    text = mutated("".join(data.draw(st.lists(parts, max_size=4))), format, data)
    other = [Tool(name="something_else")]
    result = parse(parser_for(format, tools=other), cut(text, data))
    assert result == Result(text, "", [])


LONG = {
    "openers": ("hermes", "", "<tool_call>"),
    "openers begun": ("hermes", "", "<"),
    "white space": ("hermes", "", " \n"),
    "an unfinished object": ("hermes", '<tool_call>{"arguments": {"a": "', "x<tool_call>"),
    "a call's string": ("hermes", '<tool_call>{"name": "get_time", "arguments": {"a": "', "x\\n"),
    "a string parameter": ("qwen3-coder", "<function=get_weather><parameter=city>", "\n<"),
    "a typed parameter": ("qwen3-coder", "<function=get_weather><parameter=days>", "1</para"),
    "lists": ("pythonic", "[get_weather(where=[", "[1],"),
    "objects begun": ("gemma4", "", "<|tool_call>call:rm{"),
    "headers": ("harmony", "", "<|channel|>x"),
}


@pytest.mark.parametrize(("format", "start", "more"), LONG.values(), ids=LONG)
def test_long_text_takes_linear_time(format: str, start: str, more: str) -> None:
    def cost(length: int) -> int:
        """Lines of Python that run, which no other load on the machine changes."""
        text = start + more * (length // len(more))
        lines = 0

        def trace(_frame: FrameType, event: str, _argument: object) -> Any:
            nonlocal lines
            lines += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            parse(parser_for(format), [text[i : i + 3] for i in range(0, len(text), 3)])
        finally:
            sys.settrace(before)
        return lines

    # Eight times the text: a parser that reads it anew for each piece would need 64 times.
    assert cost(8_000) < 12 * cost(1_000)

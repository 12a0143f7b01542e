"""Forced calls: what the grammars allow is what models write and parsers read."""

import json
import random
import re
from typing import Any

import pytest

from protocol.chat import Tool
from protocol.errors import CodedError
from worker.chat.formats import PYTHON_TAGS
from worker.chat.output import FORMATS, create_parser
from worker.chat.tool_formats import xml
from worker.chat.tool_grammar import call_grammar, text_with_calls_grammar

TOOLS = [
    Tool(
        name="get_weather",
        parameters={
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"type": "string", "enum": ["C", "F"]},
                "where": {"$ref": "#/$defs/Place"},
            },
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "number"}}}},
        },
    ),
    Tool(name='get_"time"'),
]
WANTED: dict[str, Any] = {"city": 'Par"is', "days": 3, "unit": "C", "where": {"x": 1.5}}

WRITTEN = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": ARGUMENTS}\n</tool_call>',
    "llama3": '{"name": "get_weather", "parameters": ARGUMENTS}',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": ARGUMENTS}]',
    "mistral-args": "[TOOL_CALLS]get_weather[ARGS]ARGUMENTS",
    "deepseek": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>ARGUMENTS"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "kimi-k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        "<|tool_call_argument_begin|>ARGUMENTS<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "harmony": (
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>ARGUMENTS"
    ),
    "qwen3-coder": (
        '<tool_call>\n<function=get_weather>\n<parameter=city>\nPar"is\n</parameter>\n'
        "<parameter=days>\n3\n</parameter>\n<parameter=unit>\nC\n</parameter>\n"
        '<parameter=where>\n{"x": 1.5}\n</parameter>\n</function>\n</tool_call>'
    ),
    "glm": (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n"
        '<arg_value>Par"is</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n'
        "<arg_key>unit</arg_key>\n<arg_value>C</arg_value>\n<arg_key>where</arg_key>\n"
        '<arg_value>{"x": 1.5}</arg_value>\n</tool_call>'
    ),
    "seed": (
        '<seed:tool_call>\n<function=get_weather>\n<parameter=city>Par"is</parameter>\n'
        "<parameter=days>3</parameter>\n<parameter=unit>C</parameter>\n"
        '<parameter=where>{"x": 1.5}</parameter>\n</function>\n</seed:tool_call>'
    ),
    "minimax": (
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Par"is'
        '</parameter>\n<parameter name="days">3</parameter>\n<parameter name="unit">C'
        '</parameter>\n<parameter name="where">{"x": 1.5}</parameter>\n</invoke>\n'
        "</minimax:tool_call>"
    ),
}
WRITTEN |= {
    "dsml": (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">Par"is</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="unit" string="true">C</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="where" string="false">{"x": 1.5}</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
    ),
    "pythonic": '[get_weather(city="Par\\"is", days=3, unit="C", where={"x": 1.5})]',
    "function-gemma": (
        '<start_function_call>call:get_weather{city:<escape>Par"is<escape>,days:3,'
        "unit:<escape>C<escape>,where:{x:1.5}}<end_function_call>"
    ),
    "gemma4": (
        '<|tool_call>call:get_weather{city:<|"|>Par"is<|"|>,days:3,'
        'unit:<|"|>C<|"|>,where:{x:1.5}}<tool_call|>'
    ),
}
END = 256


class ByteTokenizer:
    """A token for each byte, one for the end, and the special ones."""

    def __init__(self, special: list[str]) -> None:
        self.special = {text: END + 1 + number for number, text in enumerate(special)}
        self.eos_token_id = END
        self.bos_token_id = None
        named = (f"\xff{text}".encode("latin-1", "ignore") for text in ["<end>", *special])
        self.tokens = [bytes([byte]) for byte in range(256)] + list(named)
        self.special_token_ids = [END, *self.special.values()]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)

    def encode(self, text: str) -> list[int]:
        tokens = []
        while text:
            for special, token in self.special.items():
                if text.startswith(special):
                    tokens.append(token)
                    text = text[len(special) :]
                    break
            else:
                tokens += text[0].encode()
                text = text[1:]
        return tokens

    def decode(self, tokens: list[int]) -> str:
        texts = {token: text.encode() for text, token in self.special.items()}
        return b"".join(texts.get(token) or bytes([token]) for token in tokens).decode()


def matcher(format: str, tokenizer: ByteTokenizer, parallel: bool = False) -> Any:
    # There a name has no quotes.
    tools = TOOLS[:1] if format in {"pythonic", "gemma4", "function-gemma", "dsml"} else TOOLS
    grammar = call_grammar(FORMATS[format], tools, parallel=parallel, special=tokenizer.special)
    return compiled(grammar, tokenizer)


def compiled(grammar: str, tokenizer: ByteTokenizer) -> Any:
    llguidance = pytest.importorskip("llguidance")
    wrapped = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokenizer))
    made = llguidance.LLMatcher(wrapped, llguidance.LLMatcher.grammar_from_lark(grammar))
    assert not made.get_error()
    return made


def accepts(format: str, text: str, special: bool, parallel: bool = False) -> bool:
    tokenizer = ByteTokenizer(list(FORMATS[format].markers) if special else [])
    return consumes(matcher(format, tokenizer, parallel), tokenizer.encode(text))


def consumes(made: Any, tokens: list[int]) -> bool:
    return bool(made.try_consume_tokens(tokens) == len(tokens) and made.is_accepting())


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("format", sorted(WRITTEN))
def test_a_call_as_models_write_it_is_allowed_and_read(format: str, special: bool) -> None:
    text = WRITTEN[format].replace("ARGUMENTS", json.dumps(WANTED))
    if format == "pythonic" and special:
        text = f"<|tool_call_start|>{text}<|tool_call_end|>"
    assert accepts(format, text, special)
    parser = create_parser(FORMATS[format], None, TOOLS, prompt_tail="", parallel=True)
    [first, *rest] = parser.feed(text).calls + parser.finish().calls
    assert first.name == "get_weather"
    assert json.loads("".join(piece.arguments for piece in rest)) == WANTED
    assert not accepts(format, text.replace("get_weather", "get_wet"), special)
    assert not accepts(format, "Well, " + text, special)
    assert not accepts(format, text.replace("3", "three"), special)
    assert not accepts(format, text.replace("C", "K"), special)


@pytest.mark.parametrize("format", ["hermes", "qwen3-coder", "glm", "mistral-args", "gemma4"])
def test_more_calls_only_where_they_are_parallel(format: str) -> None:
    text = WRITTEN[format].replace("ARGUMENTS", json.dumps(WANTED))
    more = text + ("" if format in {"mistral-args", "gemma4"} else "\n") + text
    assert accepts(format, more, False, parallel=True)
    assert not accepts(format, more, False, parallel=False)


def draw_call(format: str, tokenizer: ByteTokenizer, draw: random.Random) -> str:
    """Random text that the grammar allows, inclined to come to an end."""
    numpy = pytest.importorskip("llguidance.numpy")
    made = matcher(format, tokenizer)
    mask = numpy.allocate_token_bitmask(1, len(tokenizer.tokens))
    closing = {*b'"}]', *tokenizer.special.values()}
    end = (xml.DSML if format == "dsml" else xml.SEED).argument_end.encode()
    tokens: list[int] = []
    while True:
        numpy.fill_next_token_bitmask(made, mask)
        bits = mask.view("uint8").ravel()
        allowed = [t for t in range(len(tokenizer.tokens)) if bits[t // 8] >> (t % 8) & 1]
        if END in allowed:
            return tokenizer.decode(tokens)
        assert len(tokens) < 3000
        begun = max(n for n in range(len(end)) if tokens[len(tokens) - n :] == list(end[:n]))
        wanted = {end[begun]} if begun else closing | {end[0]}
        likely = [t for t in allowed if t in wanted]
        ascii = [t for t in allowed if t < 128 or t > END] or allowed
        tokens.append(draw.choice(likely if likely and draw.random() < 0.9 else ascii))
        assert made.consume_token(tokens[-1])


@pytest.mark.parametrize(
    "format", ["hermes", "mistral", "qwen3-coder", "kimi-k2", "dsml", "pythonic", "gemma4"]
)
def test_whatever_a_grammar_allows_is_a_call(format: str) -> None:
    tokenizer = ByteTokenizer(list(FORMATS[format].markers))
    for seed in range(4):
        text = draw_call(format, tokenizer, random.Random(seed))
        parser = create_parser(FORMATS[format], None, TOOLS, prompt_tail="", parallel=False)
        parsed, rest = parser.feed(text), parser.finish()
        assert parser.called, text
        assert parsed.content + rest.content == "", text
        pieces = parsed.calls + rest.calls
        assert isinstance(json.loads("".join(piece.arguments for piece in pieces)), dict)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("format", sorted(WRITTEN.keys() - {"llama3", "harmony", "pythonic"}))
def test_in_free_text_a_call_is_well_formed(format: str, special: bool) -> None:
    names = ["<think>", "</think>", "<other>"]
    tokenizer = ByteTokenizer([*FORMATS[format].markers, *names] if special else [])
    grammar = text_with_calls_grammar(
        FORMATS[format], TOOLS, special=tokenizer.special, free=names[:2]
    )

    assert grammar is not None

    def allows(text: str) -> bool:
        return consumes(compiled(grammar, tokenizer), tokenizer.encode(text))

    call = WRITTEN[format].replace("ARGUMENTS", json.dumps(WANTED))
    assert allows("")
    assert allows("{ No call.\n")
    assert allows(call)
    assert allows(f"<think>Well</think>\n{call}\nand {call}. So.")
    assert allows("<other>") is not special
    assert not allows(f"Well, {call.replace('get_weather', 'get_wet')}")
    assert not allows(f"Well, {call.replace('3', 'three')}")
    assert not allows(f"{call} and {re.sub(r'(?<![A-Z_])C(?![A-Z_])', 'K', call)}")


def test_formats_whose_calls_begin_like_text() -> None:
    for name in ("llama3", "harmony", "pythonic"):
        assert text_with_calls_grammar(FORMATS[name], TOOLS) is None


def test_every_format_has_a_grammar() -> None:
    assert WRITTEN.keys() == FORMATS.keys()


def test_python_calls_are_in_the_models_tags() -> None:
    for opener, closer in PYTHON_TAGS.items():
        tokenizer = ByteTokenizer([opener, closer])
        grammar = call_grammar(FORMATS["pythonic"], TOOLS, parallel=True, special=tokenizer.special)
        made = compiled(grammar, tokenizer)
        call = 'get_weather(city="a")'
        assert consumes(made, tokenizer.encode(f"{opener}[{call}, {call}]{closer}"))


ODD = {
    "type": "object",
    "properties": {
        "a": {"anyOf": [{"type": "integer"}, {"const": "x"}, {"type": "null"}]},
        "b": {"type": ["boolean", "string"]},
        "c": {"type": "array", "items": {"type": "object", "properties": {"d": {}}}},
        "e": {"enum": [1, True, None, "y", 1.5]},
    },
}


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ("", {}),
        ("a:3", {"a": 3}),
        ("a:<escape>x<escape>", {"a": "x"}),
        ("a:null,e:true", {"a": None, "e": True}),
        ("b:false", {"b": False}),
        ("b:<escape>no, really<escape>,e:1.5", {"b": "no, really", "e": 1.5}),
        ("c:[]", {"c": []}),
        ("c:[{d:<escape>1<escape>},{}]", {"c": [{"d": "1"}, {}]}),
        ("e:<escape>y<escape>", {"e": "y"}),
        ("e:2", None),
        ("a:<escape>y<escape>", None),
        ("e:1,a:3", None),
        ("f:1", None),
        ("a:3,", None),
    ],
)
def test_values_in_gemmas_notation(arguments: str, value: object) -> None:
    tools = [Tool("f", parameters=ODD)]
    format = FORMATS["function-gemma"]
    text = f"<start_function_call>call:f{{{arguments}}}<end_function_call>"
    for special in (list(format.markers), []):
        tokenizer = ByteTokenizer(special)
        grammar = call_grammar(format, tools, parallel=False, special=tokenizer.special)
        made = compiled(grammar, tokenizer)
        assert consumes(made, tokenizer.encode(text)) is (value is not None)
    if value is not None:
        parser = create_parser(format, None, tools, prompt_tail="", parallel=True)
        [_, *rest] = parser.feed(text).calls + parser.finish().calls
        assert json.loads("".join(piece.arguments for piece in rest) or "{}") == value


def test_schemas_do_not_grow_without_bound() -> None:
    levels = {
        f"L{n}": {"properties": {key: {"$ref": f"#/$defs/L{n + 1}"} for key in "abcdefgh"}}
        for n in range(9)
    }
    defs = {name: {"type": "object", **level} for name, level in levels.items()} | {"L9": {}}
    tool = Tool("f", parameters={"properties": {"a": {"$ref": "#/$defs/L0"}}, "$defs": defs})
    with pytest.raises(CodedError, match="characters"):
        call_grammar(FORMATS["gemma4"], [tool], parallel=True)


LOOP = {"$ref": "#/$defs/Loop"}


@pytest.mark.parametrize(
    "tool",
    [
        Tool("f", parameters={"properties": {"a:b": {}}}),
        Tool("f", parameters={"properties": {"a": {"enum": [[1]]}}}),
        Tool(
            "f", strict=True, parameters={"properties": {"a": {"type": "string", "pattern": "x"}}}
        ),
        Tool("f", strict=True, parameters={"properties": {"a": {"type": "array", "minItems": 1}}}),
        Tool(
            "f",
            parameters={
                "properties": {"a": LOOP},
                "$defs": {"Loop": {"type": "object", "properties": {"a": LOOP}}},
            },
        ),
    ],
)
def test_what_gemmas_notation_cannot_be_held_to(tool: Tool) -> None:
    with pytest.raises(CodedError) as refused:
        call_grammar(FORMATS["gemma4"], [tool], parallel=True)
    assert refused.value.param == "tools"

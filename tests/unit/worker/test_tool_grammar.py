"""Forced calls: what the grammars allow is what models write and parsers read."""

import json
import random
import re
from typing import Any

import pytest

from protocol.chat import Tool
from worker.chat.output import FORMATS, create_parser
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
    grammar = call_grammar(FORMATS[format], TOOLS, parallel=parallel, special=tokenizer.special)
    return compiled(grammar, tokenizer)


def compiled(grammar: str | None, tokenizer: ByteTokenizer) -> Any:
    llguidance = pytest.importorskip("llguidance")
    assert grammar is not None
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
    assert accepts(format, text, special)
    parser = create_parser(FORMATS[format], None, TOOLS, prompt_tail="", parallel=True)
    [first, *rest] = parser.feed(text).calls + parser.finish().calls
    assert first.name == "get_weather"
    assert json.loads("".join(piece.arguments for piece in rest)) == WANTED
    assert not accepts(format, text.replace("get_weather", "get_wet"), special)
    assert not accepts(format, "Well, " + text, special)
    assert not accepts(format, text.replace("3", "three"), special)
    assert not accepts(format, text.replace("C", "K"), special)


@pytest.mark.parametrize("format", ["hermes", "qwen3-coder", "glm", "mistral-args"])
def test_more_calls_only_where_they_are_parallel(format: str) -> None:
    text = WRITTEN[format].replace("ARGUMENTS", json.dumps(WANTED))
    more = text + ("" if format == "mistral-args" else "\n") + text
    assert accepts(format, more, False, parallel=True)
    assert not accepts(format, more, False, parallel=False)


def draw_call(format: str, tokenizer: ByteTokenizer, draw: random.Random) -> str:
    """Random text that the grammar allows, inclined to come to an end."""
    numpy = pytest.importorskip("llguidance.numpy")
    made = matcher(format, tokenizer)
    mask = numpy.allocate_token_bitmask(1, len(tokenizer.tokens))
    closing = {*b'"}]', *tokenizer.special.values()}
    end = b"</parameter>"
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
        ascii = [t for t in allowed if t < 128 or t > END]
        tokens.append(draw.choice(likely if likely and draw.random() < 0.9 else ascii))
        assert made.consume_token(tokens[-1])


@pytest.mark.parametrize("format", ["hermes", "mistral", "qwen3-coder", "kimi-k2"])
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
@pytest.mark.parametrize("format", sorted(WRITTEN.keys() - {"llama3", "harmony"}))
def test_in_free_text_a_call_is_well_formed(format: str, special: bool) -> None:
    names = ["<think>", "</think>", "<other>"]
    tokenizer = ByteTokenizer([*FORMATS[format].markers, *names] if special else [])
    grammar = text_with_calls_grammar(
        FORMATS[format], TOOLS, special=tokenizer.special, free=names[:2]
    )

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
    assert text_with_calls_grammar(FORMATS["hermes"], []) is None


def test_formats_without_a_grammar() -> None:
    without = FORMATS.keys() - WRITTEN.keys()
    assert without == {"dsml", "function-gemma", "gemma4", "pythonic"}
    for name in without:
        assert call_grammar(FORMATS[name], TOOLS, parallel=True) is None
    assert call_grammar(FORMATS["hermes"], [], parallel=True) is None

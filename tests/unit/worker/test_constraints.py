"""Constraints on a vocabulary of bytes and a few more tokens."""

import json
from typing import Any

import pytest

pytest.importorskip("llguidance")

from protocol.chat import Constraint, ConstraintKind
from protocol.errors import ErrorCode
from worker.backends.base import TokenTable, is_mark
from worker.chat.grammar import JSON_OPTIONS
from worker.constraints import (
    MAX_TEXT_BYTES,
    ConstraintRefused,
    GrammarMask,
    Grammars,
)

CALL, END, OTHER_END, SECRET, WORD, EMPTY = range(256, 262)
SIZE = 270  # the model has rows without a token
TABLE = TokenTable(
    pieces=[*(bytes([value]) for value in range(256)), b"<call>", b"", b"bye", b"", b"hello", b""],
    special={CALL: "<call>", END: "<|end|>", SECRET: "<|secret|>"},
    end_tokens=frozenset({END, OTHER_END}),
    encode=lambda text: list(text.encode()),
)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TABLE, SIZE)


def allowed(mask: GrammarMask) -> set[int]:
    bits = mask.allowed()
    assert len(bits) * 8 >= SIZE
    return {token for token in range(len(bits) * 8) if bits[token // 8] >> token % 8 & 1}


def accepts(mask: GrammarMask, text: str | bytes) -> bool:
    """Whether the text can be written, and the answer may then end."""
    for token in text.encode() if isinstance(text, str) else text:
        if token not in allowed(mask):
            return False
        mask.accept(token)
    return {END, OTHER_END} <= allowed(mask)


def schema(value: object) -> Constraint:
    return Constraint(ConstraintKind.SCHEMA, json.dumps(value))


def lark(text: str) -> Constraint:
    return Constraint(ConstraintKind.LARK, text)


def regex(text: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, text)


ANY_OBJECT = Constraint(ConstraintKind.JSON)
OPEN = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "additionalProperties": {"type": "string"},
}


@pytest.mark.parametrize(
    ("constraint", "text", "expected"),
    [
        (ANY_OBJECT, '{"a": [1, true, null, "x"]}', True),
        (ANY_OBJECT, "[]", False),
        (ANY_OBJECT, '{"é": "🎉\\n"}', True),
        (schema({"type": "integer", "minimum": 3}), "12", True),
        (schema({"type": "integer", "minimum": 3}), "2", False),
        (schema(True), "null", True),
        (regex("[ab]{2}"), "ab", True),
        (regex("[ab]{2}"), "abc", False),
        (regex(""), "", True),
        (lark('start: "x" word\nword: /[a-z]+/'), "xyz", True),
        # One spelling for a character.
        (schema(OPEN), '{"b":"x"}', True),
        (schema(OPEN), '{"a":"x"}', False),
        (schema(OPEN), '{"\\u0061":"x"}', False),
        (ANY_OBJECT, '{"a":"\\ud83d"}', False),
        # White space, but not without end.
        (ANY_OBJECT, '{"a":1,"b":2}', True),
        (ANY_OBJECT, '{ "a" : 1 }', True),
        (ANY_OBJECT, '{\n  "a": {\n    "b": 1\n  }\n}', True),
        (ANY_OBJECT, '{\n\t"a": 1\n}', True),
        (ANY_OBJECT, '{  "a": 1}', False),
        (ANY_OBJECT, '{\n\n"a": 1}', False),
        (ANY_OBJECT, "{\n" + " " * 21 + '"a": 1}', False),
    ],
)
def test_what_is_accepted(
    grammars: Grammars, constraint: Constraint, text: str, expected: bool
) -> None:
    assert accepts(grammars.create_mask(constraint), text) is expected


def test_where_nothing_may_follow_only_the_ends_are_allowed(grammars: Grammars) -> None:
    mask = grammars.create_mask(regex("a"))
    assert accepts(mask, "a")
    assert allowed(mask) == {END, OTHER_END}
    mask.accept(END)
    assert allowed(mask) == {END, OTHER_END}


def test_where_more_may_follow_the_ends_are_allowed_too(grammars: Grammars) -> None:
    mask = grammars.create_mask(regex("a+"))
    assert accepts(mask, "aa")
    assert allowed(mask) == {END, OTHER_END, ord("a")}


def test_only_text_is_text(grammars: Grammars) -> None:
    """Not the ends, with or without text, nor other marks, nor what has no token."""
    mask = grammars.create_mask(regex("(?s:.)+"))
    first = allowed(mask)
    assert WORD in first
    assert not first & {CALL, END, OTHER_END, SECRET, EMPTY, *range(EMPTY + 1, SIZE + 10)}


def test_marks_are_tokens_of_their_own(grammars: Grammars) -> None:
    mask = grammars.create_mask(lark('start: <call> %json {"const": 1} <|secret|>'))
    assert allowed(mask) == {CALL}
    mask.accept(CALL)
    mask.accept(ord("1"))
    assert allowed(mask) == {SECRET}
    mask.accept(SECRET)
    assert allowed(mask) == {END, OTHER_END}


def test_marks_by_number(grammars: Grammars) -> None:
    assert allowed(grammars.create_mask(lark(f'start: <[{SECRET}]> "x"'))) == {SECRET}


def test_json_in_lark_may_be_written_alike(grammars: Grammars) -> None:
    inner = json.dumps({"type": "object", "x-guidance": JSON_OPTIONS})
    mask = grammars.create_mask(lark(f"start: %json {inner}"))
    assert accepts(mask, '{\n  "a": 1\n}')
    assert not accepts(grammars.create_mask(lark(f"start: %json {inner}")), '{  "a": 1}')


def test_a_mark_spelt_out_in_forced_text_is_text(grammars: Grammars) -> None:
    """A tokenizer finds its marks in any text."""

    def encode(text: str) -> list[int]:
        before, mark, after = text.partition("<call>")
        return [*before.encode(), *([CALL] if mark else []), *after.encode()]

    table = TokenTable(TABLE.pieces, TABLE.special, TABLE.end_tokens, encode)
    assert accepts(Grammars(table, SIZE).create_mask(schema({"const": "<call>"})), '"<call>"')


def test_a_space_put_before_any_text_is_none(grammars: Grammars) -> None:
    """As SentencePiece does it."""
    table = TokenTable(
        TABLE.pieces, TABLE.special, TABLE.end_tokens, lambda text: list(f" {text}".encode())
    )
    mask = Grammars(table, SIZE).create_mask(schema({"const": "ab"}))
    assert accepts(mask, '"ab"')


def test_a_tokenizer_that_fails_is_done_without() -> None:
    def encode(text: str) -> list[int]:
        raise ValueError(text)

    table = TokenTable(TABLE.pieces, TABLE.special, TABLE.end_tokens, encode)
    mask = Grammars(table, SIZE).create_mask(schema({"const": "hello"}))
    mask.accept(ord('"'))
    assert allowed(mask) == {WORD}


def test_masks_of_one_constraint_are_apart(grammars: Grammars) -> None:
    first, second = (grammars.create_mask(regex("ab")) for _ in range(2))
    first.accept(ord("a"))
    assert allowed(first) == {ord("b")}
    assert allowed(second) == {ord("a")}


def test_what_a_mask_took(grammars: Grammars) -> None:
    mask = grammars.create_mask(ANY_OBJECT)
    assert (mask.calls, mask.seconds) == (0, 0.0)
    accepts(mask, "{}")
    assert mask.calls == 3
    assert 0 < mask.seconds < 1


def test_a_token_out_of_place_ends_the_answer(
    grammars: Grammars, capfd: pytest.CaptureFixture[str]
) -> None:
    mask = grammars.create_mask(regex("a+"))
    mask.accept(ord("b"))
    assert allowed(mask) == {END, OTHER_END}
    mask.accept(ord("a"))
    assert allowed(mask) == {END, OTHER_END}
    assert "constraint failed" in capfd.readouterr().err


def test_a_grammar_that_explodes_on_the_way_ends_the_answer(grammars: Grammars) -> None:
    rules = "\n".join(f'r{n}: r{n + 1} | "a" r{n + 1} | "b"' for n in range(1200))
    mask = grammars.create_mask(lark(f'start: "x" r0\n{rules}\nr1200: "c"'))
    mask.accept(ord("x"))
    assert allowed(mask) == {END, OTHER_END}


# --- refusals -----------------------------------------------------------------


def refusal(grammars: Grammars, constraint: Constraint, **options: Any) -> ConstraintRefused:
    with pytest.raises(ConstraintRefused) as caught:
        grammars.create_mask(constraint, **options)
    assert caught.value.code is ErrorCode.INVALID_VALUE
    assert len(caught.value.message) < 700
    return caught.value


@pytest.mark.parametrize(
    "keyword",
    [
        "not",
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "uniqueItems",
        "propertyNames",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "unevaluatedProperties",
        "unevaluatedItems",
        "$dynamicRef",
        "$recursiveRef",
    ],
)
def test_keywords_that_cannot_be_enforced_are_refused_by_name(
    grammars: Grammars, keyword: str
) -> None:
    inner = {"type": "object", "properties": {"a": {keyword: {}}}}
    message = refusal(grammars, schema(inner)).message
    assert message.startswith(
        "the JSON schema cannot be enforced: these keywords are not supported"
    )
    assert f'"{keyword}"' in message


def test_a_schema_cannot_ask_for_leniency(grammars: Grammars) -> None:
    lenient = {"type": "object", "not": {}, "x-guidance": {"lenient": True}}
    assert '"not"' in refusal(grammars, schema(lenient)).message


@pytest.mark.parametrize(
    ("constraint", "part"),
    [
        (schema({"type": "string", "format": "stamp"}), "Unknown format: stamp"),
        (schema({"type": "text"}), "Invalid type: text"),
        (schema({"$ref": "#/$defs/x"}), "/$defs/x"),
        (schema({"$ref": "http://localhost/x"}), "localhost/x"),
        (schema({"type": "string", "minLength": 3, "maxLength": 2}), "minLength"),
        (schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (schema([1]), "has to be a JSON object"),
        (schema(False), "has to be a JSON object"),
        (schema({"$ref": "#"}), "nothing matches"),
        (Constraint(ConstraintKind.SCHEMA, "{"), "line 1"),
        (Constraint(ConstraintKind.SCHEMA, '{"items":' * 400 + "{}" + "}" * 400), "recursion"),
        (Constraint(ConstraintKind.SCHEMA, "[" * 100_000), "nested too deeply"),
        (regex("("), "unclosed group"),
        (regex(r"(a)\1"), "backreferences"),
        (regex("[a&&b]"), "nothing matches"),
        (lark('start: "a'), "lexer error"),
        (lark("start: nobody"), '"nobody"'),
        (lark("start: <nobody>"), '"<nobody>"'),
        (lark("start: start"), "nothing matches"),
        (lark('start: %json {"not": {}}'), '"not"'),
        (lark("start: " + "(" * 5000 + '"a"' + ")" * 5000), "nested"),
        (regex("a" * (MAX_TEXT_BYTES + 1)), "at most"),
    ],
)
def test_refused_with_the_reason(grammars: Grammars, constraint: Constraint, part: str) -> None:
    assert part in refusal(grammars, constraint).message


def test_the_field_at_fault_is_the_callers(grammars: Grammars) -> None:
    assert refusal(grammars, regex("(")).param == "response_format"
    assert refusal(grammars, regex("("), param="guided_regex").param == "guided_regex"


def test_tokens_without_an_end_allow_no_constraint() -> None:
    table = TokenTable(TABLE.pieces, TABLE.special, frozenset(), TABLE.encode)
    with pytest.raises(ValueError, match="ends an answer"):
        Grammars(table, SIZE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("<think>", True), ("</s>", True), ("<>", False), ("\n\n", False), ("[INST]", False)],
)
def test_is_mark(text: str, expected: bool) -> None:
    assert is_mark(text) is expected

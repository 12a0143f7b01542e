"""Grammars for one model's tokens: what an answer has to match, as masks for its sampling.

The only module that knows llguidance. Import it where constraints are used only: it
pulls in that library.

JSON is neither compact nor free in its white space: between two tokens of JSON there
may be one space, or a line break and an indentation. So models write it as they have
learnt to, and none loses itself in white space without end. A string's characters have
one spelling each (no ``\\u`` escapes): otherwise ``"\\u0061"`` would pass as a key that
is not ``"a"``.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from protocol.chat import Constraint, ConstraintKind
from protocol.errors import CodedError, ErrorCode
from worker.backends.base import TokenTable
from worker.chat.grammar import JSON_OPTIONS

#: Of a constraint, in bytes. What recurses in the library goes no deeper than a text of
#: this size can tell it to, for which ``compiler.STACK_BYTES`` is enough.
MAX_TEXT_BYTES = 256 * 1024
#: Compiled constraints that are kept for the next request that has the same.
_KEPT = 16
_LONGEST_REASON = 500
#: A character that no token joins with others: what follows it is at no text's beginning.
_LEAD = "\x02"

_LIMITS = LLParserLimits(
    step_max_items=20_000,  # a mask takes 10 ms at most, or its answer is over
    step_lexer_fuel=100_000,
    max_lexer_states=50_000,  # of 1 to 2 kB
    verbose_errors=False,
)


class ConstraintRefused(CodedError):
    """The constraint cannot be enforced: the request is at fault. ``param`` is its field."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(ErrorCode.INVALID_VALUE, message, param=param)


class Grammars:
    """Compiles constraints for a model of ``vocab_size`` tokens.

    To make one takes up to a second for a large vocabulary, and holds the GIL for half
    of that. Raises ``ValueError`` for tokens that allow no constraint.
    """

    def __init__(self, table: TokenTable, vocab_size: int) -> None:
        if not table.end_tokens:
            raise ValueError("the model has no token that ends an answer")
        tokens = _Tokens(table, vocab_size)
        wrapper = TokenizerWrapper(tokens)
        self._tokenizer = LLTokenizer(wrapper, eos_token=sorted(table.end_tokens))
        tokens.tokenizer = self._tokenizer
        wrapper.tokens = tokens.tokens = []  # it has its own by now
        #: Ids of special tokens by their texts.
        self.special = {text: token for token, text in table.special.items()}
        self._end_tokens = table.end_tokens
        self._end_mask = _bits(table.end_tokens, vocab_size)
        self._kept: OrderedDict[Constraint, LLMatcher] = OrderedDict()

    def create_mask(self, constraint: Constraint, *, param: str = "response_format") -> GrammarMask:
        """A mask at the beginning of an answer, for one sequence.

        Takes microseconds for a constraint seen lately, else milliseconds or, for a
        large one, seconds, most of that without the GIL. Raises ``ConstraintRefused``,
        naming the keyword or the place in the text.
        """
        matcher = self._kept.pop(constraint, None)
        if matcher is None:
            matcher = self._compile(constraint, param)
        self._kept[constraint] = matcher
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return GrammarMask(matcher.deep_copy(), self._end_tokens, self._end_mask)

    def _compile(self, constraint: Constraint, param: str) -> LLMatcher:
        kind = constraint.kind
        size = len(constraint.text.encode(errors="replace"))
        if size > MAX_TEXT_BYTES:
            reason = f"it has {size} bytes, and at most {MAX_TEXT_BYTES} are taken"
            raise _refusal(kind, reason, param)
        try:
            grammar = _grammar(constraint)
        except ValueError as error:
            raise _refusal(kind, str(error), param) from error
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            # The costliest mask, as the lexer begins with it: not between two steps.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _refusal(kind, matcher.get_error(), param)
        return matcher


class GrammarMask:
    """See ``base.TokenMask``: the state of a constraint in one answer.

    Where the answer may end, all of the model's end tokens are allowed; where it has
    to, nothing else is. Should the grammar prove too complex on the way, the answer
    ends there. ``seconds`` and ``calls``: what the masks took so far.
    """

    __slots__ = ("_end_mask", "_end_tokens", "_failed", "_matcher", "calls", "seconds")

    def __init__(self, matcher: LLMatcher, end_tokens: frozenset[int], end_mask: bytes) -> None:
        self._matcher = matcher
        self._end_tokens = end_tokens
        self._end_mask = end_mask
        self._failed = False
        self.seconds = 0.0
        self.calls = 0

    def allowed(self) -> bytes:
        begun = time.perf_counter()
        mask = self._end_mask
        if not self._failed:
            computed = self._matcher.compute_bitmask()
            if self._matcher.is_error():
                self._fail()
            else:
                mask = computed
        self.calls += 1
        self.seconds += time.perf_counter() - begun
        return mask

    def accept(self, token: int) -> None:
        if self._failed or token in self._end_tokens:
            return
        begun = time.perf_counter()
        if not self._matcher.consume_token(token):
            self._fail()
        self.seconds += time.perf_counter() - begun

    def _fail(self) -> None:
        self._failed = True
        reason = _shortened(self._matcher.get_error())
        print(f"an answer ends early, as its constraint failed: {reason}", file=sys.stderr)


class _Tokens:
    """A token table as llguidance wants it; see ``TokenizerWrapper``.

    It asks for the tokens of text that the grammar leaves no choice about: the answer
    then has the tokens that the model would have been trained on.
    """

    bos_token_id = None

    def __init__(self, table: TokenTable, vocab_size: int) -> None:
        self._encode = table.encode
        self.eos_token_id = min(table.end_tokens)
        tokens = list(table.pieces[:vocab_size])
        tokens += [b""] * (vocab_size - len(tokens))
        # An end token may have text, as any other: it must not pass for that.
        special = {token: f"<|end_{token}|>" for token in table.end_tokens} | dict(table.special)
        self.special_token_ids = sorted(token for token in special if token < vocab_size)
        for token in self.special_token_ids:
            tokens[token] = special[token].encode()
        self.tokens: Sequence[bytes] = tokens
        self.tokenizer: LLTokenizer | None = None

    def __call__(self, data: bytes) -> list[int]:
        tokenizer = self.tokenizer
        if tokenizer is None:
            return []  # the wrapper tries what it may be called with
        text = data.decode()
        for lead in ("", _LEAD):
            # SentencePiece begins a text with a space, which is not wanted in its middle.
            try:
                tokens = _without(lead.encode(), self._encode(lead + text), tokenizer)
            except Exception:  # it would be a panic in the library
                break
            if tokenizer.decode_bytes(tokens) == data and not any(
                tokenizer.is_special_token(token) for token in tokens
            ):
                return tokens
        return tokenizer.greedy_tokenize(text)


def _without(lead: bytes, tokens: list[int], tokenizer: LLTokenizer) -> list[int]:
    """The tokens behind those that ``lead`` ends with."""
    for count in range(len(tokens) + 1):
        if tokenizer.decode_bytes(tokens[:count]).endswith(lead):
            return tokens[count:]
    return []


def _bits(tokens: frozenset[int], size: int) -> bytes:
    bits = bytearray((size + 7) // 8)
    for token in tokens:
        bits[token // 8] |= 1 << token % 8
    return bytes(bits)


def _grammar(constraint: Constraint) -> str:
    """The constraint in the library's own form. Raises ``ValueError``."""
    match constraint.kind:
        case ConstraintKind.JSON:
            schema = '{"type": "object"}'
            return LLMatcher.grammar_from_json_schema(schema, overrides=_overrides())
        case ConstraintKind.SCHEMA:
            return LLMatcher.grammar_from_json_schema(
                _object_schema(constraint.text), overrides=_overrides()
            )
        case ConstraintKind.REGEX:
            return LLMatcher.grammar_from_regex(constraint.text)
        case ConstraintKind.LARK:
            return LLMatcher.grammar_from_lark(constraint.text)


def _overrides() -> Any:
    """``JSON_OPTIONS``, whatever the schema itself says; the library's type is not importable."""
    return JSON_OPTIONS


def _object_schema(text: str) -> str:
    """Raises ``ValueError`` for what is not a JSON object, or ``true``."""
    try:
        schema = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if schema is True:
        return "{}"
    if not isinstance(schema, dict):
        raise ValueError("it has to be a JSON object")
    return text


_NAMES = {
    ConstraintKind.JSON: "JSON object",
    ConstraintKind.SCHEMA: "JSON schema",
    ConstraintKind.REGEX: "regular expression",
    ConstraintKind.LARK: "grammar",
}
_UNSUPPORTED = re.compile(r"Unimplemented keys: \[([^\]]*)\]")


def _refusal(kind: ConstraintKind, reason: str, param: str) -> ConstraintRefused:
    if found := _UNSUPPORTED.search(reason):
        reason = f"these keywords are not supported: {found[1]}"
    elif reason.startswith("NoExtension"):
        reason = "nothing matches it"
    message = f"the {_NAMES[kind]} cannot be enforced: {_shortened(reason)}"
    return ConstraintRefused(message, param=param)


def _shortened(reason: str) -> str:
    reason = reason.replace("<non-verbose/>", "").strip()
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]} …"

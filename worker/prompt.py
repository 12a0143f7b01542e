"""The input side of a request: from what a client asked to the tokens of a prompt."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import msgspec

from protocol.chat import Constraint, Tool, ToolChoice
from protocol.errors import CodedError, ErrorCode
from protocol.messages import (
    Detokenize,
    Detokenized,
    Generate,
    Inquiry,
    InquiryAnswer,
    Loaded,
    Tokenize,
    Tokenized,
)
from worker.backends.base import Backend, TokenMask
from worker.chat.conversation import Conversation, knows_tools, spell_out_tools
from worker.chat.output import (
    OutputParser,
    choose_format,
    choose_reasoning,
    create_parser,
    markers,
)
from worker.compiler import Source
from worker.constrained import closer_of, constraint_of
from worker.gate import GatedMask

#: Characters that a token of ordinary text has at most, on average.
_USUAL_TOKEN = 8
#: So many tokens of a text's beginning may become others when it goes on.
_SEAM = 64

#: How much of the rendered prompt's end tells a parser where the answer begins.
_TAIL = 200

#: What an answer to an inquiry may hold: the supervisor takes a much larger message for
#: a broken worker's.
MAX_TOKENS_TOLD = 1_000_000
#: A prompt is counted up to here, also by models whose context is smaller.
MAX_TOKENS_COUNTED = 262_144
MAX_TEXT_BYTES_TOLD = 8 * 1024 * 1024


class Prepared(NamedTuple):
    """A request's prompt; the parser its answer needs, and the special tokens that has
    to see; the text to put before the answer; what the answer has to match, the field
    that this comes from, and what makes a mask for it wait for the end of the reasoning."""

    tokens: list[int]
    parser: OutputParser | None = None
    markers: tuple[str, ...] = ()
    echo: str = ""
    constraint: Source | None = None
    constraint_param: str = "response_format"
    gate: Callable[[TokenMask], TokenMask] | None = None


class PromptBuilder:
    """Makes prompts for one loaded model. ``tool_format`` overrides what its template says.

    Raises ``CodedError`` if nobody knows that format.
    """

    def __init__(self, backend: Backend, model: Loaded, tool_format: str | None = None) -> None:
        self._backend = backend
        self._model = model
        template = backend.chat_template
        self._knows_tools = template is not None and (not template or knows_tools(template))
        try:
            self._format = choose_format(template or "", tool_format)
        except ValueError as error:
            raise CodedError(
                ErrorCode.INVALID_VALUE, f"tool_format: {error}", param="tool_format"
            ) from error
        self._reasoning = choose_reasoning(template or "")

    def describe(self) -> Loaded:
        """The model, with how it writes tool calls and reasoning."""
        if not self._model.has_chat_template:
            return self._model
        harmony = self._format.whole is not None
        reasoning = self._format.name if harmony else ""
        if self._reasoning is not None:
            reasoning = self._reasoning.name
        return msgspec.structs.replace(
            self._model, tool_format=self._format.name, reasoning=reasoning
        )

    def prepare(self, request: Generate) -> Prepared:
        """Raises ``CodedError`` with the parameter at fault, and nothing else."""
        with _contained(_param(request)):
            return self._prepare(request)

    def _prepare(self, request: Generate) -> Prepared:
        param = _param(request)
        prepared = self._render(request, self._model.context_length)
        if not prepared.tokens:
            raise CodedError(ErrorCode.INVALID_VALUE, "the prompt has no tokens", param=param)
        self._check_tokens(request.sampling.logit_bias, "logit_bias")
        self._check_tokens(request.resume_tokens, "resume_tokens")
        if len(prepared.tokens) >= self._model.context_length:
            raise self._too_long(str(len(prepared.tokens)), param)
        return prepared

    def answer(self, inquiry: Inquiry) -> InquiryAnswer:
        """Raises ``CodedError`` with the parameter at fault, and nothing else."""
        match inquiry:
            case Tokenize():
                with _contained(_param(inquiry.generate)):
                    return self._tokenize(inquiry)
            case Detokenize():
                with _contained("tokens"):
                    return self._detokenize(inquiry)

    def _tokenize(self, inquiry: Tokenize) -> Tokenized:
        request = inquiry.generate
        limit = max(self._model.context_length, MAX_TOKENS_COUNTED)
        tokens = self._render(request, limit, add_special=inquiry.add_special).tokens
        if inquiry.count_only:
            return Tokenized(inquiry.request_id, len(tokens))
        if len(tokens) > MAX_TOKENS_TOLD:
            raise CodedError(
                ErrorCode.INVALID_VALUE,
                f"{len(tokens)} tokens; at most {MAX_TOKENS_TOLD} can be listed",
                param=_param(request),
            )
        return Tokenized(inquiry.request_id, len(tokens), tokens)

    def _detokenize(self, inquiry: Detokenize) -> Detokenized:
        self._check_tokens(inquiry.tokens, "tokens")
        text = b"".join(map(self._backend.token_bytes, inquiry.tokens))
        if len(text) > MAX_TEXT_BYTES_TOLD:
            raise CodedError(
                ErrorCode.INVALID_VALUE,
                f"a text of {len(text)} bytes; at most {MAX_TEXT_BYTES_TOLD} can be told",
                param="tokens",
            )
        return Detokenized(inquiry.request_id, text.decode(errors="replace"))

    def _render(self, request: Generate, limit: int, *, add_special: bool = True) -> Prepared:
        if request.messages is not None:
            return self._prepare_chat(request, limit)
        return self._prepare_text(request, limit, add_special=add_special)

    def _prepare_chat(self, request: Generate, limit: int) -> Prepared:
        tools: list[Tool] = [] if request.tool_choice is ToolChoice.NONE else request.tools
        conversation = Conversation(
            request.messages or [], tools, request.template_options, request.accepted_at
        )
        if not self._knows_tools:
            conversation = spell_out_tools(conversation)
        text = self._backend.render_chat(conversation)
        tokens = self._encode(self._backend.encode_rendered, text, "messages", limit)
        tail = text[-_TAIL:]
        constraint, param = constraint_of(request, tools, self._format, self._reasoning)
        gate = self._gate(tail, constraint) if constraint is not None else None
        if request.raw or not (tools or self._reasoning or self._format.whole):
            return Prepared(tokens, constraint=constraint)
        parser = create_parser(
            self._format,
            self._reasoning,
            tools,
            prompt_tail=tail,
            parallel=request.parallel_tool_calls,
        )
        shown = markers(self._format, self._reasoning)
        return Prepared(tokens, parser, shown, "", constraint, param, gate)

    def _gate(self, tail: str, constraint: Source) -> Callable[[TokenMask], TokenMask] | None:
        calls = not isinstance(constraint, Constraint)
        closer = closer_of(self._format, self._reasoning, tail, calls=calls).encode()
        if not closer:
            return None
        token_bytes, size = self._backend.token_bytes, self._model.vocab_size
        return lambda mask: GatedMask(mask, closer, token_bytes, size)

    def _prepare_text(self, request: Generate, limit: int, *, add_special: bool) -> Prepared:
        if isinstance(request.prompt, str):

            def encode(text: str) -> list[int]:
                return self._backend.encode_text(text, add_special=add_special)

            tokens = self._encode(encode, request.prompt, "prompt", limit)
            echo = request.prompt if request.echo else ""
            return Prepared(tokens, echo=echo, constraint=request.constraint)
        tokens = request.prompt or []
        self._check_tokens(tokens, "prompt")
        echo = self._text_of(tokens) if request.echo else ""
        return Prepared(tokens, echo=echo, constraint=request.constraint)

    def _encode(
        self, encode: Callable[[str], list[int]], text: str, param: str, limit: int
    ) -> list[int]:
        """Tokenise; refuse what has more than ``limit`` tokens for its beginning.

        No answer of this model goes on meanwhile, and it takes a third of a second per
        megabyte: a text of any length must not take more than one that fits.
        """
        size = _USUAL_TOKEN * limit
        while 2 * size < len(text):
            count = len(encode(text[:size])) - _SEAM
            if count > limit:
                raise self._too_long(f"at least {count}", param)
            size *= 2
        return encode(text)

    def _too_long(self, count: str, param: str) -> CodedError:
        # It begins as OpenAI's does: LiteLLM knows it by that.
        return CodedError(
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            f"this model's maximum context length is {self._model.context_length} tokens, "
            f"but the prompt has {count} and the answer needs at least one",
            param=param,
        )

    def _text_of(self, tokens: Iterable[int]) -> str:
        detokenizer = self._backend.new_detokenizer()
        return "".join([*map(detokenizer.add, tokens), detokenizer.finish()])

    def _check_tokens(self, tokens: Iterable[int], param: str) -> None:
        size = self._model.vocab_size
        for token in tokens:
            if not 0 <= token < size:
                raise CodedError(
                    ErrorCode.INVALID_VALUE,
                    f"token id {token} is outside the vocabulary of {size} tokens",
                    param=param,
                )


@contextmanager
def _contained(param: str) -> Iterator[None]:
    """Whatever goes wrong with a text is its request's business: the model has not seen it."""
    try:
        yield
    except (CodedError, KeyboardInterrupt, SystemExit):
        raise
    except RecursionError as error:
        raise CodedError(
            ErrorCode.INVALID_VALUE, "the request is nested too deeply", param=param
        ) from error
    except BaseException as error:  # a panic of a tokeniser is no Exception
        traceback.print_exc()
        raise CodedError(
            ErrorCode.INTERNAL_ERROR,
            f"the prompt cannot be prepared: {type(error).__name__}: {error}",
            param=param,
        ) from error


def _param(request: Generate) -> str:
    """The field that the prompt is from."""
    return "prompt" if request.messages is None else "messages"

"""Real inference before any traffic: the model must answer, stop and be cancellable.

Runs over the path that requests take. Greedy, so that the digest of its output
changes only when the model, the backend or the way they are run does.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from protocol.errors import CodedError
from protocol.messages import ChatMessage, FinishReason, Generate, Sampling
from supervisor.stream import RequestStream

#: Length of the canary's answer; on probation it is the larger one.
TOKENS = 16
STRICT_TOKENS = 64

#: An answer that goes on until it is cancelled.
CANCEL_AFTER_TOKENS = 256

_MESSAGES = [
    ChatMessage("system", "You are a helpful assistant."),
    ChatMessage("user", "Count from one to twenty."),
]
_TEXT = "The quick brown fox jumps over the lazy dog. One, two, three,"


class CanaryFailed(Exception):
    """The model did not prove itself; the message says what was wrong."""


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """What a passed canary measured. Speeds are those of the whole path."""

    time_to_first_token_s: float
    tokens_per_s: float
    output_digest: str
    prompt_tokens: int
    completion_tokens: int


#: Starts a request on the worker under test.
Submit = Callable[[Generate], RequestStream]


async def run_canary(
    submit: Submit, *, has_chat_template: bool, context_length: int, strict: bool
) -> CanaryReport:
    """Raise ``CanaryFailed`` unless the model passes. The caller sets the deadline."""
    tokens = min(STRICT_TOKENS if strict else TOKENS, context_length // 2)
    try:
        report = await _answer(submit, has_chat_template, tokens)
        await _cancel_midway(submit, has_chat_template)
        await _answer(submit, has_chat_template, tokens=4)
    except CodedError as error:
        raise CanaryFailed(error.message) from error
    return report


async def _answer(submit: Submit, has_chat_template: bool, tokens: int) -> CanaryReport:
    started = time.monotonic()
    stream = submit(_request(has_chat_template, tokens))
    texts: list[str] = []
    try:
        await stream.accepted()
        first = await stream.next()
        first_at = time.monotonic()
        tokens_at_first = stream.completion_tokens
        texts.append(first.text)
        finish = first.finish
        while finish is None:
            chunk = await stream.next()
            texts.append(chunk.text)
            finish = chunk.finish
    finally:
        stream.close()
    took = time.monotonic() - first_at
    text = "".join(texts)
    check_answer(text, finish, stream.completion_tokens, tokens)
    return CanaryReport(
        time_to_first_token_s=first_at - started,
        tokens_per_s=(stream.completion_tokens - tokens_at_first) / took if took > 0 else 0.0,
        output_digest=hashlib.sha256(text.encode()).hexdigest(),
        prompt_tokens=stream.prompt_tokens,
        completion_tokens=stream.completion_tokens,
    )


async def _cancel_midway(submit: Submit, has_chat_template: bool) -> None:
    """Drop a long answer after its first text; the next answer shows that this worked."""
    stream = submit(_request(has_chat_template, CANCEL_AFTER_TOKENS))
    try:
        await stream.accepted()
        await stream.next()
    finally:
        stream.close()


def _request(has_chat_template: bool, max_tokens: int) -> Generate:
    return Generate(
        request_id=0,
        messages=_MESSAGES if has_chat_template else None,
        prompt=None if has_chat_template else _TEXT,
        sampling=Sampling(temperature=0.0),
        max_tokens=max_tokens,
        # An instruct model may have nothing to say; that is no fault.
        ignore_eos=True,
        validate_logits=True,
    )


def check_answer(text: str, finish: FinishReason | None, sampled: int, max_tokens: int) -> None:
    """Raise ``CanaryFailed`` for an answer that no working model gives."""
    if finish is not FinishReason.LENGTH or sampled != max_tokens:
        raise CanaryFailed(
            f"did not stop when told: {sampled} tokens and finish reason {finish}, "
            f"asked for {max_tokens}"
        )
    if not any(char.isprintable() and not char.isspace() and char != "\ufffd" for char in text):
        raise CanaryFailed(f"answered without one readable character: {text[:80]!r}")
    if max_tokens >= TOKENS and is_degenerate(text, max_tokens):
        raise CanaryFailed(f"repeats itself without end: {text[:80]!r}")


def is_degenerate(text: str, tokens: int) -> bool:
    """Whether a text of so many tokens is one token, over and over, as broken weights give it."""
    text = text.strip()
    # Stripping took less than one unit, so there are at least ``tokens - 1`` whole ones.
    longest_unit = len(text) // (tokens - 1)
    return any(text[unit:] == text[:-unit] for unit in range(1, longest_unit + 1))

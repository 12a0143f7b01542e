"""Real inference before any traffic: the model must answer, stop and be cancellable.

Runs over the path that requests take. Greedy, so that the digest of its output
changes only when the model, the backend or the way they are run does.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from protocol.chat import ChatMessage
from protocol.errors import CodedError, ErrorCode
from protocol.messages import FinishReason, Generate, Sampling
from supervisor.stream import RequestStream

#: Length of the canary's answer; on probation it is the larger one.
TOKENS = 16
STRICT_TOKENS = 64

#: An answer that goes on until it is cancelled.
CANCEL_AFTER_TOKENS = 256
#: Length of the answer that follows, by which a model is known again.
RECALL_TOKENS = 4

_MESSAGES = [ChatMessage("user", "Count from one to twenty.")]
_TEXT = "One, two, three,"


class CanaryFailed(Exception):
    """The model did not prove itself; the message says what was wrong."""


class CanaryImpossible(Exception):
    """The model was loaded in a way that leaves no room to try it; no fault of its own."""


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """What a passed canary measured. Speeds are those of the whole path.

    Of a model that generates nothing: the time until the vectors were there, and the
    tokens of the inputs per second.

    ``canary`` names what was asked: only answers to the same can be compared.
    """

    canary: str

    time_to_first_token_s: float
    tokens_per_s: float
    output_digest: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Proof:
    """That a model works. ``recalled`` is its answer to what ``recall`` asks; None for a
    model that generates nothing."""

    report: CanaryReport
    recalled: str | None = None


#: Starts a request on the worker under test.
Submit = Callable[[Generate], RequestStream]


async def run_canary(
    submit: Submit, *, has_chat_template: bool, context_length: int, strict: bool
) -> Proof:
    """Raise ``CanaryFailed`` unless the model passes. The caller sets the deadline.

    A chat template that refuses the prompt says nothing about the model, which is
    then tried with plain text. Raises ``CanaryImpossible`` when not even that fits
    the context.
    """
    tokens = STRICT_TOKENS if strict else TOKENS
    prompts = [Generate(0, messages=_MESSAGES)] if has_chat_template else []
    prompts.append(_PLAIN)
    try:
        for prompt in prompts:
            canary = _Canary(submit, prompt, context_length)
            try:
                report = await canary.answer(tokens)
            except CodedError as error:
                if error.code not in _PROMPT_REFUSALS:
                    raise
                refusal = error
            else:
                return Proof(report, await recall(submit, context_length=context_length))
    except CodedError as error:
        raise CanaryFailed(error.message) from error
    raise CanaryImpossible(f"no prompt could be tried: {refusal.message}")


async def recall(submit: Submit, *, context_length: int) -> str:
    """Cancel an answer midway, have a short one after it, and return that.

    A respawned worker that answers as its proven predecessor did works as that did: the
    answer is greedy, so wrong weights or broken kernels give another. Raises
    ``CanaryFailed`` for one that does not end when told.
    """
    canary = _Canary(submit, _PLAIN, context_length)
    try:
        await canary.cancel_midway()
        stream = canary.ask(RECALL_TOKENS)
        try:
            expected = min(RECALL_TOKENS, context_length - await stream.accepted())
            answer = await stream.collect()
        finally:
            stream.close()
    except CodedError as error:
        raise CanaryFailed(error.message) from error
    check_end(answer.finish, stream.completion_tokens, expected)
    return answer.text


_PLAIN = Generate(0, prompt=_TEXT)
_PROMPT_REFUSALS = frozenset({ErrorCode.INVALID_VALUE, ErrorCode.CONTEXT_LENGTH_EXCEEDED})


@dataclass(frozen=True, slots=True)
class _Canary:
    submit: Submit
    prompt: Generate
    context_length: int

    async def answer(self, tokens: int) -> CanaryReport:
        started = time.monotonic()
        stream = self.ask(tokens)
        texts: list[str] = []
        try:
            prompt_tokens = await stream.accepted()
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
        ended = time.monotonic()
        text = "".join(texts)
        expected = min(tokens, self.context_length - prompt_tokens)
        check_answer(text, finish, stream.completion_tokens, expected)
        return CanaryReport(
            canary=self._name(tokens),
            time_to_first_token_s=first_at - started,
            tokens_per_s=_rate(
                (stream.completion_tokens, ended - started),
                (stream.completion_tokens - tokens_at_first, ended - first_at),
            ),
            output_digest=hashlib.sha256(text.encode()).hexdigest(),
            prompt_tokens=prompt_tokens,
            completion_tokens=stream.completion_tokens,
        )

    async def cancel_midway(self) -> None:
        """Drop a long answer after its first text; the next answer shows that this worked."""
        stream = self.ask(CANCEL_AFTER_TOKENS)
        try:
            await stream.accepted()
            await stream.next()
        finally:
            stream.close()

    def _name(self, tokens: int) -> str:
        # Spelt out: a new field of the messages must not make it another canary.
        chat = [(message.role, message.content) for message in self.prompt.messages or []]
        asked = msgspec.json.encode((chat, self.prompt.prompt, tokens))
        return hashlib.sha256(asked).hexdigest()[:16]

    def ask(self, max_tokens: int) -> RequestStream:
        return self.submit(
            msgspec.structs.replace(
                self.prompt,
                sampling=Sampling(temperature=0.0),
                max_tokens=max_tokens,
                # An instruct model may have nothing to say; that is no fault.
                ignore_eos=True,
                validate_logits=True,
                raw=True,
                # It leaves nothing behind that would make other answers out of those that follow.
                cache_prompt=False,
            )
        )


def check_answer(text: str, finish: FinishReason | None, sampled: int, max_tokens: int) -> None:
    """Raise ``CanaryFailed`` for an answer that no working model gives."""
    check_end(finish, sampled, max_tokens)
    if not any(char.isprintable() and not char.isspace() and char != "\ufffd" for char in text):
        raise CanaryFailed(f"answered without one readable character: {text[:80]!r}")
    if max_tokens >= TOKENS and is_degenerate(text, max_tokens):
        raise CanaryFailed(f"repeats itself without end: {text[:80]!r}")


def check_end(finish: FinishReason | None, sampled: int, max_tokens: int) -> None:
    """Raise ``CanaryFailed`` for an answer that did not end when it should."""
    if finish is not FinishReason.LENGTH or sampled != max_tokens:
        raise CanaryFailed(
            f"did not stop when told: {sampled} tokens and finish reason {finish}, "
            f"asked for {max_tokens}"
        )


def is_degenerate(text: str, tokens: int) -> bool:
    """Whether a text of so many tokens is one token, over and over, as broken weights give it."""
    text = text.strip()
    # Stripping took less than one unit, so there are at least ``tokens - 1`` whole ones.
    longest_unit = len(text) // (tokens - 1)
    return any(text[unit:] == text[:-unit] for unit in range(1, longest_unit + 1))


def _rate(whole: tuple[int, float], after_first: tuple[int, float]) -> float:
    """Tokens per second after the first ones; of all, if on a busy machine they came at once."""
    tokens, took_s = after_first if after_first[0] else whole
    return tokens / took_s if took_s > 0 else 0.0

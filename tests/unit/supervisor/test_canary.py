"""What an answer of a working model looks like, and what the canary asks for."""

import asyncio
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Delta, FinishReason, Generate
from supervisor.canary import (
    TOKENS,
    CanaryFailed,
    CanaryImpossible,
    CanaryReport,
    check_answer,
    is_degenerate,
    run_canary,
)
from supervisor.stream import RequestStream

Answer = Callable[[Generate, RequestStream], None]


def say(*tokens: str) -> Answer:
    """Answers every request with these tokens, over and over, up to its limit."""

    def answer(request: Generate, stream: RequestStream) -> None:
        assert request.max_tokens is not None
        for n in range(request.max_tokens):
            last = n + 1 == request.max_tokens
            finish = FinishReason.LENGTH if last else None
            stream.push(Delta(1, tokens[n % len(tokens)], [n], finish))

    return answer


async def run(
    answer: Answer, *, strict: bool = False, context_length: int = 4096
) -> tuple[list[Generate], CanaryReport]:
    asked: list[Generate] = []

    def submit(request: Generate) -> RequestStream:
        asked.append(request)
        stream = RequestStream(max_buffer_bytes=None, on_close=lambda: None)
        stream.accept(7)
        answer(request, stream)
        return stream

    proof = await run_canary(
        submit, has_chat_template=True, context_length=context_length, strict=strict
    )
    return asked, proof.report


async def test_tokens_that_come_all_at_once_have_a_speed() -> None:
    # A busy supervisor reads them together: 0 would be remembered as this model's speed.
    _, report = await run(say("one ", "two ", "three "))
    assert report.tokens_per_s > 0


async def test_a_working_model_passes() -> None:
    asked, _ = await run(say("one ", "two ", "three "))
    assert len(asked) == 3
    assert all(request.validate_logits and request.ignore_eos for request in asked)
    # The answers behind a canary must not depend on which it was.
    assert not any(request.cache_prompt for request in asked)
    assert asked[0].sampling.temperature == 0


async def test_the_digest_tells_outputs_apart() -> None:
    digests = {
        (await run(say(*words)))[1].output_digest
        for words in (("a ", "b "), ("a ", "b "), ("a ", "c "))
    }
    assert len(digests) == 2


async def test_the_report_tells_what_was_asked() -> None:
    reports = [
        (await run(say("one ", "two "), strict=strict))[1] for strict in (False, False, True)
    ]
    assert reports[0].canary == reports[1].canary != reports[2].canary


async def test_probation_asks_for_more() -> None:
    asked, _ = await run(say("one ", "two ", "three "), strict=True)
    assert asked[0].max_tokens is not None
    assert asked[0].max_tokens > TOKENS


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (say("!"), "repeats itself"),
        (say("the "), "repeats itself"),
        (say(""), "readable"),
        (say("\ufffd"), "readable"),
        (say("\n", " "), "readable"),
        (lambda _, stream: stream.push(Delta(1, "Hi", [1], FinishReason.STOP)), "stop when told"),
        (
            lambda _, stream: stream.fail(CodedError(ErrorCode.MODEL_CRASHED, "died of it")),
            "died of it",
        ),
    ],
)
async def test_a_broken_model_fails(answer: Answer, why: str) -> None:
    with pytest.raises(CanaryFailed, match=why):
        await run(answer)


def refuse_chat(request: Generate, stream: RequestStream) -> None:
    """A chat template that does not like what it gets."""
    if request.messages is not None:
        stream.fail(CodedError(ErrorCode.INVALID_VALUE, "no such role", param="messages"))
    else:
        say("one ", "two ", "three ")(request, stream)


async def test_a_template_that_refuses_the_prompt_is_no_failure() -> None:
    asked, _ = await run(refuse_chat)
    assert [request.messages is None for request in asked] == [False, True, True, True]


async def test_a_context_too_small_for_any_prompt_is_no_failure_of_the_model() -> None:
    def too_long(request: Generate, stream: RequestStream) -> None:
        stream.fail(CodedError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, "too long"))

    with pytest.raises(CanaryImpossible):
        await run(too_long)


async def test_a_small_context_ends_the_answer_early() -> None:
    def answer(request: Generate, stream: RequestStream) -> None:
        assert request.max_tokens is not None
        short = msgspec.structs.replace(request, max_tokens=min(request.max_tokens, 3))
        say("one ", "two ", "three ")(short, stream)

    await run(answer, context_length=10)


async def test_a_model_that_never_answers_is_ended_by_the_callers_deadline() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await run(lambda request, stream: None)


@given(st.text("ab \n", min_size=1, max_size=3).filter(str.strip), st.integers(TOKENS, 40))
def test_any_short_unit_over_and_over_is_degenerate(unit: str, times: int) -> None:
    assert is_degenerate(unit * times, times)


def test_ordinary_answers_are_not_degenerate() -> None:
    assert not is_degenerate("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13", TOKENS)
    assert not is_degenerate("aaaa", TOKENS)
    assert not is_degenerate("one two " * TOKENS, 2 * TOKENS)
    check_answer("Sure! One, two, three", FinishReason.LENGTH, 16, 16)

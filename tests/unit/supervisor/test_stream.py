"""One request's answer on its way: order, coalescing, bounds, ends."""

import asyncio
import tracemalloc

import pytest

from protocol.chat import Extras, ToolCallPiece
from protocol.errors import CodedError, ErrorCode
from protocol.messages import Delta, FinishReason
from supervisor.stream import Chunk, RequestStream


class Closed:
    """Counts how often the owner was told to cancel."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


def stream(closed: Closed | None = None, bound: int | None = None) -> RequestStream:
    return RequestStream(max_buffer_bytes=bound, on_close=closed or Closed())


def delta(text: str, finish: FinishReason | None = None) -> Delta:
    return Delta(1, text, [0], finish)


async def test_text_arrives_in_order_and_in_one_piece_when_the_reader_is_behind() -> None:
    answer = stream()
    answer.push(delta("a"))
    answer.push(delta("b"))
    assert await answer.next() == Chunk("ab", None)
    answer.push(delta("c", FinishReason.STOP))
    assert await answer.next() == Chunk("c", FinishReason.STOP)
    assert answer.completion_tokens == 3


async def test_the_reader_sleeps_until_there_is_text() -> None:
    answer = stream()
    reading = asyncio.ensure_future(answer.next())
    answer.push(delta(""))
    await asyncio.sleep(0)
    assert not reading.done()
    answer.push(delta("x"))
    assert await reading == Chunk("x", None)


async def test_acceptance_comes_before_any_text() -> None:
    answer = stream()
    accepting = asyncio.ensure_future(answer.accepted())
    await asyncio.sleep(0)
    answer.accept(12)
    assert await accepting == 12


async def test_a_refusal_reaches_whoever_waits() -> None:
    answer = stream()
    accepting = asyncio.ensure_future(answer.accepted())
    await asyncio.sleep(0)
    answer.fail(CodedError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, "too long"))
    with pytest.raises(CodedError, match="too long"):
        await accepting


async def test_text_before_an_error_is_delivered_first() -> None:
    answer = stream()
    answer.push(delta("half"))
    answer.fail(CodedError(ErrorCode.MODEL_CRASHED, "died"))
    assert await answer.next() == Chunk("half", None)
    with pytest.raises(CodedError, match="died"):
        await answer.next()


async def test_a_slow_reader_loses_its_request_at_the_bound() -> None:
    closed = Closed()
    answer = stream(closed, bound=150)
    for _ in range(20):
        answer.push(delta("12345"))
    assert closed.times == 1
    assert (await answer.next()).text == "123451234512345"
    with pytest.raises(CodedError) as error:
        await answer.next()
    assert error.value.code is ErrorCode.STREAM_OVERFLOW


async def test_collect_waits_for_the_whole_and_delivers_nothing_before() -> None:
    answer = stream()
    collecting = asyncio.ensure_future(answer.collect())
    answer.push(delta("a"))
    await asyncio.sleep(0)
    assert not answer.delivered
    answer.push(delta("b", FinishReason.LENGTH))
    assert await collecting == Chunk("ab", FinishReason.LENGTH)


async def test_a_restart_forgets_the_first_run() -> None:
    answer = stream()
    answer.start(5, 0.1)
    answer.push(delta("first run"))
    answer.restart()
    assert (answer.cached_tokens, answer.has_started) == (0, False)
    answer.push(delta("second", FinishReason.STOP))
    assert await answer.next() == Chunk("second", FinishReason.STOP)
    assert answer.completion_tokens == 1


async def test_letting_go_cancels_once_and_only_what_runs() -> None:
    closed = Closed()
    running = stream(closed)
    running.close()
    running.close()
    assert closed.times == 1
    ended = stream(closed)
    ended.push(delta("", FinishReason.STOP))
    ended.close()
    assert closed.times == 1


async def test_nothing_follows_the_end() -> None:
    answer = stream()
    answer.push(delta("a", FinishReason.STOP))
    answer.push(delta("b"))
    answer.fail(CodedError(ErrorCode.MODEL_CRASHED, "late"))
    assert await answer.next() == Chunk("a", FinishReason.STOP)


async def test_a_sink_gets_text_only_while_its_consumer_waits_for_more() -> None:
    answer = stream(bound=200)
    taken: list[str] = []
    behind = False

    def sink(text: str, _extras: Extras | None) -> bool:
        if not behind:
            taken.append(text)
        return not behind

    answer.push(delta("a"))
    assert await answer.next() == Chunk("a", None)
    answer.drain_into(sink)
    answer.push(delta("b"))
    assert taken == [], "the consumer is still at work on what came before"
    assert await answer.next() == Chunk("b", None)
    waiting = asyncio.ensure_future(answer.next())
    await asyncio.sleep(0)
    answer.push(delta("c"))
    assert taken == ["c"]
    behind = True
    answer.push(delta("d"))
    behind = False
    # Never past what is held back.
    answer.push(delta("e"))
    assert await waiting == Chunk("de", None)
    assert taken == ["c"]
    waiting = asyncio.ensure_future(answer.next())
    await asyncio.sleep(0)
    answer.push(delta("f", FinishReason.STOP))
    assert await waiting == Chunk("f", FinishReason.STOP)
    assert taken == ["c"], "the end is the consumer's"
    assert answer.completion_tokens == 6


async def test_what_a_sink_does_not_take_is_bounded() -> None:
    closed = Closed()
    answer = stream(closed, bound=200)
    answer.push(delta("a"))
    await answer.next()
    answer.drain_into(lambda _text, _extras: False)
    waiting = asyncio.ensure_future(answer.next())
    await asyncio.sleep(0)
    for text in "bcde":
        answer.push(delta(text))
    assert closed.times == 1
    assert await waiting == Chunk("bcde", None)
    with pytest.raises(CodedError) as refused:
        await answer.next()
    assert refused.value.code is ErrorCode.STREAM_OVERFLOW


async def test_a_sink_that_fails_is_the_consumers_trouble_not_the_readers() -> None:
    def broken(_text: str, _extras: Extras | None) -> bool:
        raise RuntimeError("the connection is closed")

    answer = stream()
    answer.push(delta("a"))
    await answer.next()
    answer.drain_into(broken)
    waiting = asyncio.ensure_future(answer.next())
    await asyncio.sleep(0)
    answer.push(delta("b"))
    assert await waiting == Chunk("b", None)


@pytest.mark.parametrize("text", ["ab", "\N{GRINNING FACE}", "a" * 300])
async def test_the_bound_is_of_memory_however_small_the_pieces(text: str) -> None:
    closed = Closed()
    answer = stream(closed, bound=1_000_000)
    pieces = 0
    tracemalloc.start()
    try:
        while not closed.times and pieces < 1_000_000:
            # As a decoder does: every piece is a text of its own.
            answer.push(delta(text.encode().decode()))
            pieces += 1
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert closed.times == 1
    assert 500_000 < held < 1_500_000


async def test_the_end_is_told_once_whatever_it_is() -> None:
    told: list[str] = []
    answered, failed, late = stream(), stream(), stream()
    answered.when_over(lambda: told.append("answered"))
    failed.when_over(lambda: told.append("failed"))
    answered.push(delta("a"))
    assert not told
    answered.push(delta("b", FinishReason.STOP))
    for _ in range(2):
        failed.fail(CodedError(ErrorCode.MODEL_CRASHED, "died"))
    late.push(delta("", FinishReason.STOP))
    late.when_over(lambda: told.append("late"))
    assert told == ["answered", "failed", "late"]


async def test_extras_arrive_joined_and_end_the_waiting() -> None:
    answer = stream()
    waiting = asyncio.ensure_future(answer.next())
    await asyncio.sleep(0)
    answer.push(Delta(1, "", [0], extras=Extras("hm", 1)))
    answer.push(Delta(1, "a", [0], extras=Extras(" so", 1)))
    call = [ToolCallPiece(0, "call_1", "f"), ToolCallPiece(0, arguments="{")]
    answer.push(Delta(1, "", [0], extras=Extras(tool_calls=call)))
    answer.push(Delta(1, "", [0], extras=Extras(tool_calls=[ToolCallPiece(0, arguments="}")])))
    joined = Extras("hm so", 2, [ToolCallPiece(0, "call_1", "f", "{}")])
    assert await waiting == Chunk("a", None, joined)
    assert answer.reasoning_tokens == 2


async def test_extras_count_towards_the_bound() -> None:
    closed = Closed()
    answer = stream(closed, bound=400)
    for _ in range(2):
        answer.push(Delta(1, "", [0], extras=Extras("hm")))
    assert closed.times == 1


async def test_a_restart_forgets_extras() -> None:
    answer = stream()
    answer.push(Delta(1, "", [0], extras=Extras("hm", 1)))
    answer.restart()
    answer.push(delta("a", FinishReason.STOP))
    assert await answer.next() == Chunk("a", FinishReason.STOP)
    assert answer.reasoning_tokens == 0

"""Requests over the death of their worker: run again unseen, or end in a typed error."""

import asyncio

import pytest

from protocol.errors import CodedError, ErrorCode
from protocol.messages import (
    Accepted,
    Cancel,
    Delta,
    Detokenize,
    Detokenized,
    Embed,
    Embedded,
    FinishReason,
    Generate,
    Inquiry,
    InquiryAnswer,
    Phase,
    Prefilled,
    Rejected,
    Sampling,
    Started,
    Tokenize,
    Tokenized,
    ToWorker,
)
from supervisor.line import MAX_GIVEN_UP, Delivery
from supervisor.requests import RequestTable
from supervisor.stream import Prefill, RequestStream

CRASHED = CodedError(ErrorCode.MODEL_CRASHED, "killed by SIGSEGV")


class Worker:
    """Keeps what it is sent."""

    def __init__(self, delivery: Delivery = Delivery.SENT) -> None:
        self.sent: list[ToWorker] = []
        self.delivery = delivery

    def __call__(self, message: ToWorker) -> Delivery:
        if self.delivery is Delivery.SENT:
            self.sent.append(message)
        return self.delivery

    def request_id(self, index: int = -1) -> int:
        message = self.sent[index]
        assert isinstance(message, Generate | Embed | Tokenize | Detokenize)
        return message.request_id


@pytest.fixture
def table() -> RequestTable:
    return RequestTable(max_stream_buffer_bytes=1000)


def open_on(table: RequestTable, worker: Worker, **options: bool) -> RequestStream:
    table.connect(worker)
    table.resume()
    return table.open(Generate(0, prompt="x"), **{"streaming": True, **options})


def text_delta(worker: Worker, text: str, finish: FinishReason | None = None) -> Delta:
    return Delta(worker.request_id(), text, [1], finish)


async def test_deltas_find_their_stream(table: RequestTable) -> None:
    worker = Worker()
    first, second = open_on(table, worker), open_on(table, worker)
    table.deliver(
        [Delta(worker.request_id(0), "one", [1]), Delta(worker.request_id(1), "two", [1])]
    )
    assert (await first.next()).text == "one"
    assert (await second.next()).text == "two"


async def test_a_finished_request_is_forgotten(table: RequestTable) -> None:
    worker = Worker()
    open_on(table, worker)
    table.deliver([text_delta(worker, "end", FinishReason.STOP)])
    assert len(table) == 0


async def test_a_refusal_of_the_worker_reaches_the_client(table: RequestTable) -> None:
    worker = Worker()
    stream = open_on(table, worker)
    table.reject(
        Rejected(worker.request_id(), ErrorCode.CONTEXT_LENGTH_EXCEEDED, "long", "messages")
    )
    with pytest.raises(CodedError) as error:
        await stream.accepted()
    assert (error.value.code, error.value.param) == (
        ErrorCode.CONTEXT_LENGTH_EXCEEDED,
        "messages",
    )
    assert len(table) == 0


async def test_letting_go_cancels_at_the_worker_and_drops_late_deltas(
    table: RequestTable,
) -> None:
    worker = Worker()
    stream = open_on(table, worker)
    request_id = worker.request_id()
    stream.close()
    assert worker.sent[-1] == Cancel(request_id)
    table.deliver(
        [Delta(request_id, "late", [1]), Delta(request_id, "", [], FinishReason.CANCELLED)]
    )
    assert len(table) == 0


async def test_what_nobody_saw_runs_again_and_what_was_seen_fails(table: RequestTable) -> None:
    first = Worker()
    seen = open_on(table, first)
    table.deliver([text_delta(first, "seen")])
    await seen.next()
    unseen = open_on(table, first)
    table.deliver([text_delta(first, "buffered only")])
    table.disconnect()
    table.park(CRASHED)
    with pytest.raises(CodedError, match="SIGSEGV"):
        await seen.next()
    second = Worker()
    table.connect(second)
    table.resume()
    table.accept(Accepted(second.request_id(), 3))
    table.deliver([text_delta(second, "whole", FinishReason.STOP)])
    assert (await unseen.next()).text == "whole"


async def test_before_traffic_is_open_the_worker_gets_canaries_only(table: RequestTable) -> None:
    early = table.open(Generate(0, prompt="x"), streaming=True)
    worker = Worker()
    table.connect(worker)
    late = table.open(Generate(0, prompt="x"), streaming=True)
    assert worker.sent == []
    table.open(Generate(0, prompt="canary"), streaming=True, is_canary=True).close()
    assert [type(message) for message in worker.sent] == [Generate, Cancel]
    table.resume()
    assert table.sent() == 2
    assert len(worker.sent) == 4
    assert table.busy
    early.close()
    late.close()
    assert not table.busy


async def test_a_request_is_not_run_a_third_time(table: RequestTable) -> None:
    stream = open_on(table, Worker())
    table.park(CRASHED)
    table.connect(Worker())
    table.resume()
    table.park(CRASHED)
    with pytest.raises(CodedError, match="SIGSEGV"):
        await stream.next()


async def test_a_canary_is_not_run_again(table: RequestTable) -> None:
    stream = open_on(table, Worker(), is_canary=True)
    table.park(CRASHED)
    with pytest.raises(CodedError):
        await stream.next()


async def test_a_worker_that_does_not_read_refuses_new_requests(table: RequestTable) -> None:
    with pytest.raises(CodedError) as error:
        open_on(table, Worker(Delivery.BLOCKED))
    assert error.value.code is ErrorCode.RATE_LIMIT_EXCEEDED
    assert len(table) == 0


async def test_a_request_that_met_a_dying_worker_runs_on_the_next(table: RequestTable) -> None:
    stream = open_on(table, Worker(Delivery.LOST))
    table.disconnect()
    table.park(CRASHED)
    second = Worker()
    table.connect(second)
    table.resume()
    table.deliver([text_delta(second, "whole", FinishReason.STOP)])
    assert (await stream.next()).text == "whole"


async def test_letting_go_of_a_parked_request_tells_no_worker(table: RequestTable) -> None:
    stream = open_on(table, Worker())
    table.disconnect()
    table.park(CRASHED)
    second = Worker()
    table.connect(second)
    stream.close()
    table.resume()
    assert second.sent == []


async def test_a_cancel_that_was_not_sent_is_sent_when_the_worker_speaks_of_it(
    table: RequestTable,
) -> None:
    worker = Worker()
    table.connect(worker)
    table.resume()
    streams = [table.open(Generate(0, prompt="x"), streaming=True) for _ in range(3)]
    ids = [worker.request_id(index) for index in range(3)]
    worker.delivery = Delivery.BLOCKED
    for stream in streams:
        stream.close()
    table.accept(Accepted(ids[0], 3))
    worker.delivery = Delivery.SENT
    assert not [message for message in worker.sent if isinstance(message, Cancel)]
    table.accept(Accepted(ids[0], 3))
    table.start(Started(ids[1], 0))
    for _ in range(2):
        table.deliver([Delta(ids[2], "for nobody", [1])])
    assert worker.sent[3:] == [Cancel(request_id) for request_id in ids]


async def test_what_was_given_up_and_not_ended_is_bounded(table: RequestTable) -> None:
    worker = Worker()
    table.connect(worker)
    table.resume()
    request = Generate(0, prompt="x")
    for _ in range(MAX_GIVEN_UP):
        table.open(request, streaming=True).close()
    sent = len(worker.sent)
    with pytest.raises(CodedError) as refused:
        table.open(request, streaming=True)
    assert refused.value.code is ErrorCode.RATE_LIMIT_EXCEEDED
    assert len(worker.sent) == sent
    first = worker.request_id(0)
    table.deliver([Delta(first, "", [], FinishReason.CANCELLED)])
    table.open(request, streaming=True).close()
    with pytest.raises(CodedError):
        table.open(request, streaming=True)
    # A new worker has none of them.
    table.disconnect()
    table.connect(worker)
    table.resume()
    table.open(request, streaming=True)


async def test_one_client_cannot_have_all_places(table: RequestTable) -> None:
    worker = Worker()
    table.connect(worker)
    table.resume()

    def ask(client: str) -> RequestStream:
        return table.open(Generate(0, prompt="x", client=client), streaming=True, limit=12)

    streams = [ask("agent") for _ in range(10)]
    with pytest.raises(CodedError, match="places are for others"):
        ask("agent")
    assert [ask(client) for client in ("ann", "bob")]
    with pytest.raises(CodedError, match="12 requests in hand"):
        ask("eve")
    # The place of one that has ended is for who has fewer.
    streams[0].close()
    with pytest.raises(CodedError):
        ask("agent")
    ask("eve")


@pytest.mark.parametrize("seed", [None, 5])
async def test_a_request_runs_again_with_its_seed(table: RequestTable, seed: int | None) -> None:
    first, second = Worker(), Worker()
    table.connect(first)
    table.resume()
    asked = Generate(0, prompt="x", sampling=Sampling(seed=seed))
    table.open(asked, streaming=True)
    assert table.running() == [asked]
    table.disconnect()
    table.park(CRASHED)
    table.connect(second)
    table.resume()
    assert first.sent == second.sent
    [run] = second.sent
    assert isinstance(run, Generate)
    assert run.sampling.seed is not None
    assert seed in (None, run.sampling.seed)


async def test_unseeded_requests_differ_and_greedy_ones_need_no_seed(table: RequestTable) -> None:
    worker = Worker()
    table.connect(worker)
    table.resume()
    for temperature in (1.0, 1.0, 0.0):
        sampling = Sampling(temperature=temperature)
        table.open(Generate(0, prompt="x", sampling=sampling), streaming=True)
    runs = [message for message in worker.sent if isinstance(message, Generate)]
    one, other, greedy = (run.sampling.seed for run in runs)
    assert one != other
    assert greedy is None


async def test_a_start_tells_what_was_cached_and_when() -> None:
    now = 100.0
    table = RequestTable(max_stream_buffer_bytes=1000, clock=lambda: now)
    worker = Worker()
    stream = open_on(table, worker)
    assert not stream.has_started
    now = 103.5
    table.start(Started(worker.request_id(), 12))
    table.start(Started(99, 1))
    assert (stream.cached_tokens, stream.started_after_s) == (12, 3.5)


async def test_how_far_a_prompt_is_is_known_until_the_answer_starts(table: RequestTable) -> None:
    worker = Worker()
    stream = open_on(table, worker)
    table.prefilled(Prefilled(worker.request_id(), 10, 40))
    table.prefilled(Prefilled(99, 1, 2))
    assert stream.prefill == Prefill(10, 40)
    table.start(Started(worker.request_id(), 0))
    assert stream.prefill is None


async def test_a_run_that_is_lost_has_computed_nothing(table: RequestTable) -> None:
    worker = Worker()
    stream = open_on(table, worker)
    table.prefilled(Prefilled(worker.request_id(), 10, 40))
    table.disconnect()
    table.park(CRASHED)
    assert stream.prefill is None


async def test_a_run_that_is_lost_has_not_started(table: RequestTable) -> None:
    worker = Worker()
    stream = open_on(table, worker)
    table.start(Started(worker.request_id(), 12))
    table.disconnect()
    table.park(CRASHED)
    assert (stream.cached_tokens, stream.has_started) == (0, False)
    assert (len(table), table.sent()) == (1, 0)
    table.connect(Worker())
    table.resume()
    assert table.sent() == 1


@pytest.mark.parametrize("end", ["finish", "cancel"])
async def test_the_wait_for_a_place_follows_the_ends_of_answers(end: str) -> None:
    now = 0.0
    table = RequestTable(max_stream_buffer_bytes=1000, clock=lambda: now)
    worker = Worker()
    streams = [open_on(table, worker) for _ in range(3)]
    ids = [worker.request_id(index) for index in range(3)]
    for number in range(2):
        now += 30.0
        table.start(Started(ids[number], 0))
        if end == "finish":
            table.deliver([Delta(ids[number], "x", [1], FinishReason.STOP)])
        else:
            streams[number].close()
    assert table.retry_after_s() == pytest.approx(30.0)


async def test_what_never_held_a_slot_says_nothing_of_the_pace() -> None:
    now = 0.0
    table = RequestTable(max_stream_buffer_bytes=1000, clock=lambda: now)
    before = table.retry_after_s()
    worker = Worker()
    given_up, canary = open_on(table, worker), open_on(table, worker, is_canary=True)
    refused, lost = open_on(table, worker), open_on(table, worker)
    for index in (1, 3):
        table.start(Started(worker.request_id(index), 0))
    table.deliver([Delta(worker.request_id(3), "x", [1])])
    await lost.next()
    refused_id = worker.request_id(2)
    now = 0.5
    given_up.close()
    table.reject(Rejected(refused_id, ErrorCode.INVALID_VALUE, "bad"))
    canary.close()
    table.park(CRASHED)
    assert len(table) == 0
    assert refused.ended
    assert table.retry_after_s() == before


async def test_everyone_is_answered_when_nothing_will_serve_them(table: RequestTable) -> None:
    streams = [open_on(table, Worker()) for _ in range(3)]
    table.fail_all(CodedError(ErrorCode.MODEL_UNLOADED, "unloaded"))
    for stream in streams:
        with pytest.raises(CodedError, match="unloaded"):
            await stream.accepted()
    assert len(table) == 0


# --- inquiries ---

TOKENIZE = Tokenize(0, Generate(0, prompt="x"))


async def ask(table: RequestTable, inquiry: Inquiry = TOKENIZE) -> asyncio.Task[InquiryAnswer]:
    """An inquiry that has been sent, if there is somebody to send it to."""
    task = asyncio.create_task(table.ask(inquiry))
    await asyncio.sleep(0)
    return task


async def test_an_inquiry_is_answered_and_counts_as_no_request(table: RequestTable) -> None:
    worker = Worker()
    table.connect(worker)
    table.resume()
    first, second = await ask(table), await ask(table, Detokenize(0, [1]))
    assert (len(table), table.sent(), table.phase()) == (0, 0, Phase.PREFILL)
    assert table.running() == [TOKENIZE.generate]
    table.answer(Detokenized(worker.request_id(1), "a"))
    table.answer(Tokenized(worker.request_id(0), 1, [7]))
    assert await second == Detokenized(worker.request_id(1), "a")
    assert await first == Tokenized(worker.request_id(0), 1, [7])
    table.answer(Tokenized(worker.request_id(0), 1, [7]))
    assert table.phase() is Phase.IDLE


async def test_a_refused_inquiry_raises(table: RequestTable) -> None:
    worker = Worker()
    table.connect(worker)
    table.resume()
    task = await ask(table)
    table.reject(Rejected(worker.request_id(), ErrorCode.INVALID_VALUE, "bad", "messages"))
    with pytest.raises(CodedError, match="bad") as error:
        await task
    assert error.value.param == "messages"


async def test_who_is_cancelled_calls_the_inquiry_off(table: RequestTable) -> None:
    worker = Worker()
    table.connect(worker)
    table.resume()
    task = await ask(table)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert worker.sent[-1] == Cancel(worker.request_id(0))
    table.answer(Tokenized(worker.request_id(0), 1))


async def test_an_inquiry_runs_again_on_the_next_worker_and_once_only(table: RequestTable) -> None:
    table.connect(Worker())
    table.resume()
    task = await ask(table)
    for _ in range(2):
        table.disconnect()
        table.park(CRASHED)
        assert table.phase() is Phase.IDLE
        second = Worker()
        table.connect(second)
        table.resume()
    assert second.sent == []
    with pytest.raises(CodedError, match="SIGSEGV"):
        await task


async def test_an_inquiry_that_survived_its_worker_is_answered(table: RequestTable) -> None:
    table.connect(Worker())
    table.resume()
    task = await ask(table)
    table.disconnect()
    table.park(CRASHED)
    second = Worker()
    table.connect(second)
    table.resume()
    table.answer(Tokenized(second.request_id(), 3))
    assert (await task) == Tokenized(second.request_id(), 3)


async def test_inquiries_end_when_nothing_will_serve_them(table: RequestTable) -> None:
    table.connect(Worker())
    table.resume()
    task = await ask(table)
    table.fail_all(CodedError(ErrorCode.MODEL_UNLOADED, "unloaded"))
    with pytest.raises(CodedError, match="unloaded"):
        await task


async def test_inquiries_are_bounded() -> None:
    table = RequestTable(max_stream_buffer_bytes=1000, max_inquiries=2)
    table.connect(Worker())
    table.resume()
    tasks = [await ask(table) for _ in range(3)]
    with pytest.raises(CodedError) as error:
        await tasks.pop()
    assert error.value.code is ErrorCode.RATE_LIMIT_EXCEEDED
    assert error.value.retry_after_s is not None
    table.fail_all(CRASHED)
    await asyncio.gather(*tasks, return_exceptions=True)
    table.connect(Worker(Delivery.BLOCKED))
    table.resume()
    with pytest.raises(CodedError, match="does not take any more"):
        await table.ask(TOKENIZE)


# --- vectors ------------------------------------------------------------------


async def test_vectors_are_handed_over_whole(table: RequestTable) -> None:
    worker = Worker()
    table.connect(worker)
    table.resume()
    stream = table.open(Embed(0, ["a", "b", "c"]), streaming=False)
    number = worker.request_id()
    table.accept(Accepted(number, 6))
    table.start(Started(number, 0))
    table.embed(Embedded(number, [b"1", b"2"], last=False))
    assert not stream.ended
    table.embed(Embedded(number, [b"3"], last=True))
    await stream.collect()
    assert stream.vectors == [b"1", b"2", b"3"]
    assert stream.prompt_tokens == 6
    assert len(table) == 0


async def test_vectors_are_computed_again_after_a_crash(table: RequestTable) -> None:
    worker, second = Worker(), Worker()
    table.connect(worker)
    table.resume()
    stream = table.open(Embed(0, ["a", "b"]), streaming=False)
    table.embed(Embedded(worker.request_id(), [b"lost"], last=False))
    table.disconnect()
    table.park(CRASHED)
    table.connect(second)
    table.resume()
    assert second.sent == worker.sent
    table.embed(Embedded(second.request_id(), [b"1", b"2"], last=True))
    await stream.collect()
    assert stream.vectors == [b"1", b"2"]


async def test_vectors_of_an_abandoned_request_are_dropped(table: RequestTable) -> None:
    worker = Worker()
    table.connect(worker)
    table.resume()
    stream = table.open(Embed(0, ["a"]), streaming=False)
    stream.close()
    assert worker.sent[-1] == Cancel(worker.request_id(0))
    table.embed(Embedded(worker.request_id(0), [b"1"], last=True))
    assert not stream.vectors


# --- going on where it was --------------------------------------------------------


def open_resumable(table: RequestTable, worker: Worker, *, streaming: bool = True) -> RequestStream:
    table.connect(worker)
    table.resume()
    return table.open(Generate(0, prompt="x"), streaming=streaming, may_resume=True)


def crash(table: RequestTable) -> Worker:
    """The worker dies; the next one, which has got what goes on."""
    table.disconnect()
    table.park(CRASHED)
    worker = Worker()
    table.connect(worker)
    table.resume()
    return worker


def run_of(worker: Worker) -> Generate:
    message = worker.sent[-1]
    assert isinstance(message, Generate)
    return message


async def test_what_was_seen_goes_on_with_its_tokens(table: RequestTable) -> None:
    first = Worker()
    stream = open_resumable(table, first)
    number = first.request_id()
    table.accept(Accepted(number, 7))
    table.start(Started(number, 3))
    table.deliver([Delta(number, "a", [11]), Delta(number, "bc", [12, 13])])
    assert (await stream.next()).text == "abc"
    # Received and not delivered yet: with the client all the same.
    table.deliver([Delta(number, "d", [14])])
    second = crash(table)
    assert run_of(second).resume_tokens == [11, 12, 13, 14]
    assert run_of(second).sampling == run_of(first).sampling
    table.accept(Accepted(number, 99))
    table.prefilled(Prefilled(number, 1, 2))
    table.start(Started(number, 0))
    assert (await stream.next()).text == "d"
    table.deliver([Delta(number, "e", [15], FinishReason.STOP)])
    last = await stream.next()
    assert (last.text, last.finish) == ("e", FinishReason.STOP)
    assert (stream.prompt_tokens, stream.cached_tokens, stream.completion_tokens) == (7, 3, 5)
    assert (stream.resumes, stream.completed, stream.prefill) == (1, True, None)


@pytest.mark.parametrize("seen", [True, False], ids=["resumed", "begun anew"])
async def test_it_is_as_late_for_every_run_as_when_the_request_came(
    table: RequestTable, monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    """Chat templates print the time: another prompt would not fit the tokens there are."""
    midnight = 1_700_000_000.0
    monkeypatch.setattr("supervisor.requests.time.time", lambda: midnight - 1)
    first = Worker()
    stream = open_resumable(table, first)
    if seen:
        table.deliver([Delta(first.request_id(), "a", [11])])
        await stream.next()
    monkeypatch.setattr("supervisor.requests.time.time", lambda: midnight + 1)
    second = crash(table)
    assert bool(run_of(second).resume_tokens) is seen
    assert run_of(first).accepted_at == run_of(second).accepted_at == midnight - 1
    later = Worker()
    open_resumable(table, later)
    assert run_of(later).accepted_at == midnight + 1


async def test_an_answer_that_is_collected_goes_on_as_well(table: RequestTable) -> None:
    first = Worker()
    stream = open_resumable(table, first, streaming=False)
    table.deliver([Delta(first.request_id(), "half", [1])])
    second = crash(table)
    assert run_of(second).resume_tokens == [1]
    table.deliver([Delta(second.request_id(), " whole", [2], FinishReason.STOP)])
    assert (await stream.collect()).text == "half whole"


async def test_what_has_made_nothing_begins_anew_and_counts_as_no_resume(
    table: RequestTable,
) -> None:
    first = Worker()
    stream = open_resumable(table, first)
    second = crash(table)
    assert run_of(second) == run_of(first)
    assert stream.resumes == 0


async def test_an_answer_goes_on_twice_and_no_more(table: RequestTable) -> None:
    worker = Worker()
    stream = open_resumable(table, worker)
    for token in range(2):
        table.deliver([Delta(worker.request_id(), "x", [token])])
        worker = crash(table)
    assert run_of(worker).resume_tokens == [0, 1]
    table.deliver([Delta(worker.request_id(), "x", [2])])
    assert (await stream.next()).text == "xxx"
    assert crash(table).sent == []
    with pytest.raises(CodedError, match="SIGSEGV") as error:
        await stream.next()
    assert error.value.details["tokens_sent"] == 3


async def test_who_kills_at_the_same_token_again_alone_is_given_up(table: RequestTable) -> None:
    first = Worker()
    stream = open_resumable(table, first)
    table.deliver([Delta(first.request_id(), "x", [1])])
    assert run_of(crash(table)).resume_tokens == [1]
    assert crash(table).sent == []
    await stream.next()
    with pytest.raises(CodedError):
        await stream.next()


async def test_a_death_while_it_waits_is_not_the_requests(table: RequestTable) -> None:
    first = Worker()
    stream = open_resumable(table, first)
    table.deliver([Delta(first.request_id(), "x", [1])])
    table.disconnect()
    table.park(CRASHED)
    for _ in range(5):
        # Of workers that do not get as far as taking requests.
        table.park(CRASHED)
    worker = Worker()
    table.connect(worker)
    table.resume()
    assert run_of(worker).resume_tokens == [1]
    assert stream.resumes == 1


async def test_a_resumed_answer_is_a_prefill_until_it_goes_on(table: RequestTable) -> None:
    first = Worker()
    open_resumable(table, first)
    number = first.request_id()
    table.start(Started(number, 0))
    table.deliver([Delta(number, "x", [1])])
    assert table.phase() is Phase.DECODE
    crash(table)
    assert table.phase() is Phase.PREFILL
    table.start(Started(number, 0))
    assert table.phase() is Phase.DECODE


async def test_an_answer_that_may_not_go_on_ends_as_before(table: RequestTable) -> None:
    first = Worker()
    stream = open_on(table, first)
    table.deliver([text_delta(first, "seen")])
    await stream.next()
    assert crash(table).sent == []
    with pytest.raises(CodedError):
        await stream.next()

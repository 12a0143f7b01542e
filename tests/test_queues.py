"""What clients see of a queue: turns, lanes, bounds, deadlines. One slot, simulated models."""

import json
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import httpx
import pytest

from tests.support.server import Server, polls, serve, write_script

MAX_QUEUE = 12
#: What one client gets of that, if nobody else has any; the holder of the slot has one.
SHARE = 9
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOKENS = [f"{n} " for n in range(200)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = tmp_path_factory.mktemp("models")
    for name in ("one", "fresh"):
        write_script(models, name, tokens=TOKENS, repeat=True, step_delay_s=0.005)
    write_script(
        models, "slow-load", tokens=TOKENS, repeat=True, step_delay_s=0.005, load_delay_s=2.5
    )
    arguments = ("--max-sequences", "1", "--max-queue", str(MAX_QUEUE))
    home = tmp_path_factory.mktemp("queues") / "home"
    with serve(home, "--models-dir", str(models), *arguments) as running:
        for name in ("one", "fresh", "slow-load"):
            assert running.load(name).status_code == 200
        yield running


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(MAX_QUEUE + 4) as pool:
        yield pool


def chat(server: Server, headers: dict[str, str] | None = None, **options: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": "one", "messages": messages, "max_tokens": 3, **options}
    return server.http.post(CHAT, json=body, headers=headers)


def stream(
    server: Server, headers: dict[str, str] | None = None, **options: Any
) -> Generator[dict[str, Any] | str, None, None]:
    """The events of a streamed answer, by default one that goes on and on."""
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": "one", "messages": messages, "stream": True, **options}
    with server.http.stream("POST", CHAT, json=body, headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                yield data if data == "[DONE]" else json.loads(data)


@contextmanager
def busy(server: Server, model: str = "one") -> Iterator[Iterator[dict[str, Any] | str]]:
    """The only slot is taken, by a client called ``holder``, until the block ends."""
    with closing(stream(server, {"X-Client-Id": "holder"}, model=model)) as holder:
        for _ in range(2):
            next(holder)
        yield holder


def await_counts(server: Server, in_flight: int, queued: int, model: str = "one") -> None:
    seen: tuple[int, int] | None = None
    for _ in polls(15):
        view = server.model(model)
        seen = view["in_flight"], view["queued"]
        if seen == (in_flight, queued):
            return
    raise AssertionError(f"in flight and queued: {seen}, not {(in_flight, queued)}")


class Line:
    """Requests that wait; ``order`` has their names as they were answered."""

    def __init__(self, server: Server, pool: ThreadPoolExecutor) -> None:
        self._server = server
        self._pool = pool
        self._answers: list[Future[None]] = []
        self.order: list[str] = []

    def join(self, name: str, headers: dict[str, str]) -> None:
        """Send a request and wait until it is in the queue."""
        self._answers.append(self._pool.submit(self._ask, name, headers))
        await_counts(self._server, 1, len(self._answers))

    def _ask(self, name: str, headers: dict[str, str]) -> None:
        assert chat(self._server, headers, max_tokens=20).status_code == 200
        self.order.append(name)

    def finish(self) -> list[str]:
        for answer in self._answers:
            answer.result(60)
        return self.order


def test_one_agents_many_do_not_hold_up_anothers_one(
    server: Server, pool: ThreadPoolExecutor
) -> None:
    line = Line(server, pool)
    with busy(server):
        for _ in range(9):
            line.join("many", {"X-Client-Id": "agent"})
        line.join("one", {"X-Client-Id": "other"})
    order = line.finish()
    assert len(order) == 10
    assert order.index("one") <= 2


@pytest.mark.parametrize(
    ("many", "one"),
    [
        ({"Authorization": "Bearer a"}, {"Authorization": "Bearer b"}),
        ({"X-Api-Key": "a"}, {}),
    ],
)
def test_keys_tell_clients_apart(
    server: Server, pool: ThreadPoolExecutor, many: dict[str, str], one: dict[str, str]
) -> None:
    line = Line(server, pool)
    with busy(server):
        for _ in range(5):
            line.join("many", many)
        line.join("one", one)
    assert line.finish().index("one") <= 2


def test_the_higher_lane_goes_first(server: Server, pool: ThreadPoolExecutor) -> None:
    line = Line(server, pool)
    with busy(server):
        for name in ("low", "normal", "high"):
            line.join(name, {"X-Priority": name})
    assert line.finish() == ["high", "normal", "low"]


def fill(server: Server, pool: ThreadPoolExecutor, count: int, name: str) -> Future[httpx.Response]:
    """Prompts that wait, in one call of a client with that name."""
    prompts = {"model": "one", "prompt": ["x"] * count, "max_tokens": 2}
    return pool.submit(server.http.post, TEXT, json=prompts, headers={"X-Client-Id": name})


def test_a_full_queue_says_when_to_come_again_also_to_the_high_lane(
    server: Server, pool: ThreadPoolExecutor
) -> None:
    with busy(server):
        filling = [fill(server, pool, SHARE, "many")]
        await_counts(server, 1, SHARE)
        filling.append(fill(server, pool, 2, "few"))
        await_counts(server, 1, MAX_QUEUE - 1)
        for headers in ({}, {"X-Priority": "high"}, {"X-Client-Id": "nobody yet"}):
            refused = chat(server, headers)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert 1 <= int(refused.headers["retry-after"]) <= 600
    for filled, count in zip((each.result(60) for each in filling), (SHARE, 2), strict=True):
        assert filled.status_code == 200
        assert [choice["text"] for choice in filled.json()["choices"]] == ["0 1 "] * count


def test_an_agent_that_always_has_more_leaves_places_for_others(
    server: Server, pool: ThreadPoolExecutor
) -> None:
    agent = {"X-Client-Id": "agent"}
    with busy(server):
        filling = fill(server, pool, SHARE, "agent")
        await_counts(server, 1, SHARE)
        for headers in (agent, {**agent, "X-Priority": "high"}):
            refused = chat(server, headers)
            assert refused.status_code == 429
            assert "for others" in refused.json()["error"]["message"]
            assert 1 <= int(refused.headers["retry-after"]) <= 600
        other = pool.submit(chat, server, {"X-Client-Id": "other"})
        await_counts(server, 1, SHARE + 1)
    assert other.result(60).status_code == filling.result(60).status_code == 200


def test_when_to_come_again_follows_the_models_pace(
    server: Server, pool: ThreadPoolExecutor
) -> None:
    said = []
    for _ in range(2):
        with busy(server, "fresh"):
            prompts = {"model": "fresh", "prompt": ["x"] * SHARE, "max_tokens": 1}
            filling = pool.submit(server.http.post, TEXT, json=prompts)
            await_counts(server, 1, SHARE, "fresh")
            said.append(int(chat(server, model="fresh").headers["retry-after"]))
        assert filling.result(60).status_code == 200
    # At first nothing is known; then ten answers took next to no time.
    assert said[0] > said[1]


def test_who_leaves_the_queue_frees_the_place_at_once(
    server: Server, pool: ThreadPoolExecutor
) -> None:
    with busy(server):
        filling = [fill(server, pool, SHARE, "many")]
        await_counts(server, 1, SHARE)
        filling.append(fill(server, pool, 1, "few"))
        await_counts(server, 1, MAX_QUEUE - 2)
        with closing(stream(server)) as waiting:
            next(waiting)
            await_counts(server, 1, MAX_QUEUE - 1)
            assert chat(server, {"X-Client-Id": "next"}).status_code == 429
        await_counts(server, 1, MAX_QUEUE - 2)
        accepted = pool.submit(chat, server, {"X-Client-Id": "next"})
        await_counts(server, 1, MAX_QUEUE - 1)
    assert accepted.result(60).status_code == 200
    assert [each.result(60).status_code for each in filling] == [200, 200]
    await_counts(server, 0, 0)


def test_a_deadline_passes_in_the_queue(server: Server) -> None:
    with busy(server) as holder:
        late = chat(server, {"X-Request-Timeout": "0.3"})
        error = late.json()["error"]
        assert (late.status_code, error["code"], error["tokens_sent"]) == (
            408,
            "request_timeout",
            0,
        )
        await_counts(server, 1, 0)
        assert next(holder)
    view = server.model("one")
    assert (view["generation"], view["readiness"]["crash_count"]) == (1, 0)


def test_a_deadline_passes_in_the_middle_of_a_stream(server: Server) -> None:
    *chunks, last = stream(server, {"X-Request-Timeout": "0.5"})
    assert isinstance(last, dict)
    assert last["error"]["code"] == "request_timeout"
    assert last["error"]["tokens_sent"] > 3
    assert not [chunk for chunk in chunks if chunk == "[DONE]" or "error" in chunk]
    await_counts(server, 0, 0)
    assert chat(server, {"X-Request-Timeout": "30"}).status_code == 200
    assert server.model("one")["readiness"]["crash_count"] == 0


def test_a_deadline_passes_while_the_model_restarts(
    server: Server, pool: ThreadPoolExecutor
) -> None:
    headers = {"X-Request-Timeout": "2"}
    waiting = pool.submit(chat, server, headers, model="slow-load", max_tokens=4000)
    await_counts(server, 1, 0, "slow-load")
    server.kill_worker("slow-load")
    await_counts(server, 0, 1, "slow-load")
    late = waiting.result(60)
    assert (late.status_code, late.json()["error"]["code"]) == (408, "request_timeout")
    assert server.model("slow-load")["readiness"]["state"] == "loading"
    view = server.await_state("slow-load", "routable", generation=2)
    assert (view["in_flight"], view["queued"]) == (0, 0)


def test_usage_and_metrics_tell_what_was_cached(server: Server) -> None:
    whole = chat(server).json()["usage"]
    text = server.http.post(TEXT, json={"model": "one", "prompt": "x", "max_tokens": 2}).json()
    options = {"max_tokens": 2, "stream_options": {"include_usage": True}}
    *_, last, done = stream(server, None, **options)
    assert done == "[DONE]"
    assert isinstance(last, dict)
    for usage in (whole, text["usage"], last["usage"]):
        assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]
    metrics = server.http.get("/metrics").text
    assert 'opta_lmx_cached_prompt_tokens_total{model="one"}' in metrics
    assert 'opta_lmx_time_to_start_seconds_count{model="one"}' in metrics

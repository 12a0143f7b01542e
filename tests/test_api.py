"""The inference API on real backends and real models, as clients use it."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest

from tests.support.server import Server, polls, text_of

REAL = ["tiny-gguf", "tiny-mlx"]
PARIS: list[Any] = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.fixture(scope="module")
def client(real_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def content(server: Server, model: str, **options: Any) -> str:
    answer = server.chat(model, **options)
    assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


# --- the real chat model, through the official client ---------------------------


def test_the_openai_client_streams_an_answer_of_a_real_model(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo",
        messages=PARIS,
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "Paris" in text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len([c for c in chunks if c.choices]) > 3
    (finish,) = [
        c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason
    ]
    assert finish == "stop"
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 5 < usage.completion_tokens < 40


@pytest.mark.parametrize("model", REAL)
def test_the_openai_client_streams_from_each_backend(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Hello"}],
        temperature=0,
        max_tokens=20,
        stream=True,
    )
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in chunks)
    assert chunks[-1].finish_reason == "length"


def test_the_whole_answer_equals_the_streamed_one(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=PARIS,
        temperature=0,
        max_tokens=40,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None


def test_the_openai_client_gets_typed_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "x"}], max_tokens=-1
        )
    assert (bad.value.code, bad.value.param) == ("invalid_value", "max_tokens")


def test_models_are_listed_and_found_by_id(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} >= {"demo", *REAL}
    assert client.models.retrieve("demo").id == "demo"


def test_plain_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt="The capital of France is", temperature=0, max_tokens=8
    )
    assert "Paris" in answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    streamed = client.completions.create(
        model="demo", prompt="The capital of France is", temperature=0, max_tokens=8, stream=True
    )
    assert "".join(c.choices[0].text for c in streamed if c.choices) == answer.choices[0].text


# --- what holds on every backend ----------------------------------------------------


@pytest.mark.parametrize("model", REAL)
def test_streamed_and_whole_answers_are_the_same(real_server: Server, model: str) -> None:
    payloads = list(real_server.stream(model, temperature=0, max_tokens=30))
    assert payloads[-1] == "[DONE]"
    assert text_of(payloads) == content(real_server, model, temperature=0, max_tokens=30)


@pytest.mark.parametrize("model", REAL)
def test_usage_counts_tokens_truly(real_server: Server, model: str) -> None:
    answer = real_server.chat(model, max_tokens=17).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 17
    assert usage["total_tokens"] == usage["prompt_tokens"] + 17
    longer = real_server.chat(model, "Hi " * 20, max_tokens=1).json()["usage"]
    assert longer["prompt_tokens"] > usage["prompt_tokens"]


@pytest.mark.parametrize("model", REAL)
def test_the_same_seed_gives_the_same_text(real_server: Server, model: str) -> None:
    def draw(seed: int) -> str:
        return content(real_server, model, seed=seed, temperature=1.5, max_tokens=24)

    assert draw(7) == draw(7)
    assert len({draw(seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("model", REAL)
def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(
    real_server: Server, model: str
) -> None:
    whole = content(real_server, model, temperature=0, max_tokens=40)
    stop = whole[20:25]
    answer = real_server.chat(model, temperature=0, max_tokens=40, stop=stop).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["message"]["content"] == whole[: whole.index(stop)]


@pytest.mark.parametrize("model", REAL)
def test_a_logit_bias_decides(real_server: Server, model: str) -> None:
    forced = real_server.chat(model, temperature=0, max_tokens=5, logit_bias={"70": 100}).json()
    text = forced["choices"][0]["message"]["content"]
    assert len(text) == 5 * len(text[: len(text) // 5])
    assert text == text[: len(text) // 5] * 5


@pytest.mark.parametrize("model", REAL)
def test_a_prompt_longer_than_the_context(real_server: Server, model: str) -> None:
    answer = real_server.chat(model, "word " * 5000)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == "messages"
    streamed = real_server.chat(model, "word " * 5000, stream=True)
    assert (streamed.status_code, streamed.json()["error"]["code"]) == (
        400,
        "context_length_exceeded",
    )


def test_a_prompt_of_megabytes_holds_no_stream_up(
    real_server: Server, pool: ThreadPoolExecutor
) -> None:
    def gaps() -> list[float]:
        stream = real_server.stream("demo", temperature=0, max_tokens=400, ignore_eos=True)
        arrivals = [time.monotonic() for _ in stream]
        return [after - before for before, after in pairwise(arrivals)]

    streams = [pool.submit(gaps) for _ in range(2)]
    for _ in polls(20):
        if real_server.model("demo")["in_flight"] == 2:
            break
    answer = real_server.chat("demo", "word and another " * 1_800_000)
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert not any(stream.done() for stream in streams), "nothing was there to be held up"
    # To tokenise all of it takes ten seconds.
    assert max(max(stream.result(120)) for stream in streams) < 4


@pytest.mark.parametrize("model", [*REAL, "demo"])
def test_what_was_cached_is_told_and_counted(real_server: Server, model: str) -> None:
    def counted() -> float:
        lines = real_server.http.get("/metrics").text.splitlines()
        name = f'opta_lmx_cached_prompt_tokens_total{{model="{model}"}} '
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    before, prompt = counted(), f"Once upon a time, {model} said: " + "one two three " * 20
    cached = []
    for _ in range(2):
        usage = real_server.chat(model, prompt, max_tokens=4).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    # All but the last token, which has to be computed for what follows it.
    assert usage["prompt_tokens"] * 0.9 < cached[1] < usage["prompt_tokens"]
    assert counted() - before == sum(cached)


@pytest.mark.parametrize("model", REAL)
def test_a_disconnect_frees_the_slot(real_server: Server, model: str) -> None:
    stream = real_server.stream(model, max_tokens=1900, ignore_eos=True)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    for _ in polls(10):
        if real_server.model(model)["in_flight"] == 0:
            break
    assert content(real_server, model, max_tokens=2)


@pytest.mark.parametrize("model", REAL)
def test_token_ids_are_a_prompt_too(real_server: Server, model: str) -> None:
    answer = real_server.http.post(
        "/v1/completions", json={"model": model, "prompt": [70, 71, 72], "max_tokens": 3}
    ).json()
    assert answer["usage"]["prompt_tokens"] == 3
    outside = real_server.http.post(
        "/v1/completions", json={"model": model, "prompt": [10_000_000], "max_tokens": 3}
    )
    assert outside.status_code == 400


# --- the contract around it ------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nowhere", None, 404, "not_found"),
        ("DELETE", "/v1/chat/completions", None, 405, "method_not_allowed"),
        ("POST", "/v1/chat/completions", b"{", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"[]", 400, "invalid_type"),
        ("POST", "/v1/chat/completions", b"x" * (33 << 20), 413, "request_too_large"),
        ("POST", "/admin/models/load", b"{}", 400, "missing_required_parameter"),
        ("GET", "/v1/models/nope", None, 404, "model_not_found"),
        ("GET", "/admin/models/nope", None, 404, "model_not_found"),
    ],
)
def test_every_refusal_has_the_envelope(
    real_server: Server, method: str, path: str, body: bytes | None, status: int, code: str
) -> None:
    answer = real_server.http.request(method, path, content=body)
    assert answer.status_code == status
    assert set(answer.json()) >= {"error"}
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["code"] == code
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content"}),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    real_server: Server, field: str, value: object
) -> None:
    options: dict[str, Any] = {field: value}
    answer = real_server.chat("tiny-gguf", **options)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


def test_request_ids_are_echoed_on_streams_too(real_server: Server) -> None:
    headers = {"X-Request-ID": "mine-1"}
    body = {
        "model": "tiny-gguf",
        "max_tokens": 2,
        "stream": True,
        "messages": [{"role": "user", "content": "x"}],
    }
    answer = real_server.http.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["content-type"].startswith("text/event-stream")


def test_health_readiness_and_metrics(real_server: Server) -> None:
    assert real_server.http.get("/healthz").json()["status"] == "ok"
    assert real_server.http.get("/readyz").status_code == 200
    metrics = real_server.http.get("/metrics").text
    assert 'opta_lmx_model_state{model="demo",state="routable"} 1.0' in metrics


def test_every_chunk_is_a_chat_completion_chunk(real_server: Server) -> None:
    for payload in list(real_server.stream("tiny-gguf", max_tokens=5))[:-1]:
        chunk = json.loads(payload)
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["model"] == "tiny-gguf"


def test_a_connection_that_breaks_off_mid_body_costs_nothing(real_server: Server) -> None:
    def half() -> Iterator[bytes]:
        yield b'{"model": "tiny-gguf", '
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError), httpx.Client(base_url=real_server.url) as client:
        client.post("/v1/chat/completions", content=half())
    assert content(real_server, "tiny-gguf", max_tokens=1)

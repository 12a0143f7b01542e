"""Embeddings and ranks on real models, through the whole stack and OpenAI's own client."""

from __future__ import annotations

import base64
import math
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import openai
import pytest

from protocol.messages import Load, Loaded
from tests.support.server import Server, polls, serve, write_script
from tests.support.tiny_bert import HIDDEN, write_tiny_bert
from tests.support.tiny_gguf import write_tiny_gguf
from worker.backends import create_backend, llama_embedding
from worker.backends.base import EmbedInput, LoadRefused

CONTEXT = 128
#: The library computes attention with 16-bit floats, not the same in every batch.
CLOSE = 5e-4
MODELS = ["mean", "cls", "unnamed", "last", "decoder-mean"]
RANKERS = ["rank", "decoder-rank"]
TEXTS = ["hello world", "the quick brown fox jumps over the lazy dog", "what is blue?", "sea"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_bert(folder / "mean.gguf", context_length=CONTEXT)
    write_tiny_bert(folder / "cls.gguf", pooling="cls", context_length=CONTEXT)
    write_tiny_bert(folder / "unnamed.gguf", pooling=None, context_length=CONTEXT)
    write_tiny_bert(folder / "rank.gguf", pooling="rank", context_length=CONTEXT)
    write_tiny_gguf(folder / "last.gguf", pooling="last", context_length=2048)
    write_tiny_gguf(folder / "decoder-mean.gguf", pooling="mean", context_length=2048)
    write_tiny_gguf(folder / "decoder-rank.gguf", pooling="rank", context_length=2048)
    write_tiny_gguf(folder / "chat.gguf")
    with serve(tmp_path_factory.mktemp("home"), "--models-dir", str(folder)) as server:
        for model in (*MODELS, *RANKERS, "chat"):
            answer = server.load(model)
            assert answer.status_code == 200, answer.text
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    url = f"{server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def embed(client: openai.OpenAI, model: str, texts: Any, **options: Any) -> numpy.ndarray:
    answer = client.embeddings.create(model=model, input=texts, **options)
    assert [each.index for each in answer.data] == list(range(len(answer.data)))
    return numpy.array([each.embedding for each in answer.data])


def refused(server: Server, path: str, status: int = 400, **body: object) -> dict[str, Any]:
    answer = server.http.post(path, json=body)
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


# --- vectors --------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_vectors_have_length_one_and_are_the_same_again(client: openai.OpenAI, model: str) -> None:
    first, again = embed(client, model, TEXTS), embed(client, model, TEXTS)
    assert numpy.allclose(numpy.linalg.norm(first, axis=1), 1.0, atol=1e-6)
    assert numpy.array_equal(first, again)
    assert numpy.abs(first[0] - first[1]).max() > 0.01


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_says_what_each_text_says_alone(client: openai.OpenAI, model: str) -> None:
    texts = [f"{word} the {'fox ' * n}" for n in range(8) for word in ("sea", "dog", "blue")]
    together = embed(client, model, texts)
    alone = numpy.concatenate([embed(client, model, text) for text in texts])
    assert numpy.allclose(together, alone, atol=CLOSE)
    backwards = embed(client, model, texts[::-1])
    assert numpy.allclose(backwards[::-1], together, atol=CLOSE)


def test_pooling_is_the_models_own(client: openai.OpenAI) -> None:
    """The weights are the same; a file that says nothing is pooled by the mean."""
    mean, cls, unnamed = (embed(client, model, TEXTS) for model in ("mean", "cls", "unnamed"))
    assert numpy.array_equal(mean, unnamed)
    assert numpy.abs(mean - cls).max() > 0.01


def test_the_last_token_is_pooled_over_parts_of_a_long_input(client: openai.OpenAI) -> None:
    """Longer than the library's batch; the beginning is seen, and so is the end."""
    text = "hello " * 700
    changed = ["Goodbye " + text, text + "what", text]
    vectors = embed(client, "last", [text, *changed])
    assert numpy.allclose(vectors[0], vectors[3], atol=CLOSE)
    assert numpy.abs(vectors[0] - vectors[1]).max() > 1e-5
    assert numpy.abs(vectors[0] - vectors[2]).max() > 1e-3


def test_the_pooling_of_a_decoder_is_what_the_library_makes_of_it(
    client: openai.OpenAI, server: Server
) -> None:
    import llama_cpp

    path = server.model("last")["path"]
    model = llama_cpp.Llama(
        path, embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_LAST, verbose=False
    )
    expected = numpy.array([model.embed(text, normalize=True) for text in TEXTS])
    model.close()
    assert numpy.allclose(embed(client, "last", TEXTS), expected, atol=CLOSE)


def test_what_the_wire_carries(client: openai.OpenAI, server: Server) -> None:
    """The client asks for base64 unless it is told otherwise; both say the same."""
    body = {"model": "mean", "input": TEXTS[0]}
    packed = server.http.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()
    numbers = struct.unpack(f"<{HIDDEN}f", base64.b64decode(packed["data"][0]["embedding"]))
    plain = server.http.post("/v1/embeddings", json=body).json()
    assert plain["data"][0]["embedding"] == list(numbers)
    assert embed(client, "mean", TEXTS[0])[0].tolist() == pytest.approx(list(numbers))
    as_floats = embed(client, "mean", TEXTS[0], encoding_format="float")
    assert as_floats[0].tolist() == list(numbers)
    assert plain["object"] == "list"
    assert plain["model"] == "mean"


def test_dimensions_are_the_first_ones_normalised(client: openai.OpenAI, server: Server) -> None:
    whole = embed(client, "mean", TEXTS)
    part = embed(client, "mean", TEXTS, dimensions=16)
    assert part.shape == (len(TEXTS), 16)
    expected = whole[:, :16] / numpy.linalg.norm(whole[:, :16], axis=1, keepdims=True)
    assert numpy.allclose(part, expected, atol=1e-6)
    error = refused(server, "/v1/embeddings", model="mean", input="sea", dimensions=HIDDEN + 1)
    assert (error["code"], error["param"]) == ("invalid_value", "dimensions")
    assert str(HIDDEN) in error["message"]


def test_usage_counts_the_models_tokens(client: openai.OpenAI) -> None:
    """``[CLS]`` and ``[SEP]`` are around every text, and around no list of token ids."""
    answer = client.embeddings.create(model="mean", input=["hello world", "sea"])
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (7, 7)
    answer = client.embeddings.create(model="mean", input=[[2, 14, 15, 3], [2, 3]])
    assert answer.usage.prompt_tokens == 6


def test_token_ids_are_taken_as_they_are(client: openai.OpenAI, server: Server) -> None:
    vectors = embed(client, "mean", [[2, 14, 15, 3]])
    assert numpy.allclose(vectors, embed(client, "mean", "hello world"), atol=1e-6)
    assert numpy.array_equal(vectors, embed(client, "mean", [2, 14, 15, 3]))
    error = refused(server, "/v1/embeddings", model="mean", input=[[2], [100_000]])
    assert (error["code"], error["param"]) == ("invalid_value", "input[1]")


def test_too_long_an_input_is_refused_with_both_numbers(server: Server) -> None:
    longest = [14] * CONTEXT
    assert server.http.post("/v1/embeddings", json={"model": "mean", "input": longest}).is_success
    error = refused(server, "/v1/embeddings", model="mean", input=[[14], [*longest, 14]])
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "input[1]"
    assert f"{CONTEXT} tokens" in error["message"]
    assert str(CONTEXT + 1) in error["message"]


def test_as_many_inputs_as_are_allowed(client: openai.OpenAI) -> None:
    vectors = embed(client, "mean", [TEXTS[n % len(TEXTS)] for n in range(2048)])
    assert numpy.allclose(vectors[:4], vectors[-4:], atol=CLOSE)
    with pytest.raises(openai.BadRequestError):
        embed(client, "mean", ["a"] * 2049)


def test_requests_share_batches(server: Server) -> None:
    """Many at once; each gets its own vectors."""
    expected = {
        text: server.http.post("/v1/embeddings", json={"model": "mean", "input": text}).json()
        for text in TEXTS
    }
    got: list[tuple[str, Any]] = []

    def ask(text: str) -> None:
        body = {"model": "mean", "input": [text] * 20}
        got.append((text, httpx.post(f"{server.url}/v1/embeddings", json=body).json()))

    threads = [threading.Thread(target=ask, args=(text,)) for text in TEXTS * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == len(threads)
    for text, answer in got:
        for each in answer["data"]:
            wanted = expected[text]["data"][0]["embedding"]
            assert numpy.allclose(each["embedding"], wanted, atol=CLOSE)


# --- ranks ----------------------------------------------------------------------


@pytest.mark.parametrize("model", RANKERS)
def test_ranks_are_in_order_and_independent(server: Server, model: str) -> None:
    documents: list[Any] = [
        "paris is the capital of france",
        {"text": "the lazy dog"},
        "blue sea",
        "",
    ]
    body = {"model": model, "query": "what is the capital of france", "documents": documents}
    answer = server.http.post("/v1/rerank", json=body).json()
    scores = {each["index"]: each["relevance_score"] for each in answer["results"]}
    assert sorted(scores) == [0, 1, 2, 3]
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert all(0 < score < 1 for score in scores.values())
    for index, document in enumerate(documents):
        alone = server.http.post("/v1/rerank", json={**body, "documents": [document]}).json()
        assert alone["results"][0]["relevance_score"] == pytest.approx(scores[index], abs=CLOSE)
    assert "document" not in answer["results"][0]
    short = server.http.post(
        "/v1/rerank", json={**body, "top_n": 2, "return_documents": True}
    ).json()
    assert [each["index"] for each in short["results"]] == list(scores)[:2]
    texts = [each if isinstance(each, str) else each["text"] for each in documents]
    assert all(each["document"] == {"text": texts[each["index"]]} for each in short["results"])


def test_a_long_document_is_judged_in_parts(server: Server) -> None:
    """Its beginning and its end count, and what is ranked beside it does not."""
    words = "hello " * 700
    documents = [words, f"Goodbye {words}", f"{words} what", "fox", words]
    body = {"model": "decoder-rank", "query": "what", "documents": documents}
    results = server.http.post("/v1/rerank", json=body).json()["results"]
    scores = [each["relevance_score"] for each in sorted(results, key=lambda e: e["index"])]
    assert scores[0] == pytest.approx(scores[4], abs=1e-6)
    assert len({round(score, 6) for score in scores}) == 4
    alone = server.http.post("/v1/rerank", json={**body, "documents": [words]}).json()
    assert alone["results"][0]["relevance_score"] == pytest.approx(scores[0], abs=CLOSE)


def test_the_query_counts_with_every_document(server: Server) -> None:
    """``[CLS] query [SEP] document [SEP]``."""
    body = {"model": "rank", "query": "blue sky", "documents": ["sea", "the fox"]}
    answer = server.http.post("/v1/rerank", json=body).json()
    assert answer["usage"] == {"prompt_tokens": 6 + 7, "total_tokens": 6 + 7}


@pytest.mark.parametrize("model", RANKERS)
def test_a_query_decides_the_ranks(server: Server, model: str) -> None:
    body = {"model": model, "documents": ["blue sea", "the lazy dog"]}
    one = server.http.post("/v1/rerank", json={**body, "query": "fox"}).json()["results"]
    other = server.http.post("/v1/rerank", json={**body, "query": "paris berlin"}).json()["results"]
    assert {e["index"]: e["relevance_score"] for e in one} != {
        e["index"]: e["relevance_score"] for e in other
    }


# --- loads ----------------------------------------------------------------------


def load(path: Path, **options: Any) -> Loaded:
    """Load a model, and embed as long an input and as many as it takes."""
    backend = create_backend("llama")
    try:
        model = backend.load(Load(str(path), **options), lambda fraction: None)
        embedder = backend.embedder
        assert embedder is not None
        for batch in ([model.context_length], [1] * embedder.batch_sequences):
            inputs = [EmbedInput([5] * tokens) for tokens in batch]
            assert len(embedder.embed(inputs, lambda: None)) == len(batch)
        return model
    finally:
        backend.close()


@pytest.mark.parametrize("context_length", [1, 16, 511, 513, 600, 1000])
@pytest.mark.parametrize("decoder", [False, True])
def test_any_context_length(tmp_path: Path, context_length: int, decoder: bool) -> None:
    path = tmp_path / "model.gguf"
    if decoder:
        write_tiny_gguf(path, pooling="last")
    else:
        write_tiny_bert(path, context_length=1024)
    assert load(path, context_length=context_length).context_length == context_length


def test_a_classifier_is_no_reranker(tmp_path: Path) -> None:
    path = write_tiny_bert(tmp_path / "classifier.gguf", pooling="rank", classes=3)
    with pytest.raises(LoadRefused, match="3 classes") as refused_:
        load(path)
    assert refused_.value.code == "model_unsupported_backend"


def test_inputs_are_bounded_by_what_they_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless somebody asks for more, as much as the model was trained for."""
    path = write_tiny_bert(tmp_path / "long.gguf", context_length=1024)
    whole = load(path)
    assert (whole.kind, whole.dimensions, whole.context_length) == ("embed", HIDDEN, 1024)
    monkeypatch.setattr(llama_embedding, "_OUTPUT_BYTES", 4 * whole.vocab_size * 600)
    assert load(path).context_length == 600
    assert load(path, context_length=1024).context_length == 1024
    with pytest.raises(LoadRefused, match="1024"):
        load(path, context_length=1025)


# --- the wrong kind of model ----------------------------------------------------


@pytest.mark.parametrize(
    ("path", "model", "body"),
    [
        ("/v1/embeddings", "chat", {"input": "x"}),
        ("/v1/embeddings", "rank", {"input": "x"}),
        ("/v1/rerank", "mean", {"query": "x", "documents": ["y"]}),
        ("/v1/rerank", "chat", {"query": "x", "documents": ["y"]}),
        ("/v1/completions", "mean", {"prompt": "x"}),
        ("/v1/chat/completions", "mean", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/chat/completions", "rank", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_another_kind_of_model_says_what_it_is(
    server: Server, path: str, model: str, body: dict[str, Any], stream: bool
) -> None:
    error = refused(server, path, model=model, stream=stream, **body)
    assert (error["code"], error["param"]) == ("invalid_value", "model")
    assert server.model(model)["readiness"]["crash_count"] == 0


def test_mlx_serves_generators_only(real_server: Server) -> None:
    error = refused(real_server, "/v1/embeddings", model="tiny-mlx", input="x")
    assert (error["code"], error["param"]) == ("invalid_value", "model")
    assert "llama.cpp" in error["message"]


# --- what is remembered, and what goes wrong ------------------------------------


def test_the_canary_is_on_record(server: Server) -> None:
    url = "/admin/models/compatibility"
    for model in ("mean", *RANKERS, "last"):
        (record,) = server.http.get(url, params={"model": model}).json()["records"]
        assert record["outcome"] == "pass"
        assert len(record["metadata"]["output_digest"]) == 64
        assert record["metadata"]["tokens_per_s"] > 0
        assert record["metadata"]["prompt_tokens"] > 0


@pytest.mark.parametrize("flaw", ["nan", "same"])
def test_a_broken_model_is_not_routable(tmp_path: Path, flaw: Any) -> None:
    path = write_tiny_bert(tmp_path / "broken.gguf", flaw=flaw)
    with serve(tmp_path / "home") as server:
        answer = server.load(str(path))
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "model_canary_failed"


@pytest.mark.parametrize("kind", ["segfault", "raise", "hang"])
def test_a_failure_while_embedding_is_not_seen(tmp_path: Path, kind: str) -> None:
    """Some of the vectors were there already; all are computed again on the next worker."""
    fault = {"at": "prompt", "kind": kind, "prompt_contains": "here", "times": 1}
    script = write_script(tmp_path, "embedder", kind="embed", faults=[fault])
    with serve(tmp_path / "home", OPTA_LMX_PREFILL_STALL_S="2") as server:
        assert server.load("embedder", path=str(script)).status_code == 200
        texts = [f"text {n}" for n in range(40)]
        body = {"model": "embedder", "input": [*texts, "it breaks here"]}
        answer = server.http.post("/v1/embeddings", json=body)
        assert answer.status_code == 200, answer.text
        vectors = [each["embedding"] for each in answer.json()["data"]]
        assert len(vectors) == 41
        assert all(math.hypot(*vector) == pytest.approx(1) for vector in vectors)
        assert server.http.post("/v1/embeddings", json=body).json()["data"] == answer.json()["data"]
        view = server.model("embedder")
        assert (view["generation"], view["readiness"]["crash_count"]) == (2, 1)


def test_a_request_that_always_crashes_ends_in_an_error(tmp_path: Path) -> None:
    fault = {"at": "prompt", "kind": "segfault", "prompt_contains": "here"}
    script = write_script(tmp_path, "embedder", kind="embed", faults=[fault])
    with serve(tmp_path / "home") as server:
        assert server.load("embedder", path=str(script)).status_code == 200
        body = {"model": "embedder", "input": "it breaks here"}
        answer = server.http.post("/v1/embeddings", json=body)
        assert answer.status_code == 422
        assert answer.json()["error"]["code"] == "request_poisoned"
        server.await_state("embedder", "routable", generation=3)
        assert server.http.post("/v1/embeddings", json={**body, "input": "fine"}).is_success


def test_the_queue_is_bounded_and_who_is_slow_is_not_killed(tmp_path: Path) -> None:
    """Three seconds of batches, each of them progress."""
    script = write_script(tmp_path, "embedder", kind="embed", prefill_delay_s=0.3)
    settings = {"OPTA_LMX_MAX_QUEUE": "1", "OPTA_LMX_PREFILL_STALL_S": "1.5"}
    with serve(tmp_path / "home", **settings) as server:
        assert server.load("embedder", path=str(script)).status_code == 200
        body = {"model": "embedder", "input": ["x"] * 40}
        answers: list[httpx.Response] = []
        url = f"{server.url}/v1/embeddings"
        slow = threading.Thread(
            target=lambda: answers.append(httpx.post(url, json=body, timeout=30))
        )
        slow.start()
        for _ in polls():
            if server.model("embedder")["in_flight"] == 1:
                break
        refusal = server.http.post("/v1/embeddings", json={**body, "input": "y"})
        assert refusal.status_code == 429
        assert "retry-after" in refusal.headers
        slow.join()
        assert answers[0].status_code == 200
        assert server.model("embedder")["generation"] == 1


def test_a_client_that_leaves_frees_the_model(tmp_path: Path) -> None:
    script = write_script(tmp_path, "embedder", kind="embed", prefill_delay_s=0.1)
    with serve(tmp_path / "home") as server:
        assert server.load("embedder", path=str(script)).status_code == 200
        body = {"model": "embedder", "input": ["some text"] * 2000}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=0.5)
        for _ in polls():
            if server.model("embedder")["in_flight"] == 0:
                break
        assert server.http.post("/v1/embeddings", json={**body, "input": "x"}).is_success

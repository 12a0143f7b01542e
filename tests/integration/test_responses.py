"""The Responses API through the official client, on scripted and on real models."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from openai.types.responses import ResponseStreamEvent

from tests.support.server import Server, serve, write_script

REAL = ["tiny-gguf", "tiny-mlx"]
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    "strict": False,
}
HERMES = "{% if tools %}<tool_call>{{ tool_call.name }}{% endif %}"
THINKING = "{{ messages }}<think>{{ content.split('</think>') }}"


@pytest.fixture(scope="module")
def client(real_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Models that say what their scripts say, through the whole stack."""
    folder = tmp_path_factory.mktemp("models")
    calls = [
        *("Let me ", "look.", "<tool", '_call>{"name": "get_', 'weather", "argu'),
        *('ments": {"city": "Par', 'is", "days": 2}}</tool_', "call>\n"),
        *('<tool_call>{"name": "get_weather", ', '"arguments": {"city": "Rome"}}</tool_call>'),
    ]
    write_script(folder, "caller", tokens=calls, chat_template=HERMES)
    thoughts = ["<th", "ink>", "Hm", ", so", "</thi", "nk>", "\n\n", "Yes"]
    write_script(folder, "thinker", tokens=thoughts, chat_template=THINKING)
    counting = [f"{n} " for n in range(200)]
    write_script(folder, "counter", tokens=counting, repeat=True, step_delay_s=0.01)
    with serve(tmp_path_factory.mktemp("home"), "--models-dir", str(folder)) as server:
        for model in ("caller", "thinker", "counter"):
            assert server.load(model).status_code == 200
        yield server


@pytest.fixture(scope="module")
def scripted(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


# --- real models ------------------------------------------------------------------


def test_a_real_model_answers_and_goes_on(client: openai.OpenAI) -> None:
    first = client.responses.create(
        model="demo",
        instructions="You are a helpful assistant.",
        input="What is the capital of France?",
        temperature=0,
        max_output_tokens=40,
    )
    assert first.status == "completed"
    assert "Paris" in first.output_text
    second = client.responses.create(
        model="demo",
        instructions="You are a helpful assistant.",
        input="Say that again.",
        previous_response_id=first.id,
        temperature=0,
        max_output_tokens=5,
    )
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    # The conversation so far is in the prompt cache.
    assert second.usage.input_tokens_details.cached_tokens > 0
    assert client.responses.retrieve(first.id).output_text == first.output_text


def test_a_real_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "demo",
        "instructions": "You are a helpful assistant.",
        "input": "What is the capital of France?",
        "temperature": 0,
        "max_output_tokens": 40,
    }
    whole = client.responses.create(**options)
    with client.responses.stream(**options) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(deltas) == final.output_text == whole.output_text


@pytest.mark.parametrize("model", REAL)
def test_each_backend_stops_at_the_limit(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {"model": model, "input": "Hello", "temperature": 0}
    extra = {"ignore_eos": True}
    whole = client.responses.create(**options, max_output_tokens=12, extra_body=extra)
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None
    assert whole.usage.output_tokens == 12
    stream = client.responses.create(**options, max_output_tokens=12, extra_body=extra, stream=True)
    last = list(stream)[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text


@pytest.mark.parametrize("model", REAL)
def test_log_probabilities_of_a_real_model(client: openai.OpenAI, model: str) -> None:
    response = client.responses.create(
        model=model,
        input="Hello",
        temperature=0,
        max_output_tokens=6,
        include=["message.output_text.logprobs"],
        top_logprobs=3,
        extra_body={"ignore_eos": True},
    )
    [message] = response.output
    assert message.type == "message"
    [part] = message.content
    assert part.type == "output_text"
    assert part.logprobs
    assert all(len(each.top_logprobs) == 3 for each in part.logprobs)
    written = b"".join(bytes(each.bytes) for each in part.logprobs)
    assert part.text in written.decode(errors="replace")


# --- scripted models --------------------------------------------------------------


def test_reasoning_is_an_item_of_its_own(scripted: openai.OpenAI) -> None:
    response = scripted.responses.create(model="thinker", input="Hi")
    reasoning, message = response.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert reasoning.content[0].text == "Hm, so"
    assert message.type == "message"
    assert response.output_text == "Yes"
    assert response.usage is not None
    assert 2 <= response.usage.output_tokens_details.reasoning_tokens <= 5


def test_streamed_reasoning(scripted: openai.OpenAI) -> None:
    with scripted.responses.stream(model="thinker", input="Hi") as stream:
        events = list(stream)
        final = stream.get_final_response()
    thought = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
    assert "".join(thought) == "Hm, so"
    assert final.output_text == "Yes"
    assert [item.type for item in final.output] == ["reasoning", "message"]


def test_reasoning_as_the_summary_that_was_asked_for(scripted: openai.OpenAI) -> None:
    options: Any = {"model": "thinker", "input": "Hi", "reasoning": {"summary": "auto"}}
    response = scripted.responses.create(**options)
    reasoning, _ = response.output
    assert reasoning.type == "reasoning"
    assert [part.text for part in reasoning.summary] == ["Hm, so"]
    assert not reasoning.content
    assert response.reasoning is not None
    assert response.reasoning.summary == "auto"
    with scripted.responses.stream(**options) as stream:
        events = list(stream)
    deltas = [e.delta for e in events if e.type == "response.reasoning_summary_text.delta"]
    assert "".join(deltas) == "Hm, so"
    names = [event.type for event in events]
    between = names[names.index("response.output_item.added") :]
    thoughts = [name for name in between if "reasoning" in name]
    assert list(dict.fromkeys(thoughts)) == [
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
    ]
    again = scripted.responses.create(
        model="thinker",
        input=[{"role": "user", "content": "Hi"}, reasoning.to_dict()],
    )
    assert again.output_text == "Yes"


def test_a_round_trip_with_tools(scripted: openai.OpenAI) -> None:
    first = scripted.responses.create(model="caller", input="Weather?", tools=[WEATHER])
    message, *calls = first.output
    assert message.type == "message"
    assert first.output_text == "Let me look."
    results: list[Any] = []
    cities = []
    for call in calls:
        assert call.type == "function_call"
        cities.append(json.loads(call.arguments)["city"])
        results.append(
            {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
        )
    assert cities == ["Paris", "Rome"]
    # With what is stored here ...
    kept = scripted.responses.create(
        model="thinker", input=results, previous_response_id=first.id, tools=[WEATHER]
    )
    # ... or with all of it sent again, as the client got it.
    history: list[Any] = [
        {"role": "user", "content": "Weather?"},
        *[item.model_dump() for item in first.output],
        *results,
    ]
    sent = scripted.responses.create(model="thinker", input=history, tools=[WEATHER], store=False)
    for response in (kept, sent):
        assert response.output_text == "Yes"
    assert kept.usage is not None
    assert sent.usage is not None
    assert kept.usage.input_tokens == sent.usage.input_tokens
    items = list(scripted.responses.input_items.list(kept.id, order="asc", limit=2))
    assert [item.type for item in items] == [
        *("message", "message", "function_call", "function_call"),
        *("function_call_output", "function_call_output"),
    ]


def test_streamed_calls(scripted: openai.OpenAI) -> None:
    with scripted.responses.stream(model="caller", input="Hi", tools=[WEATHER]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    done = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert [json.loads(event.arguments)["city"] for event in done] == ["Paris", "Rome"]
    assert "".join(deltas) == "".join(event.arguments for event in done)
    calls = [item for item in final.output if item.type == "function_call"]
    assert len({call.call_id for call in calls}) == 2
    assert final.output_text == "Let me look."


def test_a_response_is_kept_until_it_is_deleted(scripted: openai.OpenAI) -> None:
    response = scripted.responses.create(model="thinker", input="Hi", metadata={"a": "b"})
    again = scripted.responses.retrieve(response.id)
    assert again.model_dump() == response.model_dump()
    scripted.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError) as missing:
        scripted.responses.retrieve(response.id)
    assert missing.value.code == "response_not_found"
    with pytest.raises(openai.BadRequestError) as lost:
        scripted.responses.create(model="thinker", input="x", previous_response_id=response.id)
    assert lost.value.code == "previous_response_not_found"


def test_a_response_is_its_keys_own(scripted: openai.OpenAI) -> None:
    response = scripted.responses.create(model="thinker", input="Hi")
    with pytest.raises(openai.NotFoundError):
        scripted.with_options(api_key="another").responses.retrieve(response.id)


def test_what_is_refused_is_a_bad_request(scripted: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        scripted.responses.create(model="thinker", input="Hi", truncation="auto")
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "truncation")
    with pytest.raises(openai.NotFoundError) as missing:
        scripted.responses.create(model="nope", input="Hi")
    assert missing.value.code == "model_not_found"


def await_text(stream: openai.Stream[ResponseStreamEvent]) -> None:
    next(event for event in stream if event.type == "response.output_text.delta")


def test_a_crash_in_a_stream_is_an_error_of_the_client(
    scripted: openai.OpenAI, server: Server
) -> None:
    stream = scripted.responses.create(
        model="counter", input="Hi", stream=True, extra_headers={"X-Resume": "never"}
    )
    await_text(stream)
    server.kill_worker("counter")
    with pytest.raises(openai.APIError) as crashed:
        list(stream)
    assert crashed.value.code == "model_crashed"
    assert isinstance(crashed.value.body, dict)
    assert crashed.value.body["incident_id"]
    server.await_state("counter", "routable", generation=2)


def test_a_running_response_is_cancelled_by_its_request_id(
    scripted: openai.OpenAI, server: Server
) -> None:
    server.await_state("counter", "routable")
    stream = scripted.responses.create(model="counter", input="Hi", stream=True)
    request_id = stream.response.headers["x-request-id"]
    await_text(stream)
    # The client's key decides whose it is.
    path = f"/v1/requests/{request_id}/cancel"
    assert server.http.post(path).status_code == 404
    scripted.post(f"/requests/{request_id}/cancel", cast_to=object)
    with pytest.raises(openai.APIError) as cancelled:
        list(stream)
    assert cancelled.value.code == "request_cancelled"


def test_a_whole_answer_is_cancelled(scripted: openai.OpenAI, server: Server) -> None:
    server.await_state("counter", "routable")
    headers = {"X-Request-ID": "cancel-me"}

    def cancel() -> None:
        for _ in range(200):
            try:
                scripted.post("/requests/cancel-me/cancel", cast_to=object)
                return
            except openai.NotFoundError:
                threading.Event().wait(0.02)

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(openai.APIStatusError) as cancelled:
        scripted.responses.create(model="counter", input="Hi", extra_headers=headers)
    canceller.join()
    assert (cancelled.value.status_code, cancelled.value.code) == (499, "request_cancelled")


# --- structured output and forced calls, enforced on real models --------------------


@pytest.mark.parametrize("model", ["demo", *REAL])
def test_the_parse_helper_gets_its_type_of_a_real_model(client: openai.OpenAI, model: str) -> None:
    class Person(pydantic.BaseModel):
        first: Literal["Ann", "Bob"]
        old: bool

    response = client.responses.parse(
        model=model, input="Hello", text_format=Person, temperature=1.5, max_output_tokens=100
    )
    assert isinstance(response.output_parsed, Person)


@pytest.mark.parametrize("model", REAL)
def test_a_call_can_be_forced(client: openai.OpenAI, model: str) -> None:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    tool: Any = {**WEATHER, "parameters": nothing}
    response = client.responses.create(
        model=model,
        input="Hello",
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=1.5,
        max_output_tokens=200,
    )
    [call] = response.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {})

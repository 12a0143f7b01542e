"""Chats beyond plain text on real backends: log probabilities, several answers, tools."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from tests.support.server import Server, serve, write_script
from tests.support.tiny_vocab import tiny_vocab

REAL = ["tiny-gguf", "tiny-mlx"]
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
HERMES = "{% if tools %}<tool_call>{{ tool_call.name }}{% endif %}"
THINKING = "{{ messages }}<think>{{ content.split('</think>') }}"


@pytest.fixture(scope="module")
def client(real_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A server whose models say what their scripts say, through the whole stack."""
    folder = tmp_path_factory.mktemp("models")
    calls = [
        *("Let me ", "look.", "<tool", '_call>{"name": "get_', 'weather", "argu'),
        *('ments": {"city": "Par', 'is", "days": 2}}</tool_', "call>\n"),
        *('<tool_call>{"name": "get_weather", ', '"arguments": {"city": "Rome"}}</tool_call>'),
    ]
    write_script(folder, "caller", tokens=calls, chat_template=HERMES)
    other = ["<tool_call>", '{"name": "other"}']
    write_script(folder, "broken", tokens=other, chat_template=HERMES)
    thoughts = ["<th", "ink>", "Hm", ", so", "</thi", "nk>", "\n\n", "Yes"]
    write_script(folder, "thinker", tokens=thoughts, chat_template=THINKING)
    with serve(tmp_path_factory.mktemp("home"), "--models-dir", str(folder)) as server:
        for model in ("caller", "broken", "thinker"):
            assert server.load(model).status_code == 200
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client


# --- log probabilities ------------------------------------------------------------


@pytest.mark.parametrize("model", REAL)
def test_log_probabilities_are_the_models_own(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=HELLO,
        temperature=0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=5,
        extra_body={"ignore_eos": True},
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert len(content) == 8
    for each in content:
        assert len(each.top_logprobs) == 5
        values = [top.logprob for top in each.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1.0001
        # Greedy: what was sampled is the likeliest.
        assert each.logprob == pytest.approx(values[0])
        assert each.token == each.top_logprobs[0].token
    written = b"".join(bytes(each.bytes or []) for each in content)
    assert written.decode(errors="replace") == choice.message.content


@pytest.mark.parametrize("model", REAL)
def test_streamed_log_probabilities_are_the_same(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {
        "model": model,
        "messages": HELLO,
        "temperature": 0,
        "max_tokens": 6,
        "logprobs": True,
    }
    whole = client.chat.completions.create(**options).choices[0].logprobs
    assert whole is not None
    streamed = [
        each
        for chunk in client.chat.completions.create(**options, stream=True)
        for choice in chunk.choices
        if choice.logprobs is not None
        for each in choice.logprobs.content or []
    ]
    assert [each.token for each in streamed] == [each.token for each in whole.content or []]
    assert [each.logprob for each in streamed] == pytest.approx(
        [each.logprob for each in whole.content or []], abs=1e-3
    )


@pytest.mark.parametrize("model", REAL)
def test_text_completions_have_them_too(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt="Hello", temperature=0, max_tokens=4, logprobs=2, echo=False
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert len(found.token_logprobs) == 4
    assert found.text_offset == [
        len("".join((found.tokens or [])[:i])) for i in range(len(found.tokens or []))
    ]


# --- several answers --------------------------------------------------------------


@pytest.mark.parametrize("model", REAL)
def test_several_answers_are_those_of_their_seeds(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "Tell me something. " * 12}],
        "max_tokens": 8,
        "temperature": 1.0,
    }
    several = client.chat.completions.create(**options, n=3, seed=11)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage is not None
    alone = [client.chat.completions.create(**options, seed=11 + i) for i in range(3)]
    assert [choice.message.content for choice in several.choices] == [
        each.choices[0].message.content for each in alone
    ]
    first = alone[0].usage
    assert first is not None
    assert several.usage.prompt_tokens == first.prompt_tokens


@pytest.mark.parametrize("model", REAL)
def test_an_echo_is_the_prompt_and_then_the_answer(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 4}
    plain = client.completions.create(**options, prompt="Hello world").choices[0].text
    echo = client.completions.create(**options, prompt="Hello world", echo=True).choices[0].text
    assert echo == "Hello world" + plain


@pytest.mark.parametrize("model", REAL)
def test_the_prompt_cache_can_be_left_out(client: openai.OpenAI, model: str) -> None:
    def cached(words: str = model, **extra: Any) -> int:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"{words} " * 80}],
            max_tokens=2,
            extra_body=extra,
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    cached()
    assert cached() > 0
    assert cached(cache_prompt=False) == 0
    # And nothing comes into it: others find no more than the beginning that all chats have.
    cached("another", cache_prompt=False)
    assert cached("another") < 80


# --- tools and reasoning ----------------------------------------------------------


def test_calls_of_a_scripted_model_arrive_whole(scripted: openai.OpenAI) -> None:
    answer = scripted.chat.completions.create(model="caller", messages=HELLO, tools=[WEATHER])
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    calls: list[Any] = list(choice.message.tool_calls or [])
    assert [call.function.name for call in calls] == ["get_weather"] * 2
    assert [json.loads(call.function.arguments) for call in calls] == [
        {"city": "Paris", "days": 2},
        {"city": "Rome"},
    ]
    assert len({call.id for call in calls}) == 2


def test_streamed_calls_add_up(scripted: openai.OpenAI) -> None:
    with scripted.chat.completions.stream(
        model="caller", messages=HELLO, tools=[WEATHER]
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    calls: list[Any] = list(final.message.tool_calls or [])
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Paris", "Rome"]
    assert final.message.content == "Let me look."
    assert final.finish_reason == "tool_calls"


def test_what_is_no_call_to_an_offered_tool_is_text(scripted: openai.OpenAI) -> None:
    answer = scripted.chat.completions.create(model="broken", messages=HELLO, tools=[WEATHER])
    assert answer.choices[0].message.content == '<tool_call>{"name": "other"}'
    assert answer.choices[0].finish_reason == "stop"


def test_without_tools_tags_are_text(scripted: openai.OpenAI) -> None:
    answer = scripted.chat.completions.create(model="caller", messages=HELLO)
    assert "<tool_call>" in (answer.choices[0].message.content or "")


def test_reasoning_is_apart_and_counted(scripted: openai.OpenAI) -> None:
    answer = scripted.chat.completions.create(model="thinker", messages=HELLO)
    message: Any = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm, so", "Yes")
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.reasoning_tokens is not None
    assert 2 <= details.reasoning_tokens <= 5
    stream = scripted.chat.completions.create(model="thinker", messages=HELLO, stream=True)
    deltas: list[Any] = [chunk.choices[0].delta for chunk in stream]
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == "Hm, so"
    assert "".join(delta.content or "" for delta in deltas) == "Yes"


@pytest.mark.parametrize("model", REAL)
def test_a_conversation_with_tools_is_rendered(client: openai.OpenAI, model: str) -> None:
    def prompt_tokens(messages: list[Any], **more: Any) -> int:
        answer = client.chat.completions.create(
            model=model, messages=messages, max_tokens=1, **more
        )
        assert answer.usage is not None
        return int(answer.usage.prompt_tokens)

    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    history: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It rains."},
    ]
    plain, with_tools = prompt_tokens(HELLO), prompt_tokens(HELLO, tools=[WEATHER])
    assert with_tools > plain + 20
    assert prompt_tokens(HELLO, tools=[WEATHER], tool_choice="none") == plain
    assert prompt_tokens(history, tools=[WEATHER]) > with_tools + 10


def test_a_template_without_tools_gets_them_spelt_out(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=HELLO, tools=[WEATHER], max_tokens=1
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 100


# --- structured output and forced calls -------------------------------------------

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
WILD: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_tokens": 300}


def schema_format(schema: dict[str, Any]) -> Any:
    json_schema = {"name": "person", "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": json_schema}


@pytest.mark.parametrize("model", REAL)
def test_answers_match_their_schema(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=HELLO, response_format=schema_format(PERSON), n=3, **WILD
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), PERSON)


@pytest.mark.parametrize("model", ["demo", *REAL])
def test_the_clients_own_parser_gets_its_type(client: openai.OpenAI, model: str) -> None:
    class Person(pydantic.BaseModel):
        first: Literal["Ann", "Bob"]
        old: bool

    answer = client.chat.completions.parse(
        model=model, messages=HELLO, response_format=Person, **WILD
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


@pytest.mark.parametrize("model", REAL)
def test_any_json_object_will_do(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model,
        messages=HELLO,
        response_format={"type": "json_object"},
        stream=True,
        temperature=1.5,
        seed=5,
        max_tokens=60,
    )
    chunks = [chunk.choices[0] for chunk in stream]
    text = "".join(choice.delta.content or "" for choice in chunks)
    assert text.startswith("{")
    if chunks[-1].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_patterns_and_grammars_are_ours(client: openai.OpenAI) -> None:
    formats: list[tuple[Any, str]] = [
        ({"type": "regex", "pattern": "[a-c]{3}"}, "[a-c]{3}"),
        ({"type": "grammar", "grammar": 'start: "yes" | "no"'}, "yes|no"),
    ]
    for response_format, pattern in formats:
        answer = client.chat.completions.create(
            model="tiny-gguf", messages=HELLO, response_format=response_format, **WILD
        )
        assert re.fullmatch(pattern, answer.choices[0].message.content or "")


def test_what_cannot_be_enforced_is_refused_by_name(client: openai.OpenAI) -> None:
    schema = {"type": "object", "propertyNames": {"pattern": "x"}, "dependentSchemas": {"a": {}}}
    with pytest.raises(openai.BadRequestError, match="dependentSchemas") as refused:
        client.chat.completions.create(
            model="tiny-gguf", messages=HELLO, response_format=schema_format(schema)
        )
    assert refused.value.param == "response_format"


@pytest.mark.parametrize("model", ["demo", *REAL])
@pytest.mark.parametrize("choice", ["required", "named"])
def test_calls_can_be_forced(client: openai.OpenAI, model: str, choice: str) -> None:
    other: Any = {"type": "function", "function": {"name": "other", "parameters": PERSON}}
    wanted: Any = choice
    if choice == "named":
        wanted = {"type": "function", "function": {"name": "other"}}
    answer = client.chat.completions.create(
        model=model,
        messages=HELLO,
        tools=[WEATHER, other],
        tool_choice=wanted,
        parallel_tool_calls=False,
        temperature=1.2,
        seed=4,
        max_tokens=400,
    )
    [picked] = answer.choices
    if picked.finish_reason == "length":
        pytest.skip("the model did not come to an end")
    assert picked.finish_reason == "tool_calls"
    assert not picked.message.content
    [call] = picked.message.tool_calls or []
    assert call.type == "function"
    schemas = {"get_weather": WEATHER["function"]["parameters"], "other": PERSON}
    jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
    if choice == "named":
        assert call.function.name == "other"


@pytest.mark.parametrize("format", ["pythonic", "gemma4", "dsml", "glm"])
def test_calls_can_be_forced_in_other_formats(
    client: openai.OpenAI, real_server: Server, tiny_gguf: Path, format: str
) -> None:
    model = f"forced-{format}"
    loaded = real_server.load(model, path=str(tiny_gguf), tool_format=format)
    assert loaded.status_code == 200, loaded.text
    schema = {
        "type": "object",
        "properties": {
            "size": {"enum": ["small", "large"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "sure": {"type": "boolean"},
        },
        "required": ["size", "count"],
        "additionalProperties": False,
    }
    tool: Any = {"type": "function", "function": {"name": "order", "parameters": schema}}
    answer = client.chat.completions.create(
        model=model,
        messages=HELLO,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=1.5,
        max_tokens=300,
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "order"
    jsonschema.validate(json.loads(call.function.arguments), schema)
    real_server.http.post("/admin/models/unload", json={"model_id": model})


@pytest.mark.parametrize("model", REAL)
def test_strict_tools_get_what_fits_their_schema(client: openai.OpenAI, model: str) -> None:
    function = {"name": "enter", "parameters": PERSON, "strict": True}
    options: dict[str, Any] = {
        "model": model,
        "messages": HELLO,
        "temperature": 1.5,
        "seed": 3,
        "max_tokens": 400,
        # A random model would hardly ever begin a call.
        "logit_bias": {str(tiny_vocab().id_of("<tool_call>")): 20},
    }
    strict: Any = {"type": "function", "function": function}
    answer = client.chat.completions.create(**options, tools=[strict]).choices[0]
    calls = answer.message.tool_calls or []
    if answer.finish_reason == "length":
        del calls[-1]  # may have been cut off
    assert calls
    for call in calls:
        assert call.type == "function"
        assert call.function.name == "enter"
        jsonschema.validate(json.loads(call.function.arguments), PERSON)
    free: Any = {"type": "function", "function": {**function, "strict": False}}
    answer = client.chat.completions.create(**options, tools=[free]).choices[0]
    assert not answer.message.tool_calls
    schema = {"type": "object", "uniqueItems": True, "not": {}}
    refused: Any = {"type": "function", "function": {**function, "parameters": schema}}
    with pytest.raises(openai.BadRequestError, match="not supported"):
        client.chat.completions.create(**options, tools=[refused])


@pytest.mark.parametrize("model", REAL)
def test_an_output_format_beside_tools_is_that_of_an_answer(
    client: openai.OpenAI, model: str
) -> None:
    for seed in range(4):
        answer = client.chat.completions.create(
            model=model,
            messages=HELLO,
            tools=[WEATHER],
            response_format=schema_format(PERSON),
            temperature=1.5,
            seed=seed,
            max_tokens=400,
        )
        message = answer.choices[0].message
        if answer.choices[0].finish_reason == "stop":
            jsonschema.validate(json.loads(message.content or ""), PERSON)
        elif answer.choices[0].finish_reason == "tool_calls":
            assert message.tool_calls

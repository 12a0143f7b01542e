"""Calls that name a model by an alias, a preset or ``auto``."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from protocol.errors import CodedError, ErrorCode
from protocol.messages import ModelKind, Tokenize
from supervisor.catalog import AvailableModel, BackendOption
from supervisor.presets import Preset, PresetLoad, PresetParameters
from supervisor.settings import ModelSetting
from tests.support.asgi import Exchange, MakeApp, events
from tests.support.fake_fleet import FakeFleet, view

HI = [{"role": "user", "content": "Hi"}]
ALIASES = {"best": ("big", "m"), "fast": "m", "only": "big", "vectors": ("gone", "m")}
PARAMETERS = PresetParameters(
    temperature=0.25,
    stop=["END"],
    max_tokens=9,
    chat_template_kwargs={"enable_thinking": False, "style": "terse"},
)
PRESETS = {
    "coder": Preset(
        model=("big", "m"),
        system_prompt="You write code.",
        parameters=PARAMETERS,
        load=PresetLoad(context_length=512),
    )
}


@pytest.fixture
def app(make_app: MakeApp) -> ASGIApp:
    return make_app(aliases=ALIASES, presets=PRESETS)


@pytest.fixture
def fleet() -> FakeFleet:
    fleet = FakeFleet()
    fleet.add(view("m"))
    fleet.add(view("big"))
    return fleet


def refuse(fleet: FakeFleet, model: str, code: ErrorCode, **more: Any) -> None:
    fleet.refusals[model] = CodedError(code, f"{model} says no", **more)


async def ask(client: httpx.AsyncClient, model: str, **more: object) -> httpx.Response:
    body = {"model": model, "messages": HI, **more}
    return await client.post("/v1/chat/completions", json=body)


async def test_a_models_own_id_is_served_as_ever(client: httpx.AsyncClient) -> None:
    answer = await ask(client, "big")
    assert answer.json()["model"] == answer.headers["x-served-model"] == "big"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HI}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/messages", {"messages": HI, "max_tokens": 5}),
        ("/v1/embeddings", {"input": "Hi"}),
        ("/v1/rerank", {"query": "Hi", "documents": ["Ho"]}),
    ],
)
@pytest.mark.parametrize(
    ("name", "refused", "served"),
    [("fast", "", "m"), ("best", "", "big"), ("best", "big", "m"), ("coder", "big", "m")],
)
async def test_the_answer_says_who_served_it(
    client: httpx.AsyncClient,
    fleet: FakeFleet,
    path: str,
    body: dict[str, object],
    name: str,
    refused: str,
    served: str,
) -> None:
    fleet.vectors = [[0.5]]
    if refused:
        refuse(fleet, refused, ErrorCode.MODEL_UNSTABLE)
    answer = await client.post(path, json={"model": name, **body})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == answer.headers["x-served-model"] == served
    assert [request.model for request in fleet.requests] == [served]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HI}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/messages", {"messages": HI, "max_tokens": 5}),
    ],
)
async def test_so_does_a_stream(
    client: httpx.AsyncClient, fleet: FakeFleet, path: str, body: dict[str, object]
) -> None:
    refuse(fleet, "big", ErrorCode.MODEL_NOT_FOUND)
    answer = await client.post(path, json={"model": "best", "stream": True, **body})
    assert answer.headers["x-served-model"] == "m"
    assert b'"model":"m"' in answer.content
    assert b'"model":"b' not in answer.content


async def test_the_token_routes_know_names_too(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    refuse(fleet, "big", ErrorCode.MODEL_UNSTABLE)
    fleet.add(view("m", context_length=77))
    asked = {"model": "best", "content": "abc"}
    answer = await client.post("/tokenize", json=asked)
    assert answer.json() == {"count": 3, "max_model_len": 77, "tokens": [97, 98, 99]}
    assert answer.headers["x-served-model"] == "m"
    answer = await client.post("/detokenize", json={"model": "best", "tokens": [97]})
    assert (answer.json()["content"], answer.headers["x-served-model"]) == ("a", "m")
    counted = {"model": "coder", "messages": HI}
    answer = await client.post("/v1/messages/count_tokens", json=counted)
    # The worker of the tests puts a token before it.
    assert answer.json() == {"input_tokens": 1 + len("You write code.Hi")}
    assert answer.headers["x-served-model"] == "m"
    answer = await client.post("/tokenize", json={"model": "coder", "messages": HI})
    assert answer.json()["count"] == 1 + len("You write code.Hi")


async def test_an_id_outside_of_ascii_has_a_header(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    fleet.add(view("模型 50%"))
    answer = await ask(client, "模型 50%")
    assert answer.headers["x-served-model"] == "%E6%A8%A1%E5%9E%8B 50%25"


async def test_nobody_but_the_model_can_answer_for_its_own_id(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    refuse(fleet, "big", ErrorCode.MODEL_UNSTABLE, details={"incident_id": "i"})
    for name in ("big", "only"):
        answer = await ask(client, name)
        assert (answer.status_code, answer.json()["error"]["message"]) == (409, "big says no")
        assert answer.json()["error"]["incident_id"] == "i"
        assert "x-served-model" not in answer.headers


async def test_all_may_say_the_same(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.refusal = CodedError(ErrorCode.MODEL_UNSTABLE, "no")
    answer = await ask(client, "best")
    expected = "no model of 'best' can serve this: big: no; m: no"
    assert (answer.status_code, answer.json()["error"]["message"]) == (409, expected)


async def test_when_all_fail_each_has_its_say(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    refuse(fleet, "big", ErrorCode.MODEL_NOT_READY, retry_after_s=3)
    refuse(fleet, "m", ErrorCode.MODEL_UNSTABLE)
    answer = await ask(client, "best")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (409, "model_not_ready")
    assert answer.headers["retry-after"] == "3"
    expected = "no model of 'best' can serve this: big: big says no; m: m says no"
    assert error["message"] == expected


async def test_a_model_that_is_set_up_wrongly_is_not_the_requests_fault(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    refuse(fleet, "big", ErrorCode.INVALID_VALUE, param="draft_model")
    assert (await ask(client, "best")).json()["model"] == "m"


@pytest.mark.parametrize(
    "code",
    [
        ErrorCode.RATE_LIMIT_EXCEEDED,
        ErrorCode.CONTEXT_LENGTH_EXCEEDED,
        ErrorCode.INVALID_VALUE,
        ErrorCode.SHUTTING_DOWN,
    ],
)
async def test_what_is_wrong_with_the_request_goes_to_nobody_else(
    client: httpx.AsyncClient, fleet: FakeFleet, code: ErrorCode
) -> None:
    refuse(fleet, "big", code)
    answer = await ask(client, "best")
    assert answer.json()["error"]["code"] == code.value
    assert fleet.requests == []


async def test_nobody_waits_for_a_model_while_another_takes_requests(
    make_app: MakeApp, fleet: FakeFleet
) -> None:
    app = make_app(aliases=ALIASES, load_on_demand=True)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        fleet.add(view("big", "loading"))
        assert (await ask(client, "best")).json()["model"] == "m"
        fleet.add(view("m", "loading"))
        assert (await ask(client, "best")).json()["model"] == "big"
        # One that is not there may be on disk: it comes first, and is asked for.
        del fleet.views["big"]
        fleet.add(view("m"))
        assert (await ask(client, "best")).json()["model"] == "m"
        assert [model for model, _ in fleet.prepared] == ["m", "big", "big", "m"]


@pytest.mark.parametrize("accepted", [False, True])
async def test_a_model_that_dies_before_anything_was_sent_makes_room(
    client: httpx.AsyncClient, fleet: FakeFleet, accepted: bool
) -> None:
    fleet.script = None
    asking = asyncio.create_task(ask(client, "best", n=2))
    first, second = await fleet.request(0), await fleet.request(1)
    if accepted:
        first.accept()
        first.say("Half an ans")
    first.fail(ErrorCode.MODEL_CRASHED)
    for number in (2, 3):
        other = await fleet.request(number)
        assert other.model == "m"
        other.accept()
        other.say("Whole")
        other.finish()
    answer = (await asking).json()
    assert second.cancelled
    assert answer["model"] == "m"
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["Whole"] * 2


async def test_a_stream_moves_on_before_it_has_begun(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    body = {"model": "best", "messages": HI, "stream": True}
    exchange = Exchange(app, "POST", "/v1/chat/completions", json=body)
    (await fleet.request(0)).fail(ErrorCode.MODEL_UNSTABLE)
    other = await fleet.request(1)
    assert exchange.messages == []
    other.accept()
    other.say("Hello")
    await exchange.wait_for_messages(2)
    assert exchange.headers["x-served-model"] == "m"
    # From here on it stays with its model.
    other.fail(ErrorCode.MODEL_CRASHED)
    await exchange.finish()
    assert events(exchange.body)[-1]["error"]["code"] == "model_crashed"
    assert len(fleet.requests) == 2


async def test_a_stream_that_was_opened_early_can_move_on(
    make_app: MakeApp, fleet: FakeFleet
) -> None:
    fleet.script = None
    app = make_app(aliases=ALIASES, load_on_demand=True, sse_keepalive_s=0.01)
    body = {"model": "best", "messages": HI, "stream": True}
    exchange = Exchange(app, "POST", "/v1/chat/completions", json=body)
    first = await fleet.request(0)
    await exchange.wait_for_messages(2)
    assert "x-served-model" not in exchange.headers
    first.fail(ErrorCode.MODEL_LOADER_CRASHED)
    other = await fleet.request(1)
    other.accept()
    other.say("Hello")
    other.finish()
    await exchange.finish()
    chunks = [event for event in events(exchange.body) if event != "[DONE]"]
    assert {chunk["model"] for chunk in chunks} == {"m"}
    assert "Hello" in [chunk["choices"][0]["delta"].get("content") for chunk in chunks]


async def test_a_stream_that_is_opened_while_it_moves_on_goes_on_moving(
    make_app: MakeApp, fleet: FakeFleet
) -> None:
    fleet.script = None
    fleet.add(view("third"))
    fleet.preparation_may_end = asyncio.Event()
    fleet.preparation_may_end.set()
    aliases = {"best": ("big", "m", "third")}
    app = make_app(aliases=aliases, load_on_demand=True, sse_keepalive_s=0.05)
    body = {"model": "best", "messages": HI, "stream": True}
    exchange = Exchange(app, "POST", "/v1/chat/completions", json=body)
    first = await fleet.request(0)
    fleet.preparation_may_end.clear()
    first.fail(ErrorCode.MODEL_UNSTABLE)
    assert await fleet.preparation(1) == "m"
    await exchange.wait_for_messages(1)
    # What it waits for has gone on meanwhile.
    assert len(fleet.prepared) == 2
    fleet.preparation_may_end.set()
    other = await fleet.request(1)
    other.fail(ErrorCode.MODEL_NOT_FOUND)
    last = await fleet.request(2)
    assert (other.model, last.model) == ("m", "third")
    last.fail(ErrorCode.MODEL_INCOMPLETE)
    await exchange.finish()
    [error] = events(exchange.body)
    assert error["error"]["code"] == "model_unstable"
    assert error["error"]["message"].count("it broke") == 3


async def test_who_left_while_a_stream_moved_on_is_not_served_when_it_is_opened(
    make_app: MakeApp, fleet: FakeFleet
) -> None:
    fleet.script = None
    fleet.preparation_may_end = asyncio.Event()
    fleet.preparation_may_end.set()
    app = make_app(aliases=ALIASES, load_on_demand=True, sse_keepalive_s=0.1)
    body = {"model": "best", "messages": HI, "stream": True}
    exchange = Exchange(app, "POST", "/v1/chat/completions", json=body)
    first = await fleet.request(0)
    fleet.preparation_may_end.clear()
    first.fail(ErrorCode.MODEL_UNSTABLE)
    await fleet.preparation(1)
    exchange.disconnect()
    # The server itself drops what is said to somebody who has gone.
    await exchange.finish()
    assert len(fleet.requests) == 1
    assert len(fleet.prepared) == 2


async def test_an_early_stream_knows_the_only_one_that_can_serve_it(
    make_app: MakeApp, fleet: FakeFleet
) -> None:
    fleet.script = None
    app = make_app(aliases=ALIASES, load_on_demand=True, sse_keepalive_s=0.01)
    body = {"model": "fast", "messages": HI, "stream": True}
    exchange = Exchange(app, "POST", "/v1/chat/completions", json=body)
    submitted = await fleet.request(0)
    await exchange.wait_for_messages(2)
    assert exchange.headers["x-served-model"] == "m"
    submitted.fail(ErrorCode.MODEL_UNLOADED)
    await exchange.finish()
    assert events(exchange.body)[-1]["error"]["code"] == "model_unloaded"


@pytest.mark.parametrize("stream", [False, True])
async def test_who_leaves_while_the_next_is_prepared_keeps_no_model_busy(
    app: ASGIApp, fleet: FakeFleet, stream: bool
) -> None:
    fleet.script = None
    fleet.preparation_may_end = asyncio.Event()
    fleet.preparation_may_end.set()
    body = {"model": "best", "messages": HI, "stream": stream}
    exchange = Exchange(app, "POST", "/v1/chat/completions", json=body)
    first = await fleet.request(0)
    fleet.preparation_may_end.clear()
    first.fail(ErrorCode.MODEL_CRASHED)
    async with asyncio.timeout(20):
        await fleet.preparation(1)
        exchange.disconnect()
        await exchange.finish()
    assert fleet.preparations_called_off == 1
    assert len(fleet.requests) == 1


async def test_a_request_that_kills_two_models_gets_no_third(
    make_app: MakeApp, fleet: FakeFleet
) -> None:
    fleet.add(view("third"))
    for model in ("big", "m"):
        refuse(fleet, model, ErrorCode.MODEL_CRASHED)
    app = make_app(aliases={"best": ("big", "m", "third")})
    exchange = Exchange(app, "POST", "/v1/chat/completions", json={"model": "best", "messages": HI})
    await exchange.finish()
    assert (exchange.status, exchange.json["error"]["code"]) == (503, "model_crashed")
    assert fleet.requests == []


# --- presets ---


@pytest.mark.parametrize("name", ["coder", "preset:coder"])
async def test_a_preset_completes_a_chat(
    client: httpx.AsyncClient, fleet: FakeFleet, name: str
) -> None:
    assert (await ask(client, name)).status_code == 200
    request = fleet.requests[0].request
    assert request.messages is not None
    assert [(each.role, each.content) for each in request.messages] == [
        ("system", "You write code."),
        ("user", "Hi"),
    ]
    assert (request.sampling.temperature, request.max_tokens, request.stop) == (0.25, 9, ["END"])
    assert request.template_options == {"enable_thinking": False, "style": "terse"}
    assert fleet.prepared == [("big", {"context_length": 512})]


async def test_what_the_request_says_comes_first(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    answer = await ask(
        client,
        "coder",
        messages=[{"role": "developer", "content": "You sing."}, *HI],
        temperature=0.0,
        max_completion_tokens=3,
        stop="x",
        reasoning_effort="low",
        chat_template_kwargs={"style": "long"},
    )
    assert answer.status_code == 200, answer.text
    request = fleet.requests[0].request
    assert request.messages is not None
    assert [each.content for each in request.messages] == ["You sing.", "Hi"]
    assert (request.sampling.temperature, request.max_tokens, request.stop) == (0, 3, ["x"])
    assert request.template_options == {"style": "long", "reasoning_effort": "low"}


async def test_a_preset_completes_the_other_routes(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    text = {"model": "coder", "prompt": "Once"}
    assert (await client.post("/v1/completions", json=text)).status_code == 200
    message = {"model": "coder", "messages": HI, "max_tokens": 5}
    assert (await client.post("/v1/messages", json=message)).status_code == 200
    asked = {"model": "coder", "input": "Hi"}
    response = (await client.post("/v1/responses", json=asked)).json()
    assert (response["instructions"], response["temperature"]) == ("You write code.", 0.25)
    plain, anthropic, responses = (submitted.request for submitted in fleet.requests)
    assert (plain.prompt, plain.max_tokens, plain.stop) == ("Once", 9, ["END"])
    assert (anthropic.max_tokens, anthropic.stop) == (5, ["END"])
    for request in (anthropic, responses):
        assert request.messages is not None
        assert request.messages[0].content == "You write code."
        assert request.sampling.temperature == 0.25
        assert request.template_options["enable_thinking"] is False


@pytest.mark.parametrize(
    "own", [{"system": "You sing."}, {"thinking": {"type": "enabled", "budget_tokens": 7}}]
)
async def test_a_message_has_its_own_system_prompt_and_thinking(
    client: httpx.AsyncClient, fleet: FakeFleet, own: dict[str, Any]
) -> None:
    message = {"model": "coder", "messages": HI, "max_tokens": 5, **own}
    assert (await client.post("/v1/messages", json=message)).status_code == 200
    request = fleet.requests[0].request
    assert request.messages is not None
    assert request.messages[0].content == own.get("system", "You write code.")
    assert request.template_options["enable_thinking"] is ("thinking" in own)


async def test_a_response_goes_on_with_the_system_prompt_it_has(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    system = {"role": "system", "content": "You sing."}
    first = {"model": "coder", "input": [system, *HI]}
    response = (await client.post("/v1/responses", json=first)).json()
    assert response["instructions"] is None
    again = {"model": "coder", "input": "More", "previous_response_id": response["id"]}
    assert (await client.post("/v1/responses", json=again)).status_code == 200
    for submitted in fleet.requests:
        assert submitted.request.messages is not None
        assert submitted.request.messages[0].content == "You sing."


# --- auto ---


async def test_auto_is_the_model_used_last(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.add(view("big", last_used_at=2.0))
    fleet.add(view("m", last_used_at=1.0))
    fleet.add(view("vectors-model", kind="embed", last_used_at=3.0))
    assert (await ask(client, "auto")).json()["model"] == "big"
    fleet.vectors = [[0.5]]
    answer = await client.post("/v1/embeddings", json={"model": "auto", "input": "Hi"})
    assert answer.json()["model"] == "vectors-model"
    refuse(fleet, "big", ErrorCode.MODEL_UNSTABLE)
    assert (await ask(client, "auto")).json()["model"] == "m"


async def test_auto_without_a_model_says_so(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.views.clear()
    fleet.records.on_disk = [on_disk("on-disk")]
    answer = await ask(client, "auto")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "no model is loaded" in error["message"]


def on_disk(model_id: str, kind: ModelKind = ModelKind.GENERATE) -> AvailableModel:
    return AvailableModel(
        id=model_id,
        path=f"/{model_id}",
        source="models_dir",
        format="gguf",
        complete=True,
        kind=kind,
        backends=[BackendOption("llama", "1", usable=True)],
    )


@pytest.mark.parametrize(
    ("settings", "tried"),
    [
        ({}, ["first", "second"]),
        ({"models": (ModelSetting("second"), ModelSetting("elsewhere"))}, ["second"]),
    ],
)
async def test_auto_loads_what_may_be_loaded(
    make_app: MakeApp, fleet: FakeFleet, settings: dict[str, Any], tried: list[str]
) -> None:
    fleet.views = {"m": view("m", "quarantined")}
    broken = AvailableModel(
        id="cut", path="/cut", source="models_dir", format="gguf", complete=False
    )
    embedding = on_disk("vectors", kind=ModelKind.EMBED)
    fleet.records.on_disk = [broken, embedding, *map(on_disk, ("m", "first", "second"))]
    app = make_app(load_on_demand=True, **settings)
    exchange = Exchange(app, "POST", "/v1/chat/completions", json={"model": "auto", "messages": HI})
    await exchange.finish()
    assert [model for model, _ in fleet.prepared] == tried


# --- what clients and operators see ---


async def test_names_are_listed_after_the_models(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    fleet.add(view("big", "loading"))
    listed = (await client.get("/v1/models")).json()["data"]
    assert [(each["id"], each.get("alias_of")) for each in listed] == [
        ("m", None),
        ("best", "m"),
        ("fast", "m"),
        ("vectors", "m"),
        ("coder", "m"),
    ]
    everything = (await client.get("/v1/models?all=true")).json()["data"]
    assert {each["id"]: each["alias_of"] for each in everything[2:]} == {
        **{"best": "m", "fast": "m", "vectors": "m", "coder": "m"},
        "only": "big",
    }


async def test_a_name_is_looked_up_as_a_model(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    refuse(fleet, "big", ErrorCode.MODEL_UNSTABLE)
    fleet.add(view("big", "quarantined"))
    for name in ("best", "coder", "preset:coder", "auto"):
        model = (await client.get(f"/v1/models/{name}")).json()
        assert (model["id"], model["alias_of"]) == (name, "m")
    assert "alias_of" not in (await client.get("/v1/models/m")).json()
    answer = await client.get("/v1/models/only")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "model_unstable")


async def test_presets_are_shown_to_operators(client: httpx.AsyncClient) -> None:
    told = (await client.get("/admin/presets")).json()
    assert told == {
        "presets": [
            {
                "name": "coder",
                "model": ["big", "m"],
                "system_prompt": "You write code.",
                "parameters": {
                    "temperature": 0.25,
                    "stop": ["END"],
                    "max_tokens": 9,
                    "chat_template_kwargs": {"enable_thinking": False, "style": "terse"},
                },
                "load": {"context_length": 512},
            }
        ],
        "aliases": json.loads(json.dumps(ALIASES)),
        "count": 1,
    }


async def test_an_operator_loads_a_preset_by_its_name(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    fleet.load_may_end.set()
    answer = await client.post("/admin/models/load", json={"model_id": "coder"})
    assert answer.json()["model_id"] == "big"
    answer = await client.post(
        "/admin/models/load", json={"model_id": "preset:coder", "context_length": 99}
    )
    assert answer.status_code == 200
    assert [(each.model_id, each.context_length) for each in fleet.loads] == [
        ("big", 512),
        ("big", 99),
    ]


async def test_a_load_by_name_goes_to_the_one_that_can(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    refuse(fleet, "big", ErrorCode.INSUFFICIENT_MEMORY)
    answer = await client.post("/admin/models/load", json={"model_id": "best", "wait": False})
    assert answer.json()["model_id"] == "m"
    answer = await client.post("/admin/models/load", json={"model_id": "auto"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model_id")


async def test_the_preset_of_an_inquiry_reaches_the_worker(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    await client.post("/v1/messages/count_tokens", json={"model": "coder", "messages": HI})
    [inquiry] = fleet.inquiries
    assert isinstance(inquiry, Tokenize)
    assert inquiry.generate.template_options == {"enable_thinking": False, "style": "terse"}

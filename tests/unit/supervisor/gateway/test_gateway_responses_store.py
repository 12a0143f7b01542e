"""Stored responses: going on from them, reading them again, and their bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.chat import ChatMessage, Extras, ToolCall, ToolCallPiece
from protocol.messages import Delta, FinishReason
from supervisor.gateway.openai.responses_items import InputText, Message, OutputText
from supervisor.gateway.openai.responses_store import ResponseStore
from tests.support.asgi import Exchange, MakeApp
from tests.support.fake_fleet import FakeFleet
from tests.support.responses_api import parsed

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "weather"}

MakeClient = Callable[..., httpx.AsyncClient]


@pytest.fixture
def make_client(make_app: MakeApp) -> MakeClient:
    def make(**settings: object) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(make_app(**settings))
        return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")

    return make


async def respond(client: httpx.AsyncClient, given: object = "Hi", **more: object) -> Any:
    answer = await client.post(PATH, json={"model": "m", "input": given, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def error_of(answer: httpx.Response) -> tuple[int, Any, Any]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


NOT_FOUND = (404, "response_not_found", "response_id")


# --- going on ---


async def test_a_response_goes_on_from_the_one_before(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    first = await respond(client, "one", instructions="Be brief.")
    second = await respond(client, "two", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    await respond(client, "three", previous_response_id=second["id"], instructions="Be kind.")
    # Another branch from the first.
    await respond(client, "four", previous_response_id=first["id"])
    answer = ChatMessage("assistant", "Hello")
    one, two = ChatMessage("user", "one"), ChatMessage("user", "two")
    assert [submitted.request.messages for submitted in fleet.requests] == [
        [ChatMessage("system", "Be brief."), one],
        [one, answer, two],
        [ChatMessage("system", "Be kind."), one, answer, two, answer, ChatMessage("user", "three")],
        [one, answer, ChatMessage("user", "four")],
    ]


async def test_a_streamed_call_goes_on_with_its_result(make_app: MakeApp, fleet: FakeFleet) -> None:
    fleet.script = None
    app = make_app()
    request = {"model": "m", "input": "Hi", "tools": [TOOL], "stream": True}
    call = Exchange(app, "POST", PATH, json=request)
    submitted = await fleet.request()
    submitted.accept()
    pieces = [ToolCallPiece(0, "call_a", "weather", "{}")]
    submitted.stream.push(Delta(0, "Well", [1], None, Extras(reasoning="Hm")))
    submitted.stream.push(Delta(0, "", [1], FinishReason.TOOL_CALLS, Extras(tool_calls=pieces)))
    await call.finish()
    response = parsed(call.body)[-1]["response"]
    fleet.script = ("Rain",)
    result = {"type": "function_call_output", "call_id": "call_a", "output": "wet"}
    follow_up = {"model": "m", "input": [result], "previous_response_id": response["id"]}
    again = Exchange(app, "POST", PATH, json=follow_up)
    await again.finish()
    assert again.status == 200
    assert fleet.requests[1].request.messages == [
        ChatMessage("user", "Hi"),
        ChatMessage("assistant", "Well", None, [ToolCall("call_a", "weather", "{}")], None, "Hm"),
        ChatMessage("tool", "wet", "weather", [], "call_a"),
    ]


async def test_without_store_nothing_is_kept(client: httpx.AsyncClient) -> None:
    response = await respond(client, store=False)
    assert response["store"] is False
    assert error_of(await client.get(f"{PATH}/{response['id']}")) == NOT_FOUND
    request = {"model": "m", "input": "x", "previous_response_id": response["id"]}
    assert error_of(await client.post(PATH, json=request)) == (
        400,
        "previous_response_not_found",
        "previous_response_id",
    )


@pytest.mark.parametrize("setting", ["response_store_max", "response_store_max_bytes"])
async def test_without_room_responses_say_that_they_are_not_stored(
    make_client: MakeClient, setting: str
) -> None:
    async with make_client(**{setting: 0}) as client:
        response = await respond(client, store=True)
        assert response["store"] is False
        assert error_of(await client.get(f"{PATH}/{response['id']}")) == NOT_FOUND


async def test_a_stored_item_can_be_referred_to(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    first = await respond(client, [{"role": "user", "content": "one", "id": "mine"}])
    references = [
        {"type": "item_reference", "id": "mine"},
        {"id": first["output"][0]["id"]},
        {"role": "user", "content": "two"},
    ]
    await respond(client, references)
    assert fleet.requests[1].request.messages == [
        ChatMessage("user", "one"),
        ChatMessage("assistant", "Hello"),
        ChatMessage("user", "two"),
    ]


async def test_a_failed_stream_is_not_kept(make_app: MakeApp, fleet: FakeFleet) -> None:
    fleet.script = None
    app = make_app()
    call = Exchange(app, "POST", PATH, json={"model": "m", "input": "Hi", "stream": True})
    submitted = await fleet.request()
    submitted.accept()
    submitted.say("a")
    await call.wait_for_messages(3)
    call.disconnect()
    await call.finish()
    response_id = parsed(call.body)[0]["response"]["id"]
    answer = Exchange(app, "GET", f"{PATH}/{response_id}")
    await answer.finish()
    assert answer.status == 404


# --- reading again ---


async def test_a_response_is_read_and_deleted(client: httpx.AsyncClient) -> None:
    response = await respond(client, metadata={"a": "b"})
    path = f"{PATH}/{response['id']}"
    assert (await client.get(path)).json() == response
    assert (await client.get(path, params={"stream": "false"})).json() == response
    assert (await client.delete(path)).json() == {
        "id": response["id"],
        "object": "response",
        "deleted": True,
    }
    for answer in (await client.get(path), await client.delete(path)):
        assert error_of(answer) == NOT_FOUND
    assert error_of(await client.get(f"{path}/input_items")) == NOT_FOUND


async def test_a_stored_response_cannot_be_read_as_a_stream(client: httpx.AsyncClient) -> None:
    response = await respond(client)
    answer = await client.get(f"{PATH}/{response['id']}", params={"stream": "true"})
    assert error_of(answer) == (400, "unsupported_parameter", "stream")


async def test_a_deleted_response_lives_on_in_those_after_it(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    first = await respond(client, "one")
    second = await respond(client, "two", previous_response_id=first["id"])
    await client.delete(f"{PATH}/{first['id']}")
    await respond(client, "three", previous_response_id=second["id"])
    messages = fleet.requests[-1].request.messages
    assert messages is not None
    assert [message.content for message in messages] == ["one", "Hello", "two", "Hello", "three"]


async def test_input_items_in_pages(client: httpx.AsyncClient) -> None:
    first = await respond(client, [{"role": "user", "content": str(i)} for i in range(3)])
    second = await respond(client, "last", previous_response_id=first["id"])
    path = f"{PATH}/{second['id']}/input_items"
    page = (await client.get(path)).json()
    assert (page["object"], page["has_more"]) == ("list", False)
    texts = [item["content"][0]["text"] for item in page["data"]]
    assert texts == ["last", "Hello", "2", "1", "0"]
    assert page["data"][0] == {
        "type": "message",
        "id": page["first_id"],
        "role": "user",
        "status": "completed",
        "content": [{"type": "input_text", "text": "last"}],
    }
    assert page["last_id"] == page["data"][-1]["id"]
    seen: list[Any] = []
    query: dict[str, str] = {"order": "asc", "limit": "2"}
    while True:
        page = (await client.get(path, params=query)).json()
        seen += page["data"]
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    assert [item["content"][0]["text"] for item in seen] == ["0", "1", "2", "Hello", "last"]
    query["after"] = page["last_id"]
    page = (await client.get(path, params=query)).json()
    assert (page["data"], page["first_id"], page["last_id"]) == ([], None, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("limit", value) for value in ("0", "101", "x", "9" * 30, "")],
        *[("order", "up"), ("after", "nothing")],
    ],
)
async def test_bad_queries_are_named(client: httpx.AsyncClient, name: str, value: str) -> None:
    response = await respond(client)
    answer = await client.get(f"{PATH}/{response['id']}/input_items", params={name: value})
    assert error_of(answer) == (400, "invalid_value", name)


async def test_nobody_else_sees_a_response(client: httpx.AsyncClient) -> None:
    mine, other = {"authorization": "Bearer mine"}, {"authorization": "Bearer other"}
    item = [{"role": "user", "content": "secret", "id": "msg_secret"}]
    request = {"model": "m", "input": item}
    response = (await client.post(PATH, json=request, headers=mine)).json()
    path = f"{PATH}/{response['id']}"
    for headers in (other, {}, {"x-api-key": "other"}):
        for answer in (
            await client.get(path, headers=headers),
            await client.get(f"{path}/input_items", headers=headers),
            await client.delete(path, headers=headers),
        ):
            assert error_of(answer) == NOT_FOUND
        follow_up = {"model": "m", "input": "x", "previous_response_id": response["id"]}
        refused = await client.post(PATH, json=follow_up, headers=headers)
        assert error_of(refused)[1] == "previous_response_not_found"
        reference = {"model": "m", "input": [{"type": "item_reference", "id": "msg_secret"}]}
        refused = await client.post(PATH, json=reference, headers=headers)
        assert error_of(refused) == (400, "invalid_value", "input[0].id")
    for headers in (mine, {"x-api-key": "mine"}):
        assert (await client.get(path, headers=headers)).json() == response


async def test_ids_are_not_guessed(client: httpx.AsyncClient) -> None:
    ids = {(await respond(client))["id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(len(each) >= 40 for each in ids)


async def test_the_longest_unused_go_first(make_client: MakeClient) -> None:
    async with make_client(response_store_max=2) as client:
        first, second = await respond(client), await respond(client)
        await client.get(f"{PATH}/{first['id']}")
        third = await respond(client)
        found = [
            (await client.get(f"{PATH}/{each['id']}")).status_code
            for each in (first, second, third)
        ]
        assert found == [200, 404, 200]


async def test_bytes_are_bounded(make_client: MakeClient) -> None:
    async with make_client(response_store_max_bytes=8000) as client:
        small = await respond(client)
        await respond(client, "x" * 10_000)
        assert (await client.get(f"{PATH}/{small['id']}")).status_code == 200, "too large to keep"
        big = await respond(client, "x" * 5_000)
        assert (await client.get(f"{PATH}/{big['id']}")).status_code == 200
        assert (await client.get(f"{PATH}/{small['id']}")).status_code == 404


# --- the store ---


@st.composite
def operations(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    kinds = st.sampled_from(["put", "put", "put", "get", "delete"])
    return draw(st.lists(st.tuples(kinds, st.integers(0, 8), st.integers(0, 400)), max_size=40))


@given(steps=operations())
def test_the_store_keeps_its_bounds_and_forgets_cleanly(steps: list[tuple[str, int, int]]) -> None:
    store = ResponseStore(4, 3000)
    known: set[int] = set()
    for kind, number, size in steps:
        owner, name = f"owner{number % 2}", f"resp_{number}"
        if kind == "put" and number not in known:
            known.add(number)
            previous = store.get(owner, f"resp_{number - 2}")
            asked = Message(f"in_{number}", "user", [InputText("x" * size)])
            said = Message(f"out_{number}", "assistant", [OutputText("y")])
            store.put(owner, name, b"{}", previous, [asked], [said])
        elif kind == "get":
            stored = store.get(owner, name)
            if stored is not None:
                assert stored.conversation_items[-1].id == f"out_{number}"
            assert store.get(f"owner{(number + 1) % 2}", name) is None
        elif kind == "delete":
            there = store.get(owner, name) is not None
            assert store.delete(owner, name) == there
        assert len(store) <= 4
        kept = list(store._stored.values())
        assert store._bytes == sum(stored.size for stored in kept) <= 3000
        assert {(stored.owner, each) for stored in kept for each in stored.item_ids} == set(
            store._items
        )
        for (owner, item_id), _ in list(store._items.items()):
            item = store.item(owner, item_id)
            assert item is not None
            assert item.id == item_id


def test_items_survive_being_stored() -> None:
    store = ResponseStore(1, 10_000)
    said = Message("out", "assistant", [OutputText("ä\u2028")])
    store.put("o", "r", b"{}", None, [Message("in", "user", [InputText("x")])], [said])
    found = store.item("o", "out")
    assert msgspec.to_builtins(found) == msgspec.to_builtins(said)

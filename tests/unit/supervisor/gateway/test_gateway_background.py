"""``background`` of the Responses API: answered whether or not anybody waits."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import ASGIApp

from protocol.errors import ErrorCode
from protocol.messages import FinishReason
from tests.support.asgi import Exchange, MakeApp
from tests.support.fake_fleet import FakeFleet, Submitted

PATH = "/v1/responses"
BODY = {"model": "m", "input": "Hi", "background": True}


async def ask(
    app: ASGIApp, method: str, path: str, json: object = None, **headers: str
) -> Exchange:
    call = Exchange(app, method, path, json=json, headers=headers)
    async with asyncio.timeout(5):
        await call.finish()
    return call


async def begun(app: ASGIApp, fleet: FakeFleet, **more: object) -> tuple[str, Submitted]:
    """A response that is under way, its client having an id and no more."""
    fleet.script = None
    call = await ask(app, "POST", PATH, {**BODY, **more})
    assert call.status == 200
    assert (call.json["status"], call.json["background"]) == ("queued", True)
    return call.json["id"], await fleet.request(len(fleet.requests) - 1)


async def status_of(app: ASGIApp, response_id: str) -> str:
    status = (await ask(app, "GET", f"{PATH}/{response_id}")).json["status"]
    assert isinstance(status, str)
    return status


async def settle(app: ASGIApp, response_id: str, status: str) -> Exchange:
    """Follow it to its end, as far as which it then is."""
    await ask(app, "GET", f"{PATH}/{response_id}?stream=true")
    answer = await ask(app, "GET", f"{PATH}/{response_id}")
    assert answer.json["status"] == status
    return answer


async def test_it_is_queued_in_progress_and_completed(app: ASGIApp, fleet: FakeFleet) -> None:
    response_id, submitted = await begun(app, fleet)
    assert await status_of(app, response_id) == "queued"
    submitted.accept()
    submitted.say("Hel")
    follower = Exchange(app, "GET", f"{PATH}/{response_id}?stream=true")
    await follower.wait_for(b"Hel")
    assert await status_of(app, response_id) == "in_progress"
    submitted.say("lo", FinishReason.STOP)
    await follower.finish()
    done = (await settle(app, response_id, "completed")).json
    assert done["output"][0]["content"][0]["text"] == "Hello"
    again = {"model": "m", "input": "More", "previous_response_id": response_id}
    fleet.script = ("Yes",)
    assert (await ask(app, "POST", PATH, again)).status == 200


async def test_its_events_go_on_after_the_number_a_client_has_seen(
    app: ASGIApp, fleet: FakeFleet
) -> None:
    fleet.script = None
    call = Exchange(app, "POST", PATH, json={**BODY, "stream": True})
    submitted = await fleet.request()
    submitted.accept()
    submitted.say("Hel")
    await call.wait_for(b'"delta":"Hel"')
    response_id = call.headers["x-stream-id"]
    seen = call.body.count(b'"sequence_number":')
    call.disconnect()
    await call.finish()
    submitted.say("lo", FinishReason.STOP)
    rest = await ask(app, "GET", f"{PATH}/{response_id}?stream=true&starting_after={seen - 1}")
    assert b"id: %d\nevent: response.output_text.delta" % seen in rest.body
    assert not submitted.cancelled
    whole = await ask(app, "GET", f"{PATH}/{response_id}?stream=true")
    assert whole.body == call.body + rest.body
    beyond = await ask(app, "GET", f"{PATH}/{response_id}?stream=true&starting_after=999")
    wrong = await ask(app, "GET", f"{PATH}/{response_id}?stream=true&starting_after=x")
    neither = await ask(app, "GET", f"{PATH}/{response_id}?stream=maybe")
    assert (neither.status, neither.json["error"]["param"]) == (400, "stream")
    for refused in (beyond, wrong):
        assert (refused.status, refused.json["error"]["param"]) == (400, "starting_after")


@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_it_can_be_cancelled_or_deleted(app: ASGIApp, fleet: FakeFleet, method: str) -> None:
    response_id, submitted = await begun(app, fleet)
    submitted.accept()
    submitted.say("Hel")
    path = f"{PATH}/{response_id}"
    if method == "DELETE":
        assert (await ask(app, "DELETE", path)).json["deleted"] is True
        assert (await ask(app, "GET", path)).json["error"]["code"] == "response_not_found"
        assert (await ask(app, "DELETE", path)).status == 404
    else:
        for _ in range(2):
            cancelled = await ask(app, "POST", f"{path}/cancel")
            assert (cancelled.status, cancelled.json["status"]) == (200, "cancelled")
        assert cancelled.json["output"][0]["content"][0]["text"] == "Hel"
        assert await status_of(app, response_id) == "cancelled"
    assert submitted.cancelled


async def test_what_has_ended_is_not_cancelled_any_more(app: ASGIApp, fleet: FakeFleet) -> None:
    response_id, submitted = await begun(app, fleet)
    submitted.accept()
    submitted.say("Hello", FinishReason.STOP)
    await settle(app, response_id, "completed")
    answer = await ask(app, "POST", f"{PATH}/{response_id}/cancel")
    assert (answer.status, answer.json["status"]) == (200, "completed")
    fleet.script = ("x",)
    other = (await ask(app, "POST", PATH, {**BODY, "background": False})).json["id"]
    refused = await ask(app, "POST", f"{PATH}/{other}/cancel")
    assert (refused.status, refused.json["error"]["param"]) == (400, "response_id")
    unknown = await ask(app, "POST", f"{PATH}/resp_unknown/cancel")
    assert unknown.json["error"]["code"] == "response_not_found"


@pytest.mark.parametrize("accepted", [False, True])
async def test_a_failure_is_told_to_who_asks_later(
    app: ASGIApp, fleet: FakeFleet, accepted: bool
) -> None:
    response_id, submitted = await begun(app, fleet)
    if accepted:
        submitted.accept()
        submitted.say("Hel")
    submitted.fail(ErrorCode.MODEL_CRASHED)
    failed = (await settle(app, response_id, "failed")).json
    assert failed["error"]["code"] == "model_crashed"
    assert len(failed["output"]) == accepted


async def test_it_goes_on_though_nobody_reads_it_and_is_kept_as_others(
    make_app: MakeApp, fleet: FakeFleet
) -> None:
    app = make_app(stream_keep_s=0.05)
    response_id, submitted = await begun(app, fleet)
    submitted.accept()
    await asyncio.sleep(0.15)
    assert await status_of(app, response_id) == "in_progress"
    submitted.say("Hello", FinishReason.STOP)
    path = f"{PATH}/{response_id}"
    async with asyncio.timeout(5):
        # Until its events are not kept any more.
        while (await ask(app, "GET", f"{path}?stream=true")).status == 200:
            pass
    assert await status_of(app, response_id) == "completed"
    again = await ask(app, "POST", f"{path}/cancel")
    assert (again.status, again.json["status"]) == (200, "completed")


async def test_it_is_its_keys_own(app: ASGIApp, fleet: FakeFleet) -> None:
    response_id, submitted = await begun(app, fleet)
    path = f"{PATH}/{response_id}"
    other = {"authorization": "Bearer another"}
    for method, where in (
        ("GET", path),
        ("GET", f"{path}?stream=true"),
        ("POST", f"{path}/cancel"),
        ("DELETE", path),
    ):
        assert (await ask(app, method, where, **other)).json["error"]["code"] == (
            "response_not_found"
        )
    assert not submitted.cancelled


async def test_what_would_not_be_kept_is_refused(make_app: MakeApp, fleet: FakeFleet) -> None:
    unkept = await ask(make_app(), "POST", PATH, {**BODY, "store": False})
    assert (unkept.status, unkept.json["error"]["param"]) == (400, "background")
    without = await ask(make_app(stream_store_max=0), "POST", PATH, BODY)
    assert without.json["error"]["code"] == "unsupported_parameter"
    app = make_app(stream_store_max=1)
    response_id, submitted = await begun(app, fleet)
    full = await ask(app, "POST", PATH, BODY)
    assert (full.status, full.json["error"]["code"]) == (429, "rate_limit_exceeded")
    assert full.headers["retry-after"] == "5"
    submitted.accept()
    submitted.finish()
    await settle(app, response_id, "completed")
    missing = await ask(app, "POST", PATH, {**BODY, "model": "nope"})
    assert missing.json["error"]["code"] == "model_not_found"
    # A refusal has left its place.
    await begun(app, fleet)

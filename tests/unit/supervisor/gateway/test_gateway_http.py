"""What holds for every route: the envelope, request ids, bodies, methods."""

from __future__ import annotations

import logging

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message

from protocol.errors import CodedError, ErrorCode
from supervisor.gateway import errors
from supervisor.metrics import Metrics
from tests.support.asgi import Exchange, MakeApp
from tests.support.fake_fleet import FakeFleet

CHAT = "/v1/chat/completions"


def assert_envelope(value: object) -> dict[str, object]:
    assert isinstance(value, dict)
    error = value["error"]
    assert isinstance(error, dict)
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["code"], str)
    return error


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_code_has_a_status_and_a_type(code: ErrorCode) -> None:
    assert code in errors._ANSWERS
    assert 400 <= errors.status_of(code) < 600


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("model_unsupported_arch", 422),
        ("model_unsupported_backend", 422),
        ("model_incomplete", 409),
        ("model_not_ready", 409),
        ("model_unstable", 409),
        ("model_canary_failed", 409),
        ("model_load_timeout", 409),
        ("model_loader_crashed", 409),
        ("model_not_found", 404),
        ("rate_limit_exceeded", 429),
        ("context_length_exceeded", 400),
        ("invalid_value", 400),
        ("invalid_admin_key", 403),
        ("invalid_api_key", 401),
        ("model_crashed", 503),
        ("request_timeout", 408),
        ("server_shutting_down", 503),
    ],
)
def test_statuses_are_those_of_the_contract(code: str, status: int) -> None:
    assert errors.status_of(ErrorCode(code)) == status


@given(st.floats(min_value=0, max_value=1e6))
def test_retry_after_is_whole_seconds_and_never_early(seconds: float) -> None:
    error = CodedError(ErrorCode.MODEL_NOT_READY, "", retry_after_s=seconds)
    assert int(errors.retry_after(error) or "0") >= max(1, seconds)


async def test_unknown_route(client: httpx.AsyncClient) -> None:
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        answer = await client.request(method, "/v2/nothing")
        assert answer.status_code == 404
        assert assert_envelope(answer.json())["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "POST"),
        ("PUT", "/v1/models", "GET, HEAD"),
        ("DELETE", "/healthz", "GET, HEAD"),
        ("GET", "/admin/models/load", "POST"),
        ("POST", "/admin/models/compatibility", "GET, HEAD"),
        ("PUT", "/admin/models/org/name/release", "DELETE, GET, HEAD"),
    ],
)
async def test_wrong_method(client: httpx.AsyncClient, method: str, path: str, allow: str) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allow
    assert assert_envelope(answer.json())["code"] == "method_not_allowed"


async def test_trailing_slash_is_not_redirected(client: httpx.AsyncClient) -> None:
    assert (await client.get("/healthz/")).status_code == 404


@pytest.mark.parametrize("path", ["/healthz", "/nothing", "/v1/models", "/admin/models/x"])
async def test_a_valid_request_id_is_echoed(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path, headers={"x-request-id": "abc-1.2_X"})
    assert answer.headers.get_list("x-request-id") == ["abc-1.2_X"]


@pytest.mark.parametrize("given_id", ["", "a b", "x" * 129, "a\x01", 'a"b', "ü"])
async def test_an_invalid_request_id_is_replaced(app: ASGIApp, given_id: str) -> None:
    exchange = Exchange(app, "GET", "/healthz", headers={"x-request-id": given_id})
    await exchange.finish()
    assert exchange.headers["x-request-id"] != given_id
    assert len(exchange.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b'{"model": NaN}', "invalid_json", None),
        (b"\xff\xfe", "invalid_json", None),
        (b'{"unknown": "\xff"}', "invalid_json", None),
        (b'{"model": "\\ud800"}', "invalid_json", None),
        (b'{"extra": ' + b"[" * 100_000, "invalid_json", None),
        (b"[]", "invalid_type", None),
        (b"null", "invalid_type", None),
        (b'"text"', "invalid_type", None),
        (b"{}", "missing_required_parameter", "model"),
        (b'{"model": 3}', "invalid_type", "model"),
    ],
)
async def test_bad_bodies(
    client: httpx.AsyncClient, body: bytes, code: str, param: str | None
) -> None:
    for path in (CHAT, "/v1/completions"):
        answer = await client.post(path, content=body)
        assert answer.status_code == 400
        error = assert_envelope(answer.json())
        assert (error["code"], error["param"]) == (code, param)
        assert error["type"] == "invalid_request_error"


async def test_wrong_media_type(client: httpx.AsyncClient) -> None:
    body = b'{"model": "m", "messages": [{"role": "user", "content": "x"}]}'
    for media_type in ("text/plain", "application/x-www-form-urlencoded"):
        answer = await client.post(CHAT, content=body, headers={"content-type": media_type})
        assert answer.status_code == 415
        assert assert_envelope(answer.json())["code"] == "unsupported_media_type"
    for media_type in ("application/json; charset=utf-8", "Application/JSON"):
        answer = await client.post(CHAT, content=body, headers={"content-type": media_type})
        assert answer.status_code == 200


async def test_an_encoded_body_is_refused(client: httpx.AsyncClient) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    answer = await client.post(CHAT, json=body, headers={"content-encoding": "gzip"})
    assert answer.status_code == 415
    assert assert_envelope(answer.json())["code"] == "unsupported_media_type"
    answer = await client.post(CHAT, json=body, headers={"content-encoding": "identity"})
    assert answer.status_code == 200


async def test_a_byte_order_mark_is_skipped(client: httpx.AsyncClient) -> None:
    body = b'\xef\xbb\xbf{"model": "m", "messages": [{"role": "user", "content": "x"}]}'
    assert (await client.post(CHAT, content=body)).status_code == 200


async def test_a_body_that_stalls_is_given_up(make_app: MakeApp) -> None:
    class Stalling(Exchange):
        async def _receive(self) -> Message:
            if self.pieces_read == 0:
                self.pieces_read = 1
                return {"type": "http.request", "body": b"{", "more_body": True}
            return await super()._receive()

    exchange = Stalling(make_app(body_timeout_s=0.01), "POST", CHAT)
    exchange._pieces.clear()
    await exchange.finish()
    assert exchange.status == 408
    assert exchange.headers["connection"] == "close"
    assert assert_envelope(exchange.json)["code"] == "request_timeout"


async def test_announced_size_over_the_bound_is_refused_unread(make_app: MakeApp) -> None:
    headers = {"content-length": "101"}
    exchange = Exchange(make_app(max_body_bytes=100), "POST", CHAT, headers=headers)
    await exchange.finish()
    assert exchange.status == 413
    assert exchange.pieces_read == 0
    assert exchange.headers["connection"] == "close"
    assert assert_envelope(exchange.json)["code"] == "request_too_large"


async def test_reading_stops_at_the_bound(make_app: MakeApp) -> None:
    pieces = [b" " * 40] * 10
    exchange = Exchange(make_app(max_body_bytes=100), "POST", CHAT, body=pieces)
    await exchange.finish()
    assert exchange.status == 413
    assert exchange.pieces_read == 3


async def test_a_body_in_pieces_is_joined(app: ASGIApp) -> None:
    body = b'{"model": "m", "messages": [{"role": "user", "content": "x"}]}'
    pieces = [body[i : i + 7] for i in range(0, len(body), 7)]
    exchange = Exchange(app, "POST", CHAT, body=pieces)
    await exchange.finish()
    assert exchange.status == 200


async def test_a_bug_does_not_leak(
    client: httpx.AsyncClient, fleet: FakeFleet, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.bug = RuntimeError("secret detail")
    with caplog.at_level(logging.ERROR):
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
        answer = await client.post(CHAT, json=body, headers={"x-request-id": "r1"})
    assert answer.status_code == 500
    assert assert_envelope(answer.json())["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "r1"
    assert "secret detail" in caplog.text
    assert "r1" in caplog.text


async def test_what_is_nested_too_deeply_to_be_passed_on_is_the_clients_error(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    fleet.bug = RecursionError("in the encoder")
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    answer = await client.post(CHAT, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


async def test_a_client_that_leaves_while_it_sends_is_nobodys_error(
    app: ASGIApp, metrics: Metrics, fleet: FakeFleet
) -> None:
    class Leaving(Exchange):
        async def _receive(self) -> dict[str, object]:
            return {"type": "http.disconnect"}

    await Leaving(app, "POST", CHAT).finish()
    labels = {"model": "", "endpoint": CHAT, "code": "client_disconnected"}
    assert metrics.value("opta_lmx_requests_total", labels) == 1


async def test_lifespan_starts_and_stops_the_fleet(app: ASGIApp, fleet: FakeFleet) -> None:
    sent: list[str] = []
    seen: list[bool] = []
    messages = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> dict[str, object]:
        seen.append(fleet.started)
        return {"type": next(messages)}

    async def send(message: dict[str, object]) -> None:
        sent.append(str(message["type"]))

    await app({"type": "lifespan", "state": {}}, receive, send)  # type: ignore[arg-type]
    assert seen == [False, True]
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert fleet.stopped

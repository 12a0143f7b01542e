"""Who is let in: keys by side, and loopback without keys."""

from __future__ import annotations

import pytest

from supervisor.gateway.auth import is_loopback
from tests.support.asgi import Exchange, MakeApp

ADMIN, API = "admin-secret", "api-secret"
INFERENCE_PATH, ADMIN_PATH = "/v1/models", "/admin/models"
BOTH = {"admin_key": ADMIN, "api_key": API}


async def status(
    make_app: MakeApp, path: str, headers: dict[str, str], **settings: object
) -> tuple[int, str | None]:
    exchange = Exchange(make_app(**settings), "GET", path, headers=headers)
    await exchange.finish()
    code = exchange.json["error"]["code"] if exchange.status >= 400 else None
    if exchange.status == 401:
        assert exchange.headers["www-authenticate"] == "Bearer"
    return exchange.status, code


@pytest.mark.parametrize(
    "headers",
    [
        {"x-admin-key": ADMIN},
        {"authorization": f"Bearer {ADMIN}"},
        {"authorization": f"bearer {ADMIN}"},
    ],
)
async def test_admin_key_opens_admin(make_app: MakeApp, headers: dict[str, str]) -> None:
    assert await status(make_app, ADMIN_PATH, headers, **BOTH) == (200, None)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-admin-key": ""},
        {"x-admin-key": "wrong"},
        {"x-admin-key": ADMIN + "x"},
        {"x-admin-key": "ü"},
        {"x-admin-key": API},
        {"authorization": f"Bearer {API}"},
        {"authorization": f"Basic {ADMIN}"},
        {"authorization": ADMIN},
        {"x-api-key": API},
        {"x-api-key": ADMIN},
    ],
)
async def test_nothing_else_opens_admin(make_app: MakeApp, headers: dict[str, str]) -> None:
    assert await status(make_app, ADMIN_PATH, headers, **BOTH) == (403, "invalid_admin_key")


@pytest.mark.parametrize("headers", [{"authorization": f"Bearer {API}"}, {"x-api-key": API}])
async def test_api_key_opens_inference(make_app: MakeApp, headers: dict[str, str]) -> None:
    assert await status(make_app, INFERENCE_PATH, headers, **BOTH) == (200, None)


@pytest.mark.parametrize(
    "headers", [{}, {"x-api-key": "wrong"}, {"x-admin-key": API}, {"authorization": "Bearer"}]
)
async def test_nothing_else_opens_inference(make_app: MakeApp, headers: dict[str, str]) -> None:
    assert await status(make_app, INFERENCE_PATH, headers, **BOTH) == (401, "invalid_api_key")


async def test_a_side_without_a_key_is_open(make_app: MakeApp) -> None:
    assert await status(make_app, INFERENCE_PATH, {}, admin_key=ADMIN) == (200, None)
    assert await status(make_app, ADMIN_PATH, {}, api_key=API) == (200, None)


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_probes_need_no_key(make_app: MakeApp, path: str) -> None:
    headers = {"host": "box.lan"}
    assert await status(make_app, path, headers, host="0.0.0.0", **BOTH) == (200, None)
    assert await status(make_app, path, headers, **BOTH) == (200, None)


async def test_metrics_take_either_key(make_app: MakeApp) -> None:
    for key in (ADMIN, API):
        headers = {"authorization": f"Bearer {key}"}
        assert await status(make_app, "/metrics", headers, **BOTH) == (200, None)
    assert await status(make_app, "/metrics", {}, **BOTH) == (401, "invalid_api_key")
    assert await status(make_app, "/metrics", {}, admin_key=ADMIN) == (401, "invalid_api_key")
    assert await status(make_app, "/metrics", {}) == (200, None)


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "127.0.0.1:8000",
        "127.1.2.3",
        "[::1]:8000",
        "LOCALHOST",
        "app.localhost",
    ],
)
async def test_loopback_names_are_answered(make_app: MakeApp, host: str) -> None:
    assert await status(make_app, INFERENCE_PATH, {"host": host}) == (200, None)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "192.168.1.2",
        "",
        "[",
        "127.0.0.1@evil",
        "a b",
    ],
)
@pytest.mark.parametrize("path", [INFERENCE_PATH, ADMIN_PATH, "/metrics", "/readyz"])
async def test_other_names_are_refused_without_keys(
    make_app: MakeApp, host: str, path: str
) -> None:
    expected = (403, "host_not_allowed")
    assert await status(make_app, path, {"host": host}) == expected


@pytest.mark.parametrize(("version", "expected"), [("1.0", 200), ("1.1", 403)])
async def test_only_http_1_0_may_leave_the_host_out(
    make_app: MakeApp, version: str, expected: int
) -> None:
    exchange = Exchange(make_app(), "GET", ADMIN_PATH)
    exchange.scope["http_version"] = version
    exchange.scope["headers"] = []
    await exchange.finish()
    assert exchange.status == expected


async def test_other_names_are_answered_with_a_key(make_app: MakeApp) -> None:
    headers = {"host": "box.lan", "x-api-key": API}
    assert await status(make_app, INFERENCE_PATH, headers, **BOTH) == (200, None)


async def test_only_the_keyed_side_answers_other_names(make_app: MakeApp) -> None:
    headers = {"host": "evil.example", "x-api-key": API}
    assert await status(make_app, INFERENCE_PATH, headers, api_key=API) == (200, None)
    assert await status(make_app, ADMIN_PATH, headers, api_key=API) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://192.168.0.9", "null", "http://["]
)
async def test_foreign_pages_are_refused_without_keys(make_app: MakeApp, origin: str) -> None:
    expected = (403, "host_not_allowed")
    assert await status(make_app, ADMIN_PATH, {"origin": origin}) == expected


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1", "app://chat"])
async def test_local_pages_and_apps_are_answered(make_app: MakeApp, origin: str) -> None:
    assert await status(make_app, ADMIN_PATH, {"origin": origin}) == (200, None)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
    ],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected

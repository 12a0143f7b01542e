"""``POST /admin/config/reload``: all or nothing, and what it says of both."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from supervisor.config import ConfigError
from supervisor.gateway.app import application, create_gateway
from supervisor.gateway.endpoint import Gateway
from supervisor.metrics import Metrics
from supervisor.presets import Preset
from supervisor.settings import Settings
from tests.support.fake_fleet import FakeFleet

BODY = {"model": "fast", "messages": [{"role": "user", "content": "Hi"}]}


class Source:
    """The settings as they would be read now; None: they cannot be."""

    def __init__(self, settings: Settings) -> None:
        self.settings: Settings | None = settings

    def set(self, **more: Any) -> None:
        assert self.settings is not None
        self.settings = msgspec.structs.replace(self.settings, **more)

    def read(self) -> Settings:
        if self.settings is None:
            raise ConfigError("config.toml: unknown key 'prot'")
        return self.settings


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(Settings(home=tmp_path, admin_key="boss"))


@pytest.fixture
def gateway(fleet: FakeFleet, source: Source, metrics: Metrics) -> Gateway:
    return create_gateway(fleet, source.read(), metrics, source.read)


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(application(gateway))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://127.0.0.1:8000", headers={"x-admin-key": "boss"}
    ) as client:
        yield client


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


async def reload(client: httpx.AsyncClient) -> httpx.Response:
    return await client.post("/admin/config/reload")


async def test_nothing_new_changes_nothing(client: httpx.AsyncClient) -> None:
    answer = await reload(client)
    assert answer.json() == {"success": True, "changed": [], "applied": [], "needs_restart": []}


async def test_new_names_are_there_at_once(
    client: httpx.AsyncClient, source: Source, fleet: FakeFleet
) -> None:
    assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 404
    source.set(aliases={"fast": "m"}, presets={"p": Preset(model="m")})
    told = (await reload(client)).json()
    assert told["applied"] == ["aliases", "presets"]
    assert told["changed"][0] == {"name": "aliases", "before": {}, "after": {"fast": "m"}}
    assert (await client.post("/v1/chat/completions", json=BODY)).json()["model"] == "m"
    assert (await client.get("/admin/presets")).json()["count"] == 1
    assert fleet.adopted is not None
    assert fleet.adopted.aliases == {"fast": "m"}


async def test_what_needs_a_restart_says_so_and_waits(
    client: httpx.AsyncClient, source: Source, gateway: Gateway
) -> None:
    source.set(port=9, max_body_bytes=10, load_on_demand=True)
    for _ in range(2):
        told = (await reload(client)).json()
        assert told["needs_restart"] == ["port", "max_body_bytes"]
    assert told["applied"] == []
    assert gateway.settings.load_on_demand
    assert gateway.settings.port == 8000
    body = {**BODY, "model": "m"}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200


async def test_settings_that_cannot_be_read_change_nothing(
    client: httpx.AsyncClient, source: Source, gateway: Gateway, fleet: FakeFleet
) -> None:
    before = gateway.settings, gateway.names
    source.settings = None
    answer = await reload(client)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_value")
    assert error["message"] == "config.toml: unknown key 'prot'"
    assert (gateway.settings, gateway.names) == before
    assert fleet.adopted is None


async def test_a_rotated_key_holds_from_now_on(client: httpx.AsyncClient, source: Source) -> None:
    source.set(admin_key="chief", api_key="user")
    told = await reload(client)
    assert "chief" not in told.text
    assert (await reload(client)).status_code == 403
    chief = {"x-admin-key": "chief"}
    assert (await client.post("/admin/config/reload", headers=chief)).status_code == 200
    assert (await client.get("/v1/models")).status_code == 401
    user = {"authorization": "Bearer user"}
    assert (await client.get("/v1/models", headers=user)).status_code == 200


@pytest.mark.parametrize("more", [{"admin_key": None}, {"api_key": None}])
async def test_a_server_on_the_network_keeps_its_keys(
    fleet: FakeFleet, tmp_path: Path, more: dict[str, Any]
) -> None:
    source = Source(Settings(home=tmp_path, host="0.0.0.0", admin_key="boss", api_key="user"))
    gateway = create_gateway(fleet, source.read(), Metrics(), source.read)
    transport = httpx.ASGITransport(application(gateway))
    boss = {"x-admin-key": "boss"}
    # Neither does it count that another address, or doing without, is asked for: that is later.
    for also in ({}, {"host": "127.0.0.1"}, {"allow_unauthenticated": True}):
        source.set(**more, **also)
        async with httpx.AsyncClient(transport=transport, base_url="http://box:8000") as client:
            answer = await client.post("/admin/config/reload", headers=boss)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
        assert "reachable from outside" in answer.json()["error"]["message"]
    assert (gateway.settings.admin_key, gateway.settings.api_key) == ("boss", "user")


async def test_the_next_start_would_have_to_work(client: httpx.AsyncClient, source: Source) -> None:
    source.set(host="0.0.0.0")
    answer = await reload(client)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")


async def test_the_log_level_changes(client: httpx.AsyncClient, source: Source) -> None:
    source.set(log_level="error")
    assert (await reload(client)).json()["applied"] == ["log_level"]
    assert logging.getLogger().level == logging.ERROR


async def test_only_operators_reload(client: httpx.AsyncClient) -> None:
    answer = await client.post("/admin/config/reload", headers={"x-admin-key": "nobody"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "invalid_admin_key")


async def test_a_reload_is_an_event_with_names_and_no_values(
    client: httpx.AsyncClient, source: Source, fleet: FakeFleet
) -> None:
    source.set(api_key="a-new-key", port=9000)
    assert (await reload(client)).status_code == 200
    event = msgspec.json.decode(fleet.journal.at(0).data)
    assert (event["event"], event["changed"]) == ("config_reloaded", ["port", "api_key"])
    assert event["needs_restart"] == ["port"]
    assert b"a-new-key" not in fleet.journal.at(0).data
    source.settings = None
    assert (await reload(client)).status_code == 400
    event = msgspec.json.decode(fleet.journal.at(1).data)
    assert (event["event"], event["message"]) == (
        *("config_refused", "config.toml: unknown key 'prot'"),
    )

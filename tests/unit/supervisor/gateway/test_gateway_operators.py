"""Operators who call a model what its clients call it."""

from __future__ import annotations

import httpx
import pytest
from starlette.types import ASGIApp

from supervisor.presets import Preset
from tests.support.asgi import MakeApp
from tests.support.fake_fleet import FakeFleet, view

ALIASES = {
    "fast": "m",
    "best": ("org/big", "m", "gone"),
    "lost": ("gone", "away"),
    "any": ("org/big", "auto"),
}


@pytest.fixture
def app(make_app: MakeApp) -> ASGIApp:
    return make_app(aliases=ALIASES, presets={"coder": Preset(model="org/big")})


async def unload(client: httpx.AsyncClient, name: str) -> httpx.Response:
    return await client.post("/admin/models/unload", json={"model_id": name})


async def release(client: httpx.AsyncClient, name: str) -> httpx.Response:
    return await client.post(f"/admin/models/{name}/release")


async def look(client: httpx.AsyncClient, name: str) -> httpx.Response:
    return await client.get(f"/admin/models/{name}")


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize(
    ("name", "model"),
    [("fast", "m"), ("coder", "org/big"), ("preset:coder", "org/big"), ("org/big", "org/big")],
)
async def test_an_alias_or_a_preset_is_its_model(
    client: httpx.AsyncClient, fleet: FakeFleet, name: str, model: str
) -> None:
    fleet.add(view("org/big", "quarantined"))
    fleet.add(view("m", "quarantined"))
    assert (await look(client, name)).json()["id"] == model
    assert (await release(client, name)).json()["model_id"] == model
    fleet.add(view(model))
    assert (await unload(client, name)).json()["model_id"] == model
    assert model not in fleet.views


async def test_of_a_list_it_is_the_one_that_is_loaded(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    assert (await look(client, "best")).json()["id"] == "m"
    assert (await unload(client, "best")).json()["model_id"] == "m"
    assert fleet.views == {}


async def test_a_list_of_which_several_are_loaded_has_to_be_told_apart(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    fleet.add(view("org/big"))
    for answer in (
        await look(client, "best"),
        await unload(client, "best"),
        await release(client, "best"),
    ):
        assert code_of(answer) == (400, "model_ambiguous")
        error = answer.json()["error"]
        assert error["param"] == "model_id"
        assert "org/big and m:" in error["message"]
    assert set(fleet.views) == {"m", "org/big"}


async def test_a_release_is_for_the_one_that_is_quarantined(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    fleet.add(view("org/big", "quarantined"))
    assert (await release(client, "best")).json()["model_id"] == "org/big"
    assert set(fleet.views) == {"m"}


@pytest.mark.parametrize("name", ["auto", "any"])
async def test_whatever_model_there_is_is_none_for_an_operator(
    client: httpx.AsyncClient, fleet: FakeFleet, name: str
) -> None:
    assert code_of(await look(client, name)) == (400, "model_ambiguous")
    assert code_of(await unload(client, name)) == (400, "model_ambiguous")
    assert set(fleet.views) == {"m"}


async def test_what_is_not_loaded_is_not_found(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    for name in ("lost", "coder", "nobody"):
        for act in (look, unload, release):
            assert code_of(await act(client, name)) == (404, "model_not_found"), name
    assert "gone, away" in (await look(client, "lost")).json()["error"]["message"]


async def test_a_loaded_models_own_id_is_always_its_own(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    """One that was loaded before a reload gave its id to another."""
    fleet.add(view("fast"))
    assert (await unload(client, "fast")).json()["model_id"] == "fast"
    assert set(fleet.views) == {"m"}

"""One fake fleet with a routable model ``m``, and the application over it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp

from supervisor.gateway.app import create_app
from supervisor.metrics import Metrics
from supervisor.settings import Settings
from tests.support.asgi import MakeApp
from tests.support.fake_fleet import FakeFleet, view


@pytest.fixture
def fleet() -> FakeFleet:
    fleet = FakeFleet()
    fleet.add(view("m"))
    return fleet


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def make_app(fleet: FakeFleet, metrics: Metrics, tmp_path: Path) -> MakeApp:
    def make(**settings: object) -> ASGIApp:
        return create_app(fleet, Settings(home=tmp_path, **settings), metrics)  # type: ignore[arg-type]

    return make


@pytest.fixture
def app(make_app: MakeApp) -> ASGIApp:
    return make_app()


@pytest.fixture
async def client(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        yield client

"""A cell of a real backend: it is convicted who crashes it, and the model is not disturbed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.server import Server, polls, serve
from tests.support.tiny_gguf import write_tiny_gguf

SETTINGS = {"OPTA_LMX_WARM_SPARES": "2", "OPTA_LMX_RESTART_DELAY_CAP_S": "0.05"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_gguf(folder / "long.gguf", context_length=65536)
    with serve(
        tmp_path_factory.mktemp("cells") / "home", "--models-dir", str(folder), **SETTINGS
    ) as running:
        yield running


def ask(server: Server, words: int) -> dict[str, Any]:
    answer = server.chat("long", words * "word ", max_tokens=3, temperature=0)
    return {"status": answer.status_code, **answer.json()}


def isolating(server: Server) -> dict[str, Any] | None:
    view: dict[str, Any] | None = server.model("long")["isolating"]
    return view


def test_a_prompt_that_takes_long_holds_nobody_up_and_is_convicted(server: Server) -> None:
    assert server.load("long", context_length=65536).status_code == 200
    for _ in polls():
        spares = server.http.get("/admin/models").json()["spares"]
        if [spare["ready"] for spare in spares] == [True, True]:
            break
    with ThreadPoolExecutor(4) as pool:
        before = ask(server, 5)
        slow = pool.submit(ask, server, 5000)
        for _ in polls():
            if server.model("long")["in_flight"]:
                break
        server.kill_worker("long", signal.SIGSEGV)
        view = server.await_state("long", "routable", generation=2)
        new = pool.submit(ask, server, 5)
        answer = new.result(60)
        assert answer["status"] == 200, answer
        assert answer["choices"] == before["choices"]
        cell = isolating(server)
        assert cell is not None, server.text
        assert (cell["suspects"], cell["pid"] in (None, view["pid"])) == (1, False)
        os.kill(cell["pid"], signal.SIGSEGV)
        assert slow.result(60)["error"]["code"] == "request_poisoned"
    after = server.model("long")
    assert (after["pid"], after["generation"]) == (view["pid"], 2)
    assert after["readiness"]["crash_count"] == 2
    for _ in polls(10):
        if isolating(server) is None:
            break
    assert isolating(server) is None
    again = ask(server, 5000)
    assert (again["status"], again["error"]["code"]) == (422, "request_poisoned")

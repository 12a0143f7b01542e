"""A cell of a real backend: it is convicted who crashes it, and the model is not disturbed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server, await_gone, polls, serve
from tests.support.tiny_gguf import write_tiny_gguf

SETTINGS = {"OPTA_LMX_WARM_SPARES": "2", "OPTA_LMX_RESTART_DELAY_CAP_S": "0.05"}


@contextmanager
def serving(tmp_path: Path, *, threshold: int) -> Iterator[Server]:
    """A server with two spare workers, and a model whose context is long."""
    folder = tmp_path / "models"
    folder.mkdir()
    write_tiny_gguf(folder / "long.gguf", context_length=65536)
    settings = {**SETTINGS, "OPTA_LMX_FAILURE_THRESHOLD": str(threshold)}
    with serve(tmp_path / "home", "--models-dir", str(folder), **settings) as server:
        assert server.load("long", context_length=65536).status_code == 200
        for _ in polls():
            spares = server.http.get("/admin/models").json()["spares"]
            if [spare["ready"] for spare in spares] == [True, True]:
                break
        yield server


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def ask(server: Server, words: int) -> dict[str, Any]:
    answer = server.chat("long", words * "word ", max_tokens=3, temperature=0)
    return {"status": answer.status_code, **answer.json()}


def isolating(server: Server) -> dict[str, Any] | None:
    view: dict[str, Any] | None = server.model("long")["isolating"]
    return view


def crash_in_prefill(server: Server, pool: ThreadPoolExecutor) -> Future[dict[str, Any]]:
    """A prompt that takes seconds was in flight when the model crashed."""
    slow = pool.submit(ask, server, 5000)
    for _ in polls():
        if server.model("long")["in_flight"]:
            break
    server.kill_worker("long", signal.SIGSEGV)
    server.await_state("long", "routable", generation=2)
    return slow


def test_a_prompt_that_takes_long_holds_nobody_up_and_is_convicted(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    with serving(tmp_path, threshold=3) as server:
        before = ask(server, 5)
        slow = crash_in_prefill(server, pool)
        view = server.model("long")
        answer = pool.submit(ask, server, 5).result(60)
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


def test_a_crash_of_the_cell_that_reaches_the_threshold_ends_everything(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    with serving(tmp_path, threshold=2) as server:
        slow = crash_in_prefill(server, pool)
        other = pool.submit(ask, server, 5001)
        server.await_text("a cell is open")
        cell, view = isolating(server), server.model("long")
        assert cell is not None
        os.kill(cell["pid"], signal.SIGSEGV)
        assert slow.result(60)["error"]["code"] == "request_poisoned"
        assert other.result(60)["error"]["code"] == "model_unstable"
        await_gone([cell["pid"], view["pid"]])
        after = server.await_state("long", "quarantined")
        assert (after["isolating"], after["in_flight"], after["queued"]) == (None, 0, 0)
        assert after["readiness"]["crash_count"] == 2

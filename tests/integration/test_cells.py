"""Suspects run in a cell of their own, and whoever is new goes on beside them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server, await_gone, polls, serve, write_script

COUNTING = [f"{number} " for number in range(20)]
SETTINGS = {
    "OPTA_LMX_WARM_SPARES": "2",
    "OPTA_LMX_RESTART_DELAY_CAP_S": "0.05",
    "OPTA_LMX_FAILURE_THRESHOLD": "10",
    # Who comes while the model is restarted waits, as some of those that are sent at once may.
    "OPTA_LMX_LOAD_ON_DEMAND": "true",
}
POISON = {"at": "token", "kind": "segfault", "n": 3, "prompt_contains": "poison"}
#: 0.5 ms for a byte of the prompt, and a token in 10 ms.
SLOW = {"prefill_chunk": 100, "prefill_delay_s": 0.05, "step_delay_s": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("cells") / "home"
    arguments = ("--models-dir", str(folder), "--max-sequences", "8")
    with serve(home, *arguments, **SETTINGS) as running:
        yield running


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(12) as pool:
        yield pool


class Crowd:
    """Requests to one model; ``ended`` are their prompts, in the order of their ends."""

    def __init__(self, server: Server, model: str, pool: ThreadPoolExecutor) -> None:
        self.server, self.model, self._pool = server, model, pool
        #: What makes a prompt long.
        self.padding = 1600 * "x"
        self._lock = threading.Lock()
        self.ended: list[str] = []
        self._answers: dict[str, Future[dict[str, Any]]] = {}

    def send(self, content: str) -> None:
        self._answers[content] = self._pool.submit(self.ask, content)

    def ask(self, content: str) -> dict[str, Any]:
        """Of ``new`` the prompt and the answer are short."""
        is_new = content == "new"
        prompt = content if is_new else content + self.padding
        answer = self.server.chat(self.model, prompt, max_tokens=5 if is_new else len(COUNTING))
        with self._lock:
            self.ended.append(content)
        return {"status": answer.status_code, **answer.json()}

    def answer(self, content: str) -> dict[str, Any]:
        return self._answers[content].result(60)

    def text(self, content: str) -> str:
        answer = self.answer(content)
        assert answer["status"] == 200, answer
        text: str = answer["choices"][0]["message"]["content"]
        return text

    def view(self) -> dict[str, Any]:
        return self.server.model(self.model)

    def await_in_flight(self, count: int) -> None:
        for _ in polls():
            if self.view()["in_flight"] == count:
                return
        raise AssertionError(self.view())

    def kill(self) -> None:
        """As it would crash by itself, and wait until it takes traffic again."""
        generation = self.view()["generation"]
        self.server.kill_worker(self.model, 11)
        self.server.await_state(self.model, "routable", generation=generation + 1)

    def await_cell(self) -> dict[str, Any]:
        """Poll until suspects run in a cell."""
        self.server.await_text(f"{self.model}: a cell is open")
        view: dict[str, Any] = self.view()["isolating"]
        return view

    def await_no_isolation(self) -> None:
        for _ in polls(10):
            if self.view()["isolating"] is None:
                return
        raise AssertionError(f"{self.view()}\n{self.server.text}")


@pytest.fixture
def crowd(
    server: Server, folder: Path, pool: ThreadPoolExecutor, request: pytest.FixtureRequest
) -> Iterator[Crowd]:
    """At a slow model that is loaded, with two spare workers.."""
    name = request.node.name.replace("test_", "")
    write_script(folder, name, tokens=COUNTING, **SLOW, faults=[POISON])
    assert server.load(name).status_code == 200
    await_spares(server)
    yield Crowd(server, name, pool)
    server.http.post("/admin/models/unload", json={"model_id": name, "drain_timeout_sec": 0})


def await_spares(server: Server) -> None:
    found = []
    for _ in polls():
        found = server.http.get("/admin/models").json()["spares"]
        if [spare["ready"] for spare in found] == [True, True]:
            return
    raise AssertionError(f"there are no spare workers: {found}\n{server.text}")


def test_who_is_new_is_answered_before_the_suspects_are_through(crowd: Crowd) -> None:
    server, crowd.padding = crowd.server, 900 * "x"
    for number in range(3):
        crowd.send(f"good {number}")
    # So that it is not the oldest.
    crowd.await_in_flight(3)
    for name in ("poison", *(f"good {number}" for number in range(3, 7))):
        crowd.send(name)
    crowd.await_in_flight(8)
    server.await_state(crowd.model, "routable", generation=2)
    crowd.send("new")
    assert crowd.text("new") == "".join(COUNTING[:5])
    # In a cell of their own there still are some, and nobody else has been answered.
    view = crowd.view()
    assert view["isolating"]["suspects"] > 0
    assert crowd.ended == ["new"]
    server.await_text(f"{crowd.model}: a cell is open")
    assert (view["generation"], view["readiness"]["crash_count"]) == (2, 1)

    bad = crowd.answer("poison")
    assert (bad["status"], bad["error"]["code"]) == (422, "request_poisoned")
    for number in range(7):
        assert crowd.text(f"good {number}") == "".join(COUNTING)
    newest, first = server.http.get(f"/admin/incidents?model={crowd.model}").json()["incidents"]
    assert newest["id"] == bad["error"]["incident_id"]
    assert first["convicted"] is None
    crowd.await_no_isolation()
    details = server.http.get(f"/admin/incidents/{newest['id']}").json()
    assert details["in_flight"] == [details["convicted"]]
    assert (details["generation"], details["signal"]) == (0, "SIGSEGV")
    # The model's own worker was never disturbed by that.
    after = crowd.view()
    assert (after["generation"], after["pid"]) == (2, view["pid"])
    assert (after["readiness"]["state"], after["readiness"]["crash_count"]) == ("routable", 2)
    again = crowd.ask("poison")
    assert (again["status"], again["error"]["code"]) == (422, "request_poisoned")
    assert crowd.view()["readiness"]["crash_count"] == 2
    await_spares(server)
    assert len(server.workers()) == 3
    assert "killed by SIGSEGV; in flight: 8 " in server.text


def test_an_unload_ends_the_cell_as_well(crowd: Crowd) -> None:
    crowd.send("a")
    crowd.send("b")
    crowd.await_in_flight(2)
    crowd.kill()
    crowd.send("c")
    cell = crowd.await_cell()
    pids = [cell["pid"], crowd.view()["pid"]]
    body = {"model_id": crowd.model, "drain_timeout_sec": 0}
    assert crowd.server.http.post("/admin/models/unload", json=body).status_code == 200
    await_gone(pids, timeout_s=0.1)
    for content in ("a", "b", "c"):
        assert crowd.answer(content)["error"]["code"] == "model_unloaded"


def test_a_suspect_in_the_cell_can_be_given_up(crowd: Crowd) -> None:
    leaving = crowd.server.stream(crowd.model, "leaving" + crowd.padding)
    next(leaving)
    crowd.kill()
    crowd.send("new")
    cell = crowd.await_cell()
    assert cell["suspects"] == 1
    leaving.close()  # type: ignore[attr-defined]
    crowd.await_no_isolation()
    await_gone([cell["pid"]])
    assert crowd.text("new") == "".join(COUNTING[:5])
    crowd.server.await_text("is closed: no suspect is left in it")
    view = crowd.view()
    assert (view["in_flight"], view["queued"], view["readiness"]["crash_count"]) == (0, 0, 1)


def test_a_cell_that_cannot_be_loaded_changes_nothing(crowd: Crowd, folder: Path) -> None:
    crowd.send("a")
    crowd.send("b")
    crowd.await_in_flight(2)
    crowd.kill()
    script = folder / f"{crowd.model}.sim.json"
    fault = {"at": "load", "kind": "segfault"}
    script.write_text(json.dumps({**json.loads(script.read_text()), "faults": [fault]}))
    crowd.send("new")
    crowd.server.await_text(f"{crowd.model}: no cell for its suspects: killed by SIGSEGV")
    for content in ("a", "b"):
        assert crowd.text(content) == "".join(COUNTING)
    assert crowd.text("new") == "".join(COUNTING[:5])
    view = crowd.view()
    assert (view["generation"], view["readiness"]["crash_count"]) == (2, 1)
    assert view["isolating"] is None
    assert f"{crowd.model}: a cell is open" not in crowd.server.text

"""Suspects run in a cell of their own, and whoever is new goes on beside them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server, await_gone, polls, serve, write_script

COUNTING = [f"{number} " for number in range(60)]
SETTINGS = {
    "OPTA_LMX_WARM_SPARES": "2",
    "OPTA_LMX_RESTART_DELAY_CAP_S": "0.05",
    "OPTA_LMX_FAILURE_THRESHOLD": "10",
}
POISON = {"at": "token", "kind": "segfault", "n": 3, "prompt_contains": "poison"}
#: A second until its first token, of which there is one in 10 ms.
SLOW = {"prefill_chunk": 100, "prefill_delay_s": 0.05, "step_delay_s": 0.01}
LONG = 2000 * "x"


@contextmanager
def serving(tmp_path: Path, *faults: dict[str, Any], **settings: str) -> Iterator[Server]:
    """A server with a loaded, slow model and two spare workers."""
    folder = tmp_path / "models"
    folder.mkdir()
    write_script(folder, "model", tokens=COUNTING, **SLOW, faults=list(faults))
    arguments = ("--models-dir", str(folder), "--max-sequences", "8")
    with serve(tmp_path / "home", *arguments, **{**SETTINGS, **settings}) as server:
        assert server.load("model").status_code == 200
        await_spares(server)
        yield server


def await_spares(server: Server) -> None:
    for _ in polls():
        found = server.http.get("/admin/models").json()["spares"]
        if [spare["ready"] for spare in found] == [True, True]:
            return
    raise AssertionError(f"there are no spare workers: {found}\n{server.text}")


def ask(server: Server, content: str, max_tokens: int = 60) -> dict[str, Any]:
    answer = server.chat("model", content, max_tokens=max_tokens)
    return {"status": answer.status_code, **answer.json()}


def text_of(answer: dict[str, Any]) -> str:
    assert answer["status"] == 200, answer
    text: str = answer["choices"][0]["message"]["content"]
    return text


def await_cell(server: Server) -> dict[str, Any]:
    """Poll until suspects run in a cell."""
    server.await_text("a cell is open")
    for _ in polls(10):
        view = server.model("model")["isolating"]
        if view is not None and view["pid"] is not None:
            found: dict[str, Any] = view
            return found
    raise AssertionError(server.text)


def incidents(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.http.get("/admin/incidents").json()["incidents"]
    return found


class Crowd:
    """Requests under way; ``ended`` are their prompts, in the order of their ends."""

    def __init__(self, server: Server, pool: ThreadPoolExecutor) -> None:
        self._server, self._pool = server, pool
        self._lock = threading.Lock()
        self.ended: list[str] = []
        self.answers: dict[str, Future[dict[str, Any]]] = {}

    def send(self, content: str, max_tokens: int = 60) -> None:
        self.answers[content] = self._pool.submit(self._ask, content, max_tokens)

    def _ask(self, content: str, max_tokens: int) -> dict[str, Any]:
        prompt = content if content == "new" else content + LONG
        answer = ask(self._server, prompt, max_tokens)
        with self._lock:
            self.ended.append(content)
        return answer

    def answer(self, content: str) -> dict[str, Any]:
        return self.answers[content].result(60)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(12) as pool:
        yield pool


def crash_with_seven_others(server: Server, pool: ThreadPoolExecutor) -> Crowd:
    """The model has been killed by one of eight requests, and takes traffic again."""
    crowd = Crowd(server, pool)
    for number in range(7):
        if number == 3:
            crowd.send("poison")
        crowd.send(f"good {number}")
    server.await_state("model", "routable", generation=2)
    return crowd


def test_who_is_new_is_answered_before_the_suspects_are_through(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    with serving(tmp_path, POISON) as server:
        crowd = crash_with_seven_others(server, pool)
        crowd.send("new", max_tokens=5)
        assert text_of(crowd.answer("new")) == "".join(COUNTING[:5])
        # In a cell of their own there still are some, and nobody else has been answered.
        view = server.model("model")
        assert view["isolating"]["suspects"] > 0
        assert view["isolating"]["pid"] not in (None, view["pid"])
        assert crowd.ended == ["new"]
        assert (view["generation"], view["readiness"]["crash_count"]) == (2, 1)

        bad = crowd.answer("poison")
        assert (bad["status"], bad["error"]["code"]) == (422, "request_poisoned")
        for number in range(7):
            assert text_of(crowd.answer(f"good {number}")) == "".join(COUNTING)
        newest, first = incidents(server)
        assert newest["id"] == bad["error"]["incident_id"]
        assert (newest["convicted"] is None, first["convicted"]) == (False, None)
        assert (newest["generation"], newest["signal"]) == (0, "SIGSEGV")
        details = server.http.get(f"/admin/incidents/{newest['id']}").json()
        assert details["in_flight"] == [details["convicted"]]
        # The model's own worker has never been disturbed by that.
        after = server.model("model")
        assert (after["generation"], after["pid"]) == (2, view["pid"])
        assert after["readiness"]["crash_count"] == 2
        assert after["readiness"]["state"] == "routable"
        again = ask(server, "poison" + LONG)
        assert (again["status"], again["error"]["code"]) == (422, "request_poisoned")
        assert server.model("model")["readiness"]["crash_count"] == 2
        await_no_isolation(server)
        await_spares(server)
        assert len(server.workers()) == 3
        assert "go on where they were" in server.text


def await_no_isolation(server: Server) -> None:
    for _ in polls(10):
        if server.model("model")["isolating"] is None:
            return
    raise AssertionError(f"{server.model('model')}\n{server.text}")


def kill_with_two_in_flight(server: Server, pool: ThreadPoolExecutor) -> Crowd:
    """Two innocent suspects, and one who waits for them."""
    crowd = Crowd(server, pool)
    crowd.send("a")
    crowd.send("b")
    for _ in polls():
        if server.model("model")["in_flight"] == 2:
            break
    server.kill_worker("model", 11)
    server.await_state("model", "routable", generation=2)
    crowd.send("new")
    return crowd


def test_an_unload_ends_the_cell_as_well(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    with serving(tmp_path) as server:
        crowd = kill_with_two_in_flight(server, pool)
        cell = await_cell(server)
        pids = [cell["pid"], server.model("model")["pid"]]
        body = {"model_id": "model", "drain_timeout_sec": 0}
        assert server.http.post("/admin/models/unload", json=body).status_code == 200
        await_gone(pids, timeout_s=0.5)
        for content in ("a", "b", "new"):
            assert crowd.answer(content)["error"]["code"] == "model_unloaded"


def test_a_suspect_in_the_cell_can_be_given_up(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    with serving(tmp_path) as server:
        leaving = server.stream("model", "leaving" + LONG, max_tokens=60)
        next(leaving)
        server.kill_worker("model", 11)
        server.await_state("model", "routable", generation=2)
        crowd = Crowd(server, pool)
        crowd.send("new", max_tokens=5)
        cell = await_cell(server)
        assert cell["suspects"] == 1
        leaving.close()  # type: ignore[attr-defined]
        await_no_isolation(server)
        await_gone([cell["pid"]])
        assert text_of(crowd.answer("new")) == "".join(COUNTING[:5])
        server.await_text("is closed: no suspect is left in it")
        view = server.model("model")
        assert (view["in_flight"], view["queued"], view["readiness"]["crash_count"]) == (0, 0, 1)


def test_a_cell_that_does_not_pass_its_canary_changes_nothing(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    # The third load is that of the cell.
    folder = tmp_path / "models"
    faults = [
        {"at": "load", "kind": "mark", "times": 2},
        {"at": "load", "kind": "segfault", "times": 1},
    ]
    with serving(tmp_path) as server:
        script = folder / "model.sim.json"
        crowd = Crowd(server, pool)
        crowd.send("a")
        crowd.send("b")
        for _ in polls():
            if server.model("model")["in_flight"] == 2:
                break
        server.kill_worker("model", 11)
        server.await_state("model", "routable", generation=2)
        content = json.loads(script.read_text())
        script.write_text(json.dumps({**content, "faults": [faults[1]]}))
        crowd.send("new")
        server.await_text("no cell for its suspects: killed by SIGSEGV")
        for content in ("a", "b", "new"):
            assert text_of(crowd.answer(content)) == "".join(COUNTING)
        view = server.model("model")
        assert (view["generation"], view["readiness"]["crash_count"]) == (2, 1)
        assert view["isolating"] is None
        assert "a cell is open" not in server.text

"""``GET /admin/events`` and ``opta-lmx events`` of a real server."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import Server, serve, write_script

FAST = {"OPTA_LMX_RESTART_DELAY_CAP_S": "0.1", "OPTA_LMX_FAILURE_THRESHOLD": "2"}


class Follower:
    """Follows a server's events on a connection of its own, until that ends."""

    def __init__(self, url: str, query: str = "", headers: dict[str, str] | None = None) -> None:
        self._url = f"{url}/admin/events?{query}"
        self._headers = headers or {}
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.seen: list[dict[str, Any]] = []
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self.wait("hello")

    def _read(self) -> None:
        event: dict[str, str] = {}
        with httpx.stream("GET", self._url, headers=self._headers, timeout=30) as answer:
            for line in answer.iter_lines():
                if line.startswith(":"):
                    continue
                if line:
                    name, _, value = line.partition(": ")
                    event[name] = value
                elif event:
                    self._events.put({"id": event.get("id"), **json.loads(event["data"])})
                    event = {}
        self.ended.set()

    def wait(self, kind: str, **fields: object) -> dict[str, Any]:
        """The next event of this kind with these fields, whatever comes before it."""
        while True:
            try:
                event = self._events.get(timeout=20)
            except queue.Empty:
                raise AssertionError(f"no {kind} {fields} after {self.seen}") from None
            self.seen.append(event)
            if event["event"] == kind and all(event[each] == fields[each] for each in fields):
                return event

    def wait_state(self, model: str, state: str | None) -> dict[str, Any]:
        while True:
            event = self.wait("model_changed", model=model)
            if (event["readiness"] or {"state": None})["state"] == state:
                return event


@contextmanager
def server_with(home: Path, folder: Path, **environment: str) -> Iterator[Server]:
    with serve(home, "--models-dir", str(folder), **{**FAST, **environment}) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_script(folder, "talker", tokens=["Hel", "lo"])
    fault = {"at": "prompt", "kind": "segfault", "prompt_contains": "poison"}
    write_script(folder, "fragile", tokens=["Hel", "lo"], faults=[fault])
    return folder


def test_a_models_life_is_told_from_its_load_to_its_quarantine(
    tmp_path: Path, folder: Path
) -> None:
    with server_with(tmp_path / "home", folder) as server:
        follower = Follower(server.url)
        only = Follower(server.url, "kind=incident_opened")
        assert server.load("talker").status_code == 200
        changes = [follower.wait_state("talker", "admitted")]
        for state in ("loading", "canary_pending", "routable"):
            changes.append(follower.wait_state("talker", state))
        assert changes[0]["was"] is None
        assert [change["was"] for change in changes[1:]] == [
            *("admitted", "loading", "canary_pending"),
        ]
        assert changes[-1]["generation"] == 1
        server.kill_worker("talker")
        incident = follower.wait("incident_opened", model="talker")
        told = server.http.get(f"/admin/incidents/{incident['incident_id']}").json()
        assert (told["kind"], told["reason"]) == (incident["kind"], incident["reason"])
        failed = follower.wait_state("talker", "loading")
        assert failed["readiness"]["crash_count"] == 1
        assert failed["reason"] == incident["reason"]
        assert follower.wait("worker_restarting", model="talker")["generation"] == 1
        assert follower.wait_state("talker", "routable")["generation"] == 2
        server.kill_worker("talker")
        assert follower.wait("incident_opened", model="talker")["quarantined"] is True
        assert follower.wait_state("talker", "quarantined")["readiness"]["crash_count"] == 2
        assert server.load("talker").status_code == 409
        assert follower.wait("load_refused", model="talker")["code"] == "model_unstable"
        released = server.http.post("/admin/models/talker/release")
        assert released.status_code == 200
        follower.wait_state("talker", None)
        assert server.load("nothing/here", path="/nowhere.gguf").status_code == 404
        assert follower.wait("load_refused")["code"] == "model_not_found"
        assert server.http.post("/admin/config/reload").status_code == 200
        assert follower.wait("config_reloaded") == {
            **follower.seen[-1],
            "changed": [],
            "needs_restart": [],
        }
        # Filtered by the server, and in the same order.
        for _ in range(2):
            only.wait("incident_opened")
        assert [event["event"] for event in only.seen] == ["hello", *2 * ["incident_opened"]]
        # Nobody has missed anything: the numbers have no gap.
        numbers = [int(event["id"].split("-")[1]) for event in follower.seen]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        # The end of the server is not held up by those who follow, and they are told.
        began = time.monotonic()
        os.kill(server.process.pid, signal.SIGTERM)
        follower.wait("server_stopping")
        assert server.process.wait(30) == 0
        assert time.monotonic() - began < 5
        assert follower.ended.wait(10)
    with server_with(tmp_path / "home", folder) as server:
        last = follower.seen[-1]["id"]
        again = Follower(server.url, headers={"Last-Event-ID": last})
        assert again.seen[0]["missing"] == "restarted"
        assert again.wait("server_started")["pid"] == server.process.pid


def test_a_conviction_is_told_without_the_prompt_and_without_the_keys(
    tmp_path: Path, folder: Path
) -> None:
    keys = {"OPTA_LMX_ADMIN_KEY": "the-admin-key", "OPTA_LMX_API_KEY": "the-api-key"}
    with server_with(tmp_path / "home", folder, **keys, OPTA_LMX_FAILURE_THRESHOLD="9") as server:
        headers = {"x-admin-key": "the-admin-key"}
        assert httpx.get(f"{server.url}/admin/events").status_code == 403
        follower = Follower(server.url, headers=headers)
        server.http.headers.update({**headers, "x-api-key": "the-api-key"})
        assert server.load("fragile").status_code == 200
        assert server.chat("fragile", "my private poison").status_code == 422
        convicted = follower.wait("request_convicted", model="fragile")
        opened = [event for event in follower.seen if event["event"] == "incident_opened"]
        assert len(opened) == 2
        assert convicted["incident_id"] == opened[-1]["incident_id"]
        follower.wait_state("fragile", "routable")
        told = json.dumps(follower.seen)
        for secret in ("private", "the-admin-key", "the-api-key"):
            assert secret not in told


def test_the_command_goes_on_when_the_server_is_back(tmp_path: Path, folder: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "supervisor.cli", "events"]
    url = f"http://127.0.0.1:{port}"
    home, arguments = tmp_path / "home", ("--models-dir", str(folder), "--port", port)
    with serve(home, *arguments, **FAST) as server:
        watching = subprocess.Popen(
            [*command, "--url", url, "--history"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said: queue.Queue[str] = queue.Queue()
        assert watching.stdout is not None
        lines = watching.stdout

        def read() -> None:
            for text in lines:
                said.put(text)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()

        def wait(part: str) -> str:
            while part not in (text := said.get(timeout=20)):
                pass
            return text

        wait("started, pid")
        assert server.load("talker").status_code == 200
        assert "talker: canary_pending -> routable" in wait("-> routable")
    wait("server stopping")
    wait("waiting for the server")
    try:
        with serve(home, *arguments, **FAST) as server:
            wait("started anew")
            wait(f"started, pid {server.process.pid}")
            assert server.load("talker").status_code == 200
            wait("-> routable")
            watching.send_signal(signal.SIGINT)
            assert watching.wait(20) == 130
    finally:
        watching.kill()
        watching.wait()
        reader.join(20)
        watching.stdout.close()

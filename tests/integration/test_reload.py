"""A running server gets new settings, and one whose terminal closes ends."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import TIMEOUT_S, Server, polls, serve, write_script

CONFIG = """
{more}
[aliases]
fast = "{target}"

[[models]]
path = "{folder}/configured.sim.json"
"""


class Operator:
    """Writes the file that the server reads."""

    def __init__(self, home: Path, folder: Path) -> None:
        self._file = home / "config.toml"
        self._folder = folder

    def write(self, target: str, more: str = "", models: str = "") -> None:
        text = CONFIG.format(target=target, folder=self._folder, more=more)
        self._file.write_text(f"{text}[[models]]\n{models}" if models else text)

    def spoil(self) -> None:
        self._file.write_text(self._file.read_text() + "\n[alises]\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("configured", "other"):
        write_script(folder, name, tokens=["Hel", "lo"])
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def operator(home: Path, folder: Path) -> Operator:
    operator = Operator(home, folder)
    operator.write("configured")
    return operator


@pytest.fixture(scope="module")
def server(home: Path, operator: Operator) -> Iterator[Server]:
    with serve(home) as running:
        running.await_state("configured", "routable")
        yield running


def reload(server: Server) -> dict[str, Any]:
    answer = server.http.post("/admin/config/reload")
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_a_reload_over_http_applies_what_it_can(
    server: Server, operator: Operator, folder: Path
) -> None:
    operator.write("configured")
    reload(server)
    pid = server.model("configured")["pid"]
    more = f"load_on_demand = true\nmax_body_bytes = 5\nmodels_dir = '{folder}'"
    operator.write("other", more)
    told = reload(server)
    assert told["applied"] == ["models_dir", "aliases", "load_on_demand"]
    assert told["needs_restart"] == ["max_body_bytes"]
    answer = server.chat("fast")
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "other"
    # What runs goes on running.
    assert server.model("configured")["pid"] == pid
    done = subprocess.run(
        [sys.executable, "-m", "supervisor.cli", "reload", "--url", server.url],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "max_body_bytes: 33554432 -> 5 (needs a restart)\n"


def test_sighup_reloads(server: Server, operator: Operator) -> None:
    operator.write("nobody")
    reload(server)
    assert server.chat("fast").status_code == 404
    operator.write("configured")
    server.process.send_signal(signal.SIGHUP)
    for _ in polls():
        if server.chat("fast").status_code == 200:
            break
    assert server.chat("fast").json()["model"] == "configured"
    assert server.process.poll() is None


def test_a_broken_file_changes_nothing(server: Server, operator: Operator) -> None:
    operator.write("configured")
    reload(server)
    operator.write("other", "load_on_demand = true")
    operator.spoil()
    answer = server.http.post("/admin/config/reload")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    assert "config.toml: unknown key 'alises'" in answer.json()["error"]["message"]
    server.process.send_signal(signal.SIGHUP)
    for _ in polls():
        if server.text.count("nothing has changed") >= 2:
            break
    assert server.text.count("unknown key 'alises'") == 2
    assert server.chat("fast").json()["model"] == "configured"
    told = server.http.get("/admin/presets").json()
    assert told["aliases"] == {"fast": "configured"}


def test_how_long_idle_models_stay_is_up_to_the_latest_settings(
    server: Server, operator: Operator
) -> None:
    assert server.model("configured")["readiness"]["state"] == "routable"
    operator.write("configured", "keep_alive_sec = 1")
    assert reload(server)["applied"] == ["keep_alive_sec"]
    for _ in polls(15):
        if server.http.get("/admin/models/configured").status_code == 404:
            break
    server.await_text("configured: unloaded, as it was idle")


def test_newly_configured_models_can_be_loaded(
    server: Server, operator: Operator, tmp_path: Path
) -> None:
    elsewhere = write_script(tmp_path, "elsewhere", tokens=["Hel", "lo"])
    operator.write("late", models=f"path = '{elsewhere}'\nid = 'late'\ncontext_length = 512")
    assert "models" in reload(server)["applied"]
    # A reload itself loads nothing.
    assert server.http.get("/admin/models/late").status_code == 404
    assert server.load("late").status_code == 200
    assert server.model("late")["context_length"] == 512
    assert server.chat("fast").json()["model"] == "late"


def test_a_server_ends_with_the_terminal_it_was_started_from(tmp_path: Path) -> None:
    master, slave = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "supervisor.cli", "serve"),
            *("--port", "0", "--home", str(tmp_path)),
        ],
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=take_terminal,
        pass_fds=[slave],
    )
    os.close(slave)
    server = Server(process)
    try:
        assert server.http.get("/healthz").status_code == 200
        # As long as the terminal is there it is an operator who asks for a reload.
        process.send_signal(signal.SIGHUP)
        server.await_text("configuration reloaded")
        assert process.poll() is None
        os.close(master)
        assert process.wait(TIMEOUT_S) == 0
    finally:
        process.kill()
        process.wait()
        server.close()

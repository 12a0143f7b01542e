"""``opta-lmx pull`` and what goes with it, with a server and without. The hub is on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from supervisor import modelfiles
from tests.support.hub import Hub, running
from tests.support.server import await_gone, polls, serve

KILLS = 3


@pytest.fixture(scope="module")
def hub(tiny_gguf: Path) -> Iterator[Hub]:
    with running() as hub:
        hub.add("org/big", {"big-Q8_0.gguf": os.urandom(3_000_000)})
        hub.add("org/tiny", {"tiny.gguf": tiny_gguf.read_bytes()})
        yield hub


@pytest.fixture(scope="module")
def nobody() -> Iterator[int]:
    """A port where no server is, nor comes to be."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def environment(hub: Hub, folder: Path, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "OPTA_LMX_HOME": str(folder / "home"),
        "OPTA_LMX_PORT": str(port),
        "OPTA_LMX_HUB_ENDPOINT": hub.url,
        "OPTA_LMX_HUB_CACHE_DIR": str(folder / "cache"),
        "OPTA_LMX_DOWNLOAD_DISK_RESERVE_BYTES": "0",
        "HF_HOME": str(folder / "hf"),
    }


def opta(
    *arguments: str, env: dict[str, str], stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "supervisor.cli", *arguments],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )


def run(*arguments: str, env: dict[str, str], stdin: int = subprocess.DEVNULL) -> tuple[int, str]:
    with opta(*arguments, env=env, stdin=stdin) as process:
        output, _ = process.communicate(timeout=60)
        return process.returncode, output


def test_a_pull_that_is_killed_three_times_fetches_each_byte_about_once(
    hub: Hub, tmp_path: Path, nobody: int
) -> None:
    name, size = "big-Q8_0.gguf", 3_000_000
    env = environment(hub, tmp_path, nobody)
    hub.bytes_per_s = 1_000_000
    cache = tmp_path / "cache"
    for kill in range(KILLS):
        process = opta("pull", "org/big", env=env)
        enough = size * (15 + 25 * kill) // 100
        for _ in polls(30, 0.01):
            if sum(path.stat().st_size for path in cache.glob("*/blobs/*.incomplete")) >= enough:
                break
            assert process.poll() is None, process.communicate()
        engines = [child.pid for child in psutil.Process(process.pid).children()]
        assert engines
        process.send_signal(signal.SIGKILL)
        process.communicate()
        # It dies with whoever started it.
        await_gone(engines)
        with pytest.raises(Exception, match="no model"):
            modelfiles.find("org/big:big-Q8_0", tmp_path, cache)
    hub.bytes_per_s = None
    status, output = run("pull", "org/big", env=env)
    assert (status, output.splitlines()[-1]) == (0, "org/big:big-Q8_0 is here, and verified")

    found = modelfiles.find("org/big:big-Q8_0", tmp_path, cache)
    assert found.read_bytes() == hub.repos["org/big"].files[name]
    assert len(hub.served[name]) == KILLS + 1
    # What was on its way at a kill comes again, no more: sockets hold some of it.
    assert hub.bytes_of(name) < size + KILLS * 400_000
    assert [begin for begin, _ in hub.served[name][1:]] == sorted(
        begin for begin, _ in hub.served[name][1:]
    )
    assert all(begin > 0 for begin, _ in hub.served[name][1:])
    assert not list(cache.glob("*/blobs/*.incomplete"))


def test_the_command_line_asks_before_its_server_downloads(hub: Hub, tmp_path: Path) -> None:
    env = environment(hub, tmp_path, 0)
    of_server = {name: env[name] for name in env if name.startswith("OPTA_LMX_HUB_")}
    with serve(tmp_path / "home", **of_server) as server:
        env |= {"OPTA_LMX_URL": server.url}
        status, output = run("load", "org/tiny", env=env)
        assert status == 1
        assert "is not on the server's disk: " in output
        assert "run it again with --yes" in output
        # On a terminal it asks.
        ours, theirs = os.openpty()
        os.write(ours, b"n\n")
        status, output = run("load", "org/tiny", env=env, stdin=theirs)
        os.close(ours)
        os.close(theirs)
        assert (status, "are free. Go on?" in output) == (1, True), output
        assert not hub.served["tiny.gguf"]

        status, output = run("load", "org/tiny", "--yes", env=env)
        assert (status, output.splitlines()[-1]) == (0, "org/tiny:tiny is routable"), output
        status, output = run("rm", "org/tiny", env=env)
        assert (status, "(model_conflict)" in output) == (1, True), output
        server.http.post("/admin/models/unload", json={"model_id": "org/tiny:tiny"})
        status, output = run("rm", "org/tiny", env=env)
        assert (status, output.startswith("org/tiny:tiny deleted, ")) == (0, True), output
        status, output = run("pull", "org/tiny", env=env)
        assert (status, output.splitlines()[-1]) == (0, "org/tiny:tiny is here, and verified")
        downloads = server.http.get("/admin/models/downloads").json()["downloads"]
        assert [(each["status"], each["load"]) for each in downloads] == [("done", False)]


def test_a_pull_that_cannot_be_says_why(hub: Hub, tmp_path: Path, nobody: int) -> None:
    env = environment(hub, tmp_path, nobody)
    status, output = run("pull", "org/absent", env=env)
    assert (status, "(model_not_found)" in output) == (1, True), output
    status, output = run(
        "pull", "org/tiny", env=env | {"OPTA_LMX_URL": f"http://127.0.0.1:{nobody}"}
    )
    assert (status, "no server at" in output) == (1, True), output

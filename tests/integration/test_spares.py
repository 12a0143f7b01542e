"""Workers that wait without a model: a restart takes one, and nobody is left behind."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server, await_gone, polls, serve, write_script
from tests.support.tiny_gguf import write_tiny_gguf

ON = {
    "OPTA_LMX_WARM_SPARES": "1",
    "OPTA_LMX_RESTART_DELAY_CAP_S": "0.05",
    "OPTA_LMX_FAILURE_THRESHOLD": "100",
}


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(tiny_gguf, folder / "tiny.gguf")
    write_tiny_gguf(folder / "endless.gguf", context_length=1_000_000)
    write_script(folder, "talker", tokens=["Hel", "lo"])
    return folder


@pytest.fixture
def server(tmp_path: Path, models_dir: Path) -> Iterator[Server]:
    with serve(
        tmp_path / "home", "--models-dir", str(models_dir), "--enable-simulated", **ON
    ) as running:
        yield running


def spares(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.http.get("/admin/models").json()["spares"]
    return found


def await_spare(server: Server, *but: int) -> dict[str, Any]:
    """Poll until a worker waits that is none of these."""
    for _ in polls():
        if (found := spares(server)) and found[0]["ready"] and found[0]["pid"] not in but:
            return found[0]
    raise AssertionError(f"there is no spare worker: {spares(server)}\n{server.text}")


def crash(server: Server, model_id: str) -> dict[str, Any]:
    before = server.model(model_id)["generation"]
    server.kill_worker(model_id)
    return server.await_state(model_id, "routable", generation=before + 1)


def test_a_restart_takes_the_worker_that_waits(server: Server) -> None:
    assert spares(server) == []
    assert server.load("tiny").status_code == 200
    spare = await_spare(server)
    assert (spare["backend"], spare["memory_gb"] > 0.01) == ("llama", True)
    view = crash(server, "tiny")
    assert view["pid"] == spare["pid"]
    assert view["readiness"]["crash_count"] == 1
    assert server.chat("tiny", max_tokens=3).status_code == 200
    # And the next one is there for the next time.
    another = await_spare(server, spare["pid"])
    assert crash(server, "tiny")["pid"] == another["pid"]
    [record] = server.http.get("/admin/models/compatibility?limit=1").json()["records"]
    assert record["outcome"] == "pass"
    assert record["metadata"]["load_parts_s"]["import"] < 0.05
    # It answered as it had done before, and needed no longer proof.
    assert record["metadata"]["short_canary"] is True


def test_one_that_hangs_or_dies_is_nobodys_worker(server: Server) -> None:
    assert server.load("talker").status_code == 200
    spare = await_spare(server)
    os.kill(spare["pid"], signal.SIGKILL)
    another = await_spare(server, spare["pid"])
    assert server.model("talker")["readiness"]["crash_count"] == 0
    assert crash(server, "talker")["pid"] == another["pid"]


def test_it_leaves_with_the_last_model_of_its_backend(server: Server) -> None:
    assert server.load("talker").status_code == 200
    spare = await_spare(server)
    server.http.post("/admin/models/unload", json={"model_id": "talker"})
    await_gone([spare["pid"]])
    for _ in polls():
        if not spares(server):
            return
    raise AssertionError(f"it is still listed: {spares(server)}")


def test_it_ends_with_the_server(tmp_path: Path, models_dir: Path) -> None:
    home = tmp_path / "home"
    for number in (signal.SIGTERM, signal.SIGKILL):
        with serve(home, "--models-dir", str(models_dir), "--enable-simulated", **ON) as server:
            assert server.load("talker").status_code == 200
            spare = await_spare(server)
            server.stop(number)
            await_gone([spare["pid"]])


def test_it_goes_before_a_model_has_to(tmp_path: Path, models_dir: Path) -> None:
    budget = {"OPTA_LMX_MEMORY_BUDGET_BYTES": str(300 * 1024 * 1024)}
    with serve(
        tmp_path / "home", "--models-dir", str(models_dir), "--enable-simulated", **ON, **budget
    ) as server:
        assert server.load("talker").status_code == 200
        spare = await_spare(server)
        # Only then is it known what it really takes.
        for _ in polls():
            if (tmp_path / "home" / "memory.json").exists():
                break

        def plan(context_length: int) -> dict[str, Any]:
            answer = server.load("endless", dry_run=True, context_length=context_length)
            found: dict[str, Any] = answer.json()
            return found

        # Just more than there is as long as the spare worker is there.
        small, large = plan(10_000), plan(20_000)
        of_a_token = (large["needed_bytes"] - small["needed_bytes"]) / 10_000
        missing = small["available_bytes"] - small["needed_bytes"] + 4 * 1024 * 1024
        context_length = 10_000 + int(missing / of_a_token)
        assert plan(context_length)["would_unload"] == []
        answer = server.load("endless", context_length=context_length)
        assert answer.status_code == 200, answer.text
        await_gone([spare["pid"]])
        assert server.model("talker")["readiness"]["state"] == "routable"


#: The server believes that there is no memory left while a file is there.
SHORT_OF_MEMORY = """
import os
from supervisor import memory_room, memory_watch
really = memory_room.available_bytes
def available_bytes():
    return 0 if os.path.exists({flag!r}) else really()
memory_room.available_bytes = memory_watch.available_bytes = available_bytes
"""


def test_it_goes_when_memory_is_short_and_comes_back_when_there_is_some(
    tmp_path: Path, models_dir: Path
) -> None:
    flag = tmp_path / "short"
    patch = SHORT_OF_MEMORY.format(flag=str(flag)) + (
        "from supervisor import spares\nspares.NO_ROOM_S = 0.5\n"
    )
    settings = {**ON, "OPTA_LMX_MEMORY_INTERVAL_S": "0.2"}
    with serve(
        tmp_path / "home", "--models-dir", str(models_dir), patch=patch, **settings
    ) as server:
        assert server.load("talker").status_code == 200
        spare = await_spare(server)
        flag.touch()
        await_gone([spare["pid"]])
        server.await_text("memory is short")
        view = server.model("talker")
        assert view["readiness"]["state"] == "routable"
        assert view["readiness"]["crash_count"] == 0
        # There is no room for another, so none is made.
        for _ in polls(2.5, 0.1):
            assert [each["pid"] for each in spares(server)] in ([], [spare["pid"]])
        flag.unlink()
        await_spare(server, spare["pid"])


def test_one_of_an_old_version_is_replaced(tmp_path: Path, models_dir: Path) -> None:
    flag = tmp_path / "upgraded"
    patch = f"""
import os
from supervisor import gate, spares
spares.VERSIONS_S = 0.2
really = gate.installed_backends
def installed_backends(**options):
    found = really(**options)
    return found | {{"simulated": "2"}} if os.path.exists({str(flag)!r}) else found
gate.installed_backends = installed_backends
"""
    with serve(tmp_path / "home", "--models-dir", str(models_dir), patch=patch, **ON) as server:
        assert server.load("talker").status_code == 200
        spare = await_spare(server)
        flag.touch()
        await_gone([spare["pid"]])
        server.await_text("it has version 1, installed is 2")
        flag.unlink()
        another = await_spare(server, spare["pid"])
        assert crash(server, "talker")["pid"] == another["pid"]

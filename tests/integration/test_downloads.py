"""Models that come from a hub, over HTTP, as an operator sees it. The hub is on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.hub import Hub, running
from tests.support.server import Server, await_gone, polls, serve

TOKEN = "hf_" + "s3cret" * 4
SLOW = os.urandom(1_500_000)


@pytest.fixture(scope="module")
def hub(tiny_gguf: Path) -> Iterator[Hub]:
    with running() as hub:
        tiny = tiny_gguf.read_bytes()
        hub.add(
            "org/tiny",
            {"README.md": b"# tiny", "tiny-Q4_K_M.gguf": tiny, "tiny-F32.gguf": tiny + b"\0" * 8},
            small=frozenset({"README.md"}),
        )
        hub.add("org/slow", {"slow-Q8_0.gguf": SLOW})
        hub.add("org/dies", {"dies.gguf": SLOW[:600_000]})
        hub.add("org/bad", {"bad.gguf": tiny}, wrong=frozenset({"bad.gguf"}))
        hub.add("org/gated", {"gated.gguf": tiny}, token="somebody's")
        hub.add("org/many", {f"m-Q{bits}_0.gguf": tiny for bits in (4, 8)})
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "hub"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hub: Hub, cache: Path) -> Iterator[Server]:
    on_demand = {"OPTA_LMX_LOAD_ON_DEMAND": "true"}
    with serve(tmp_path_factory.mktemp("home"), **settings(hub, cache, **on_demand)) as running:
        yield running
        assert TOKEN not in running.text


def settings(hub: Hub, cache: Path, **more: str) -> dict[str, str]:
    return {
        "OPTA_LMX_HUB_ENDPOINT": hub.url,
        "OPTA_LMX_HUB_CACHE_DIR": str(cache),
        "OPTA_LMX_DOWNLOAD_STALL_S": "0.5",
        "OPTA_LMX_DOWNLOAD_DISK_RESERVE_BYTES": "0",
        "HF_HOME": str(cache.parent / "hf"),
        "HF_TOKEN": TOKEN,
        **more,
    }


def await_end(server: Server, url: str) -> dict[str, Any]:
    for _ in polls(30):
        view: dict[str, Any] = server.http.get(url).json()
        if view["status"] in ("done", "failed", "cancelled"):
            return view
    raise AssertionError(f"it does not end: {view}\n{server.text}")


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_load_asks_then_downloads_then_serves(server: Server, hub: Hub, tiny_gguf: Path) -> None:
    size = tiny_gguf.stat().st_size
    asked = server.load("org/tiny:q4_k_m", context_length=256)
    assert asked.status_code == 202, asked.text
    question = asked.json()
    assert question["status"] == "download_required"
    assert question["model_id"] == "org/tiny:tiny-Q4_K_M"
    assert question["estimated_size_bytes"] == question["total_size_bytes"] == size
    assert question["free_disk_bytes"] > size
    assert question["files"] == [{"name": "tiny-Q4_K_M.gguf", "size_bytes": size}]
    # Asking fetches nothing, and begins nothing.
    assert hub.bytes_of("tiny-Q4_K_M.gguf") == 0
    assert code_of(server.http.get(question["progress_url"])) == (404, "download_not_found")

    yes = {"confirmation_token": question["confirmation_token"]}
    begun = server.http.post(question["confirm_url"], json=yes)
    assert begun.status_code == 202, begun.text
    assert begun.json()["progress_url"] == question["progress_url"]
    view = await_end(server, question["progress_url"])
    assert (view["status"], view["error"]) == ("done", None), view
    assert (view["downloaded_bytes"], view["percent"]) == (size, 100.0)
    # The options of the question are those of the load.
    assert server.model("org/tiny:tiny-Q4_K_M")["context_length"] == 256
    assert server.chat("org/tiny:tiny-Q4_K_M", max_tokens=2).status_code == 200
    assert hub.bytes_of("tiny-Q4_K_M.gguf") == size
    # A token is good once.
    assert code_of(server.http.post(question["confirm_url"], json=yes)) == (
        400,
        "invalid_confirmation_token",
    )
    # By its short name it is found here, without the hub.
    before = len(hub.requests)
    assert server.load("org/tiny:Q4_K_M").status_code == 200
    assert len(hub.requests) == before


def test_a_dry_run_of_what_is_not_here_asks_nothing_and_begins_nothing(
    server: Server, hub: Hub, tiny_gguf: Path
) -> None:
    before = server.http.get("/admin/models/downloads").json()["count"]
    answer = server.load("org/many:q8_0", dry_run=True, auto_download=True, wait=True)
    assert answer.status_code == 202, answer.text
    told = answer.json()
    size = tiny_gguf.stat().st_size
    assert told["status"] == "download_required"
    assert told["model_id"] == "org/many:m-Q8_0"
    assert told["estimated_size_bytes"] == told["total_size_bytes"] == size
    assert told["files"] == [{"name": "m-Q8_0.gguf", "size_bytes": size}]
    assert "files are here" in told["message"]
    assert not {"confirmation_token", "confirm_url", "progress_url", "expires_in_s"} & set(told)
    assert server.http.get("/admin/models/downloads").json()["count"] == before
    assert hub.bytes_of("m-Q8_0.gguf") == 0
    command = [sys.executable, "-m", "supervisor.cli", "load", "org/many:q8_0", "--dry-run"]
    done = subprocess.run(
        [*command, "--url", server.url], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert "a load would ask to download it" in done.stdout
    assert "would be downloaded" in done.stdout
    # What a load would be refused with is the answer here, too.
    for model in ("org/gated", "org/nobody", "org/many", "nobody"):
        refused = server.load(model, dry_run=True)
        assert code_of(refused) == code_of(server.load(model)), refused.text


def begin(server: Server, model_id: str) -> dict[str, Any]:
    begun = server.http.post("/admin/models/download", json={"model_id": model_id})
    assert begun.status_code == 202, begun.text
    answer: dict[str, Any] = begun.json()
    return answer


def await_bytes(server: Server, url: str, count: int) -> dict[str, Any]:
    for _ in polls(30):
        view: dict[str, Any] = server.http.get(url).json()
        if view["downloaded_bytes"] >= count:
            return view
    raise AssertionError(f"nothing comes: {view}\n{server.text}")


def test_a_folder_is_downloaded_and_loaded_in_one_request(
    server: Server, hub: Hub, tiny_mlx: Path
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_mlx.iterdir()}
    small = frozenset(name for name in files if name.endswith(".json"))
    hub.add("org/folder", {**files, "pytorch_model.bin": b"0" * 1000}, small=small)
    answer = server.load("org/folder", auto_download=True, wait=True, keep_alive_sec=900)
    assert answer.status_code == 200, answer.text
    assert answer.json()["readiness"]["state"] == "routable"
    assert server.model("org/folder")["keep_alive_sec"] == 900
    assert server.chat("org/folder", max_tokens=2).status_code == 200
    assert hub.bytes_of("pytorch_model.bin") == 0
    found = server.http.get("/admin/models/available").json()["models"]
    assert ("org/folder", "hub_cache") in [(model["id"], model["source"]) for model in found]


def test_a_download_is_watched_joined_cancelled_and_continued(server: Server, hub: Hub) -> None:
    hub.bytes_per_s = 300_000
    try:
        begun = begin(server, "org/slow")
        url = begun["progress_url"]
        assert begin(server, "org/slow:Q8_0")["download_id"] == begun["download_id"]
        await_bytes(server, url, 100_000)
        assert code_of(server.http.delete("/admin/models/org/slow")) == (409, "model_conflict")
        events = []
        stream = {"accept": "text/event-stream"}
        with server.http.stream("GET", url, headers=stream) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append(json.loads(line.removeprefix("data: ")))
                if len(events) == 2:
                    cancelled = server.http.delete(f"/admin/models/download/{begun['download_id']}")
                    assert cancelled.json()["status"] == "cancelled"
        # The stream ends with how it ended.
        assert [event["status"] for event in events[:2]] == ["downloading"] * 2
        assert events[-1]["status"] == "cancelled"
        assert events[-1]["error"]["code"] == "download_cancelled"
        assert events[1]["speed_bytes_per_s"] > 0
        assert events[1]["eta_s"] > 0
    finally:
        hub.bytes_per_s = None
    kept = events[-1]["downloaded_bytes"]
    assert 0 < kept < len(SLOW)
    view = await_end(server, begin(server, "org/slow")["progress_url"])
    assert (view["status"], view["load"]) == ("done", False)
    (first, _), (second, end) = hub.served["slow-Q8_0.gguf"]
    assert (first, end) == (0, len(SLOW))
    assert second >= kept
    listed = server.http.get("/admin/models/downloads").json()
    assert listed["count"] == len({each["id"] for each in listed["downloads"]}) >= 1


def test_a_download_whose_process_dies_has_failed_and_is_continued(
    server: Server, hub: Hub
) -> None:
    hub.bytes_per_s = 300_000
    url = begin(server, "org/dies")["progress_url"]
    await_bytes(server, url, 50_000)
    for child in psutil.Process(server.process.pid).children():
        if "supervisor.downloads.engine" in child.cmdline():
            child.kill()
    view = await_end(server, url)
    hub.bytes_per_s = None
    assert (view["status"], view["error"]["code"]) == ("failed", "download_failed")
    assert "status -9" in view["error"]["message"]
    assert await_end(server, begin(server, "org/dies")["progress_url"])["status"] == "done"
    assert hub.served["dies.gguf"][1][0] >= 50_000


def test_a_wrong_file_is_never_loaded(server: Server, cache: Path) -> None:
    answer = server.load("org/bad", auto_download=True, wait=True)
    assert code_of(answer) == (502, "download_failed")
    assert "bad.gguf" in answer.json()["error"]["message"]
    assert not [path for path in cache.rglob("*") if path.name == "bad.gguf"]
    found = server.http.get("/admin/models/available").json()["models"]
    assert not [model for model in found if model["id"].startswith("org/bad")]
    failed = server.http.get("/admin/models/downloads").json()["downloads"][0]
    assert (failed["model_id"], failed["status"]) == ("org/bad:bad", "failed")
    assert failed["error"]["code"] == "download_failed"


@pytest.mark.parametrize(
    ("model_id", "expected"),
    [
        ("org/absent", (404, "model_not_found")),
        ("absent", (404, "model_not_found")),
        ("org/gated", (403, "hub_access_denied")),
        ("org/many", (400, "invalid_value")),
        ("org/many:Q2_K", (404, "model_not_found")),
    ],
)
def test_what_cannot_be_had_is_told_at_once(
    server: Server, model_id: str, expected: tuple[int, str]
) -> None:
    assert code_of(server.load(model_id, auto_download=model_id != "org/absent")) == expected


def test_a_request_for_a_model_downloads_nothing(server: Server, hub: Hub) -> None:
    before = len(hub.requests)
    assert code_of(server.chat("org/many:m-Q4_0")) == (404, "model_not_found")
    assert len(hub.requests) == before


def test_a_models_files_are_deleted_when_nobody_uses_them(
    server: Server, hub: Hub, cache: Path
) -> None:
    view = await_end(server, begin(server, "org/many:q4_0")["progress_url"])
    assert view["status"] == "done", view
    assert server.load("org/many:m-Q4_0").status_code == 200
    url = "/admin/models/org/many:m-Q4_0"
    assert code_of(server.http.delete(url)) == (409, "model_conflict")
    server.http.post("/admin/models/unload", json={"model_id": "org/many:m-Q4_0"})
    deleted = server.http.delete(url)
    assert deleted.status_code == 200, deleted.text
    assert deleted.json()["freed_bytes"] > 0
    assert not list(cache.glob("models--org--many"))
    assert code_of(server.http.delete(url)) == (404, "model_not_found")
    assert server.load("org/many:m-Q4_0").json()["status"] == "download_required"


def test_a_killed_server_leaves_nothing_running_and_the_next_one_tells(
    hub: Hub, tmp_path: Path
) -> None:
    home, cache = tmp_path / "home", tmp_path / "cache"
    hub.bytes_per_s = 300_000
    hub.served["slow-Q8_0.gguf"].clear()
    with serve(home, **settings(hub, cache)) as server:
        url = begin(server, "org/slow")["progress_url"]
        await_bytes(server, url, 200_000)
        engines = [child.pid for child in psutil.Process(server.process.pid).children()]
        server.stop(signal.SIGKILL)
    await_gone(engines)
    hub.bytes_per_s = None
    with serve(home, **settings(hub, cache)) as server:
        view = server.http.get(url).json()
        assert (view["status"], view["error"]["code"]) == ("failed", "download_failed")
        assert "ask again" in view["error"]["message"]
        # Nothing goes on by itself; asked again, it goes on where it was.
        assert len(hub.served["slow-Q8_0.gguf"]) == 1
        question = server.load("org/slow").json()
        assert question["estimated_size_bytes"] <= len(SLOW) - 200_000
        assert await_end(server, begin(server, "org/slow")["progress_url"])["status"] == "done"
        assert len(hub.served["slow-Q8_0.gguf"]) == 2
        assert hub.served["slow-Q8_0.gguf"][1][0] >= 200_000


def test_what_does_not_fit_is_refused_and_so_is_all_without_a_hub(
    tmp_path: Path, tiny_gguf: Path
) -> None:
    with running() as own:
        own.add("org/tiny", {"tiny.gguf": tiny_gguf.read_bytes()})
        full = {"OPTA_LMX_DOWNLOAD_DISK_RESERVE_BYTES": str(10**18)}
        with serve(tmp_path / "home", **settings(own, tmp_path / "cache", **full)) as server:
            answer = server.load("org/tiny", auto_download=True)
            assert code_of(answer) == (507, "insufficient_disk")
            assert answer.json()["error"]["needed_bytes"] == tiny_gguf.stat().st_size
            assert not own.served
            own.close()
            assert code_of(server.load("org/tiny")) == (502, "hub_unavailable")
            assert code_of(server.load("tiny")) == (404, "model_not_found")


def test_without_downloads_nothing_is_asked_for(tmp_path: Path, hub: Hub) -> None:
    off = settings(hub, tmp_path / "cache", OPTA_LMX_DOWNLOADS_ENABLED="false")
    before = len(hub.requests)
    with serve(tmp_path / "home", **off) as server:
        assert code_of(server.load("org/tiny")) == (403, "downloads_disabled")
        assert code_of(server.load("org/tiny", dry_run=True)) == (403, "downloads_disabled")
        assert code_of(server.load("tiny", auto_download=True)) == (404, "model_not_found")
        refused = server.http.post("/admin/models/download", json={"model_id": "org/tiny"})
        assert code_of(refused) == (403, "downloads_disabled")
        assert server.http.get("/admin/models/downloads").json() == {"downloads": [], "count": 0}
    assert len(hub.requests) == before


def test_the_hub_is_asked_by_the_models_own_id_and_downloads_follow_a_reload(
    hub: Hub, tmp_path: Path
) -> None:
    home, later = tmp_path / "home", tmp_path / "later" / "hub"
    home.mkdir()
    names = '[aliases]\n"team/fast" = "org/many:m-Q4_0"\nbest = ["org/many", "org/tiny"]\n'
    (home / "config.toml").write_text(names)
    environment = settings(hub, tmp_path / "first" / "hub")
    del environment["OPTA_LMX_HUB_CACHE_DIR"]
    with serve(home, **environment) as server:
        question = server.load("team/fast").json()
        assert question["status"] == "download_required"
        assert question["model_id"] == "org/many:m-Q4_0"
        assert code_of(server.load("best")) == (404, "model_not_found")
        (home / "config.toml").write_text(f'hub_cache_dir = "{later}"\n{names}')
        assert server.http.post("/admin/config/reload").json()["applied"] == ["hub_cache_dir"]
        loaded = server.load("team/fast", auto_download=True, wait=True)
        assert loaded.status_code == 200, loaded.text
        assert list(later.glob("models--org--many"))
        assert server.chat("team/fast", max_tokens=2).status_code == 200
        body = {"model_id": "org/many:m-Q4_0"}
        assert server.http.post("/admin/models/unload", json=body).status_code == 200
        assert server.http.delete("/admin/models/org/many:m-Q4_0").status_code == 200
        assert not list(later.glob("models--org--many/snapshots/*/*.gguf"))

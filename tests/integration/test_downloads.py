"""Models that come from a hub, over HTTP, as an operator sees it. The hub is on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.hub import Hub, running
from tests.support.server import Server, polls, serve

TOKEN = "hf_" + "s3cret" * 4


@pytest.fixture(scope="module")
def hub(tiny_gguf: Path) -> Iterator[Hub]:
    with running() as hub:
        tiny = tiny_gguf.read_bytes()
        hub.add(
            "org/tiny",
            {"README.md": b"# tiny", "tiny-Q4_K_M.gguf": tiny, "tiny-F32.gguf": tiny + b"\0" * 8},
            small=frozenset({"README.md"}),
        )
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "hub"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hub: Hub, cache: Path) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("home"), **settings(hub, cache)) as running:
        yield running


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

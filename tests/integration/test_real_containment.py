"""The promise on real backends: one worker dies, the other's answer is whole."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import NO_RESUME, Server, serve, text_of

OTHER = {"tiny-gguf": "tiny-mlx", "tiny-mlx": "tiny-gguf"}
ANSWER: dict[str, Any] = {"temperature": 0, "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path, tiny_mlx: Path
) -> Iterator[Server]:
    arguments = [f"--model=tiny-gguf={tiny_gguf}", f"--model=tiny-mlx={tiny_mlx}"]
    with serve(tmp_path_factory.mktemp("contained") / "home", *arguments) as running:
        for name in OTHER:
            running.await_state(name, "routable")
        yield running


@pytest.mark.parametrize("victim", OTHER)
def test_kill_one_while_both_stream(server: Server, victim: str) -> None:
    survivor = OTHER[victim]
    undisturbed = text_of(list(server.stream(survivor, **ANSWER)))
    assert len(undisturbed) > 400

    streamed: list[str] = []
    reader = threading.Thread(target=lambda: streamed.extend(server.stream(survivor, **ANSWER)))
    dying = server.stream(victim, headers=NO_RESUME, **{**ANSWER, "max_tokens": 1900})
    next(dying)
    reader.start()
    next(dying)
    generation = server.model(victim)["generation"]
    server.kill_worker(victim)

    last = list(dying)[-1]
    assert json.loads(last)["error"]["code"] == "model_crashed"
    reader.join(60)
    assert streamed[-1] == "[DONE]"
    assert text_of(streamed) == undisturbed

    server.await_state(victim, "routable", generation=generation + 1)
    query = f"/admin/models/compatibility?model={victim}&limit=1"
    [record] = server.http.get(query).json()["records"]
    assert record["metadata"]["short_canary"] is True
    assert server.chat(victim, max_tokens=3).status_code == 200
    assert server.model(survivor)["generation"] >= 1

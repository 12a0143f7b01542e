"""Models that are loaded by the first request for them, and leave when nobody needs them."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.server import Server, polls, serve, text_of, write_script

COUNTING = [f" {number}" for number in range(100)]
FAST = {"OPTA_LMX_RESTART_DELAY_CAP_S": "0.1", "OPTA_LMX_SSE_KEEPALIVE_S": "0.2"}


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(tiny_gguf, folder / "tiny.gguf")
    (folder / "cut.gguf").write_bytes(tiny_gguf.read_bytes()[:5000])
    write_script(folder, "talker", tokens=["Hel", "lo"])
    write_script(folder, "slow", tokens=["Hel", "lo"], load_delay_s=1.5)
    write_script(folder, "late", tokens=["Hel", "lo"], load_delay_s=1.5)
    write_script(folder, "secret", tokens=["Hel", "lo"])
    write_script(folder, "asked", tokens=["Hel", "lo"])
    write_script(folder, "leaving", tokens=["Hel", "lo"], load_delay_s=30.0)
    write_script(folder, "crowded", tokens=["Hel", "lo"], load_delay_s=1.5)
    write_script(folder, "broken", faults=[{"at": "load", "kind": "segfault"}])
    write_script(folder, "steady", tokens=COUNTING, repeat=True, step_delay_s=0.05)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    on = {"OPTA_LMX_LOAD_ON_DEMAND": "true", "OPTA_LMX_MAX_QUEUE": "3"}
    with serve(home, "--models-dir", str(models_dir), **on, **FAST) as running:
        yield running


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def tracked(server: Server) -> set[str]:
    return {model["id"] for model in server.http.get("/admin/models").json()["models"]}


def await_left(server: Server, model_id: str) -> None:
    for _ in polls(15):
        if model_id not in tracked(server):
            return
    raise AssertionError(f"{model_id} stays:\n{server.text}")


def test_the_first_request_loads_a_real_model(server: Server) -> None:
    assert "tiny" not in tracked(server)
    answer = server.chat("tiny", max_tokens=3)
    assert answer.status_code == 200, answer.text
    assert server.model("tiny")["readiness"]["state"] == "routable"
    tokens = server.http.post("/tokenize", json={"model": "tiny", "content": "Hello"})
    assert tokens.status_code == 200


def test_who_waits_together_waits_for_one_load(server: Server) -> None:
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: server.chat("slow"), range(3)))
    assert [answer.status_code for answer in answers] == [200] * 3
    assert server.model("slow")["generation"] == 1
    assert server.model("slow")["request_count"] == 3


def test_a_stream_stays_alive_while_its_model_loads(server: Server) -> None:
    body = {"model": "late", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        lines = list(answer.iter_lines())
    first = next(i for i, line in enumerate(lines) if '"Hel' in line)
    assert sum(line.startswith(":") for line in lines[:first]) >= 3
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert text_of(data) == "Hello"
    assert data[-1] == "[DONE]"


def test_a_stream_whose_load_is_called_off_ends_with_an_error(server: Server) -> None:
    body = {"model": "leaving", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith(":")
        server.http.post("/admin/models/unload", json={"model_id": "leaving"})
        data = [line for line in lines if line.startswith("data: ")]
    [error] = data
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "model_unloaded"


def test_the_queue_for_a_load_is_bounded(server: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.chat("crowded"), range(8)))
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200] * 3 + [429] * 5
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)


def test_what_cannot_be_loaded_is_told_at_once(server: Server) -> None:
    assert code_of(server.chat("cut")) == (409, "model_incomplete")
    assert code_of(server.chat("nobody")) == (404, "model_not_found")
    assert code_of(server.http.post("/tokenize", json={"model": "nobody", "content": "x"})) == (
        404,
        "model_not_found",
    )


def test_a_request_cannot_name_a_file(server: Server, models_dir: Path) -> None:
    path = str(models_dir / "secret.sim.json")
    before = tracked(server)
    for model in (path, f"x:{path}", "../models/secret", "secret:", "secret.sim.json"):
        assert code_of(server.chat(model)) == (404, "model_not_found"), model
    assert tracked(server) == before


def test_an_inquiry_loads_a_model_too(server: Server) -> None:
    answer = server.http.post("/tokenize", json={"model": "asked", "content": "Hello"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["count"] == 5


def test_a_model_comes_back_as_it_was_loaded(tmp_path: Path, tiny_gguf: Path) -> None:
    elsewhere = shutil.copy(tiny_gguf, tmp_path / "elsewhere.gguf")
    on = {"OPTA_LMX_LOAD_ON_DEMAND": "true", **FAST}
    with serve(tmp_path / "home", "--models-dir", str(tmp_path), **on) as server:
        options = {"path": str(elsewhere), "context_length": 512, "keep_alive_sec": 1}
        assert server.load("mine", **options).status_code == 200
        await_left(server, "mine")
        assert server.chat("mine", max_tokens=2).status_code == 200
        assert server.model("mine")["context_length"] == 512
        assert code_of(server.chat("elsewhere")) == (404, "model_not_found")
        server.http.post("/admin/models/unload", json={"model_id": "mine"})
        assert code_of(server.chat("mine")) == (404, "model_not_found")


def test_nobody_waits_for_ever_for_a_model_that_crashes(server: Server) -> None:
    status, code = code_of(server.chat("broken"))
    assert (status, code) in {(409, "model_unstable"), (409, "model_loader_crashed")}
    server.await_state("broken", "quarantined")
    assert code_of(server.chat("broken")) == (409, "model_unstable")


def test_a_request_that_is_given_up_leaves_the_load_alone(tmp_path: Path, models_dir: Path) -> None:
    on = {"OPTA_LMX_LOAD_ON_DEMAND": "true", **FAST}
    with serve(tmp_path / "home", "--models-dir", str(models_dir), **on) as server:
        answer = server.http.post(
            "/v1/chat/completions",
            json={"model": "slow", "messages": [{"role": "user", "content": "Hi"}]},
            headers={"X-Request-Timeout": "0.3"},
        )
        assert code_of(answer) == (408, "request_timeout")
        server.await_state("slow", "routable")
        assert server.model("slow")["queued"] == 0


def test_idle_models_leave_and_come_back(tmp_path: Path, models_dir: Path) -> None:
    config = tmp_path / "config.toml"
    kept = {"id": "kept", "path": str(models_dir / "secret.sim.json"), "keep_alive_sec": 0}
    lines = [f"{name} = {json.dumps(value)}" for name, value in kept.items()]
    config.write_text("keep_alive_sec = 1\nload_on_demand = true\n[[models]]\n" + "\n".join(lines))
    folder = ("--models-dir", str(models_dir))
    with serve(tmp_path / "home", "--config", str(config), *folder, **FAST) as server:
        assert server.chat("talker").status_code == 200
        pid = server.model("talker")["pid"]
        await_left(server, "talker")
        server.await_text("was idle")
        assert server.chat("talker").status_code == 200
        assert server.model("talker")["pid"] != pid
        # What has something to do is not idle, however long that takes.
        streamed: list[str] = []
        reader = threading.Thread(
            target=lambda: streamed.extend(server.stream("steady", max_tokens=60))
        )
        reader.start()
        await_left(server, "talker")
        reader.join(30)
        assert streamed[-1] == "[DONE]"
        await_left(server, "steady")
        assert tracked(server) == {"kept"}


def test_it_is_off_unless_it_is_turned_on(tmp_path: Path, models_dir: Path) -> None:
    with serve(tmp_path / "home", "--models-dir", str(models_dir)) as server:
        assert code_of(server.chat("talker")) == (404, "model_not_found")
        assert server.load("talker", keep_alive_sec=1).status_code == 200
        await_left(server, "talker")
        assert code_of(server.chat("talker")) == (404, "model_not_found")


def test_who_waits_for_room_is_told_and_whose_client_has_gone_waits_no_more(
    tmp_path: Path, models_dir: Path
) -> None:
    settings = {
        # For one of them.
        "OPTA_LMX_MEMORY_BUDGET_BYTES": str(43_000_000),
        "OPTA_LMX_LOAD_ON_DEMAND": "true",
        "OPTA_LMX_MAX_QUEUE": "2",
        "OPTA_LMX_STOP_GRACE_S": "1.2",
        **FAST,
    }
    body = {"model": "secret", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
    with serve(tmp_path / "home", "--models-dir", str(models_dir), **settings) as server:

        def ask(stack: contextlib.ExitStack) -> Iterator[str]:
            url = "/v1/chat/completions"
            answer = stack.enter_context(server.http.stream("POST", url, json=body))
            assert answer.status_code == 200, answer.read()
            lines = answer.iter_lines()
            assert next(lines).startswith(":")
            return lines

        def obstruct() -> None:
            """A model that has to go, and whose worker does not."""
            assert server.chat("talker").status_code == 200
            server.kill_worker("talker", signal.SIGSTOP)

        obstruct()
        with contextlib.ExitStack() as staying:
            lines = ask(staying)
            with contextlib.ExitStack() as leaving:
                # Whose end would be that of the connection.
                _unread = ask(leaving)
                assert code_of(server.chat("secret")) == (429, "rate_limit_exceeded")
            for _ in polls(10):
                if (answer := server.chat("secret")).status_code != 429:
                    break
            assert answer.status_code == 200, answer.text
            data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert text_of(data) == "Hello"
        assert server.model("secret")["request_count"] == 2
        # And when all of them have gone, nothing is loaded for them.
        obstruct()
        with contextlib.ExitStack() as leaving:
            ask(leaving)
        await_left(server, "talker")
        assert server.chat("asked").status_code == 200
        assert tracked(server) == {"asked"}

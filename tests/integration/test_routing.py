"""Names that stand for models: who answers when the first one cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.server import Server, serve, text_of, write_script

FAST = {"OPTA_LMX_RESTART_DELAY_CAP_S": "0.1", "OPTA_LMX_SSE_KEEPALIVE_S": "0.2"}
CONFIG = """
load_on_demand = true

[aliases]
best = ["crasher", "steady"]
hopeless = ["crasher", "nowhere"]
weary = ["tired", "steady"]

[presets.brief]
model = "best"
parameters = { max_tokens = 1 }
load = { context_length = 333 }

[presets.short]
model = "shared"
load = { context_length = 300 }

[presets.long]
model = "shared"
load = { context_length = 600 }
"""
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    write_script(folder, "crasher", faults=[{"at": "load", "kind": "segfault"}])
    write_script(folder, "steady", tokens=["Hel", "lo"])
    write_script(folder, "shared", tokens=["Hel", "lo"], load_delay_s=0.5)
    # It passes its canary, and dies of whatever it is asked.
    faults = [{"at": "prompt", "kind": "segfault", "prompt_contains": "STRIKE"}]
    write_script(folder, "tired", tokens=["Hel", "lo"], faults=faults)
    home = tmp_path_factory.mktemp("home")
    (home / "config.toml").write_text(CONFIG)
    with serve(home, "--models-dir", str(folder), **FAST) as running:
        yield running


def test_a_preset_loads_the_first_that_can_be_with_its_options(server: Server) -> None:
    answer = server.chat("brief")
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "Hel"
    assert answer.json()["model"] == answer.headers["x-served-model"] == "steady"
    assert server.model("steady")["context_length"] == 333
    assert server.await_state("crasher", "quarantined")["readiness"]["crash_count"] == 3


def test_requests_for_an_alias_go_on_while_its_first_model_is_quarantined(server: Server) -> None:
    server.chat("best")
    server.await_state("crasher", "quarantined")
    answer = server.chat("best")
    assert answer.json()["choices"][0]["message"]["content"] == "Hello"
    assert answer.json()["model"] == answer.headers["x-served-model"] == "steady"
    body = {"model": "best", "stream": True, "messages": HI}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        assert stream.headers["x-served-model"] == "steady"
        lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
    payloads = [line.removeprefix("data: ") for line in lines]
    assert text_of(payloads) == "Hello"
    assert {json.loads(each)["model"] for each in payloads[:-1]} == {"steady"}
    # By its own id it is refused as ever.
    refused = server.chat("crasher")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_unstable")
    refused = server.chat("hopeless")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_unstable")
    assert "nowhere" in refused.json()["error"]["message"]


def test_a_model_that_dies_under_a_request_makes_room_for_the_next(server: Server) -> None:
    assert server.load("steady").status_code == 200
    assert server.load("tired").status_code == 200
    answer = server.chat("weary", "STRIKE")
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == answer.headers["x-served-model"] == "steady"
    assert server.model("tired")["readiness"]["crash_count"] >= 2


def test_presets_that_would_load_a_model_differently_share_it(server: Server) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(server.chat, ["short", "long"] * 3))
    assert [answer.status_code for answer in answers] == [200] * 6
    assert server.model("shared")["generation"] == 1
    assert server.model("shared")["context_length"] in (300, 600)
    # An operator who asks for what is not so is told.
    refused = server.load("long" if server.model("shared")["context_length"] == 300 else "short")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_conflict")


def test_auto_and_the_names_are_there_for_clients(server: Server) -> None:
    assert server.load("steady").status_code == 200
    assert server.chat("steady").status_code == 200
    assert server.chat("auto").json()["model"] == "steady"
    listed = {
        model["id"]: model.get("alias_of") for model in server.http.get("/v1/models").json()["data"]
    }
    assert listed["best"] == listed["brief"] == "steady"
    assert "hopeless" not in listed


def test_an_operator_may_say_what_clients_say(server: Server) -> None:
    server.chat("best")
    server.await_state("crasher", "quarantined")
    assert server.load("steady").status_code == 200
    ambiguous = server.http.post("/admin/models/unload", json={"model_id": "best"})
    assert (ambiguous.status_code, ambiguous.json()["error"]["code"]) == (400, "model_ambiguous")
    released = server.http.post("/admin/models/preset:brief/release")
    assert (released.status_code, released.json()["model_id"]) == (200, "crasher")
    assert server.model("brief")["id"] == "steady"
    unloaded = server.http.post("/admin/models/unload", json={"model_id": "best"})
    assert (unloaded.status_code, unloaded.json()["model_id"]) == (200, "steady")
    assert server.http.get("/admin/models/steady").status_code == 404

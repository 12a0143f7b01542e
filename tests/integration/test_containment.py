"""Workers die in every way; nothing else does, and nobody waits for ever."""

import contextlib
import json
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.server import (
    NO_RESUME,
    Server,
    await_gone,
    polls,
    serve,
    text_of,
    write_script,
)

#: Counts on, so that a lost or doubled token is seen.
COUNTING = [f"{n} " for n in range(200)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def server(home: Path, models_dir: Path) -> Iterator[Server]:
    with serve(
        home,
        *("--models-dir", str(models_dir)),
        OPTA_LMX_DECODE_STALL_S="2",
        OPTA_LMX_PREFILL_STALL_S="2",
        OPTA_LMX_LOAD_STALL_S="3",
        OPTA_LMX_CANARY_TIMEOUT_S="3",
        OPTA_LMX_BEAT_INTERVAL_S="0.2",
        OPTA_LMX_BEAT_TIMEOUT_S="2",
    ) as running:
        yield running


def test_a_client_that_leaves_with_requests_in_its_pipeline_harms_no_model(
    server: Server, models_dir: Path
) -> None:
    write_script(models_dir, "piped", tokens=COUNTING, repeat=True, step_delay_s=0.002)
    assert server.load("piped").status_code == 200
    fields = {"model": "piped", "stream": True, "messages": [{"role": "user", "content": "x"}]}
    body = json.dumps(fields).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
    request = head + b"content-length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection((server.http.base_url.host, server.http.base_url.port)) as client:
        client.sendall(request)
        while b'"content":"5 "' not in client.recv(65536):
            pass
        client.sendall(request)
    for _ in polls(10):
        if server.model("piped")["in_flight"] == 0:
            break
    view = server.model("piped")
    assert (view["in_flight"], view["generation"]) == (0, 1), server.text
    assert view["readiness"]["crash_count"] == 0


def test_a_killed_worker_leaves_the_other_stream_alone(server: Server, models_dir: Path) -> None:
    write_script(models_dir, "steady", tokens=COUNTING, step_delay_s=0.01)
    write_script(models_dir, "victim", tokens=COUNTING, repeat=True, step_delay_s=0.01)
    for name in ("steady", "victim"):
        assert server.load(name).status_code == 200
    steady: list[str] = []
    reader = threading.Thread(target=lambda: steady.extend(server.stream("steady")))
    reader.start()
    stream = server.stream("victim", headers=NO_RESUME)
    payloads = [next(stream) for _ in range(10)]
    server.kill_worker("victim")
    payloads += stream

    error = json.loads(payloads[-1])
    assert error["error"]["code"] == "model_crashed"
    assert "SIGKILL" in error["error"]["message"]
    assert "[DONE]" not in payloads
    assert not any('"finish_reason":"' in payload for payload in payloads)

    reader.join(30)
    assert text_of(steady) == "".join(COUNTING)
    assert steady[-1] == "[DONE]"

    view = server.await_state("victim", "routable", generation=2)
    assert view["readiness"]["crash_count"] == 1
    answer = server.chat("victim", max_tokens=3)
    assert answer.json()["choices"][0]["message"]["content"] == "0 1 2 "


def test_a_stream_goes_on_where_its_worker_died(server: Server, models_dir: Path) -> None:
    write_script(models_dir, "resumed", tokens=COUNTING, step_delay_s=0.01)
    server.load("resumed")
    stream = server.stream("resumed")
    payloads = [next(stream) for _ in range(10)]
    server.kill_worker("resumed")
    payloads += stream
    assert text_of(payloads) == "".join(COUNTING)
    assert payloads[-1] == "[DONE]"
    assert server.model("resumed")["generation"] == 2


def test_a_request_that_nobody_saw_anything_of_runs_again(server: Server, models_dir: Path) -> None:
    write_script(
        models_dir,
        "once",
        tokens=["all ", "of ", "it"],
        faults=[{"at": "token", "n": 1, "kind": "kill", "prompt_contains": "die", "times": 1}],
    )
    server.load("once")
    answer = server.chat("once", "die once")
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "all of it"
    assert server.model("once")["generation"] == 2


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("segfault", "SIGSEGV"),
        ("abort", "SIGABRT"),
        ("exit", "exited with status 1"),
        ("raise", "simulated backend exception"),
        ("hang", "no progress in prefill"),  # as the second run has not come to a token
    ],
)
def test_a_request_that_kills_every_time_ends_in_an_error(
    server: Server, models_dir: Path, kind: str, said: str
) -> None:
    name = f"poisoned-{kind}"
    write_script(
        models_dir,
        name,
        faults=[{"at": "token", "n": 1, "kind": kind, "prompt_contains": "poison"}],
    )
    server.load(name)
    answer = server.chat(name, "poison")
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["code"] == "request_poisoned"
    assert said in error["message"]
    view = server.await_state(name, "routable", generation=3)
    assert view["readiness"]["crash_count"] == 2
    assert server.chat(name, "harmless").status_code == 200


def test_a_client_that_leaves_while_its_model_restarts_costs_nothing(
    server: Server, models_dir: Path
) -> None:
    write_script(models_dir, "left", load_delay_s=0.5, prefill_delay_s=0.3)
    server.load("left")
    with httpx.Client(base_url=server.url, timeout=1.0) as impatient:
        body = {"model": "left", "messages": [{"role": "user", "content": "x"}]}

        def leave() -> None:
            with contextlib.suppress(httpx.ReadTimeout):
                impatient.post("/v1/chat/completions", json=body)

        waiting = threading.Thread(target=leave)
        waiting.start()
        for _ in polls():
            if server.model("left")["in_flight"]:
                break
        server.kill_worker("left")
        server.await_state("left", "loading")
        waiting.join(10)
    view = server.await_state("left", "routable", generation=2)
    assert (view["generation"], view["readiness"]["crash_count"]) == (2, 1)


def test_a_worker_frozen_right_after_its_load_is_found(server: Server, models_dir: Path) -> None:
    write_script(models_dir, "frozen")
    server.load("frozen")
    server.kill_worker("frozen", signal.SIGSTOP)
    view = server.await_state("frozen", "routable", generation=2)
    assert view["readiness"]["crash_count"] == 1


def test_loads_and_unloads_in_any_order_are_all_answered(server: Server, models_dir: Path) -> None:
    write_script(models_dir, "contested", load_delay_s=0.05)
    answers: list[tuple[int, str | None]] = []

    def hammer(path: str) -> None:
        with httpx.Client(base_url=server.url, timeout=30) as http:
            for _ in range(12):
                answer = http.post(path, json={"model_id": "contested"})
                answers.append((answer.status_code, answer.json().get("error", {}).get("code")))

    threads = [
        threading.Thread(target=hammer, args=(f"/admin/models/{verb}",))
        for verb in ("load", "load", "unload", "load", "unload")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 60
    assert set(answers) <= {
        (200, None),
        (409, "model_unloaded"),
        (404, "model_not_found"),
        (409, "model_not_ready"),
    }
    server.load("contested")
    assert server.model("contested")["readiness"]["crash_count"] == 0


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ({"tokens": ["!"]}, "model_canary_failed", "repeats itself"),
        ({"tokens": [""]}, "model_canary_failed", "readable"),
        (
            {"faults": [{"at": "token", "n": 3, "kind": "segfault"}]},
            "model_canary_failed",
            "SIGSEGV",
        ),
        ({"step_delay_s": 5.0}, "model_canary_failed", "within 3 s"),
        ({"faults": [{"at": "load", "kind": "segfault"}]}, "model_loader_crashed", "SIGSEGV"),
        ({"faults": [{"at": "load", "kind": "exit", "status": 0}]}, "model_loader_crashed", "0"),
        ({"faults": [{"at": "load", "kind": "raise"}]}, "model_loader_crashed", "exception"),
        ({"faults": [{"at": "load", "kind": "hang"}]}, "model_load_timeout", "no progress in load"),
        (
            {"faults": [{"at": "load", "kind": "refuse", "code": "model_unsupported_arch"}]},
            "model_unsupported_arch",
            "refusal",
        ),
    ],
)
def test_a_load_that_fails_is_answered_with_how_it_ended(
    server: Server,
    models_dir: Path,
    script: dict[str, object],
    code: str,
    said: str,
    request: pytest.FixtureRequest,
) -> None:
    name = f"bad-{request.node.callspec.id}"
    write_script(models_dir, name, **script)
    answer = server.load(name)
    error = answer.json()["error"]
    assert error["code"] == code
    assert answer.status_code == (422 if code == "model_unsupported_arch" else 409)
    assert said in error["message"]
    refused = server.chat(name)
    assert refused.status_code in {404, 409}
    if code != "model_unsupported_arch":
        # Whatever a failure has caused names the incident.
        incident = server.http.get(f"/admin/incidents/{error['incident_id']}").json()
        assert (incident["model"], incident["code"]) == (name, code)
        assert "incident_id" in refused.json()["error"]

    records = server.http.get(
        "/admin/models/compatibility", params={"model": name, "outcome": "fail"}
    ).json()["records"]
    assert records[-1]["metadata"]["code"] == code
    if code == "model_unsupported_arch":
        for _ in polls():
            if server.http.get(f"/admin/models/{name}").status_code == 404:
                break
        assert len(records) == 1
    else:
        # Deterministic failures end in quarantine, by themselves.
        server.await_state(name, "quarantined")
    server.http.post("/admin/models/unload", json={"model_id": name})


def test_a_client_that_goes_away_frees_the_slot(server: Server, models_dir: Path) -> None:
    write_script(models_dir, "busy", tokens=COUNTING, repeat=True, step_delay_s=0.01)
    server.load("busy")
    stream = server.stream("busy")
    next(stream)
    assert server.model("busy")["in_flight"] == 1
    stream.close()  # type: ignore[attr-defined]
    for _ in polls(5):
        if server.model("busy")["in_flight"] == 0:
            break
    assert server.chat("busy", max_tokens=2).json()["choices"][0]["message"]["content"] == "0 1 "


def test_an_unload_answers_the_requests_that_run(server: Server, models_dir: Path) -> None:
    write_script(models_dir, "leaving", tokens=COUNTING, repeat=True, step_delay_s=0.01)
    server.load("leaving")
    pid = server.model("leaving")["pid"]
    stream = server.stream("leaving")
    next(stream)
    leave = {"model_id": "leaving", "drain_timeout_sec": 0.1}
    unloaded = server.http.post("/admin/models/unload", json=leave)
    assert unloaded.status_code == 200
    assert "model_unloaded" in list(stream)[-1]
    await_gone([pid])
    assert server.http.get("/admin/models/leaving").status_code == 404


def test_a_worker_frozen_in_its_idle_loop_is_found_by_the_request_it_does_not_take(
    server: Server, models_dir: Path
) -> None:
    write_script(models_dir, "idler", faults=[{"at": "idle", "kind": "hang", "times": 1}])
    server.load("idler")
    for _ in polls(10):
        if (models_dir / "idler.sim.fault-0").exists():
            break
    assert server.chat("idler").status_code == 200
    assert server.model("idler")["generation"] == 2
    incident = server.http.get("/admin/incidents?model=idler").json()["incidents"][0]
    assert incident["kind"] == "hang"
    assert "not taken up" in incident["reason"]

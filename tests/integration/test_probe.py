"""Backends are tried beside what is loaded, in workers that are thrown away."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from supervisor.accounts import FILE_NAME
from tests.support.server import Server, await_gone, polls, serve, text_of, write_script

COUNTING = [f"{number} " for number in range(300)]
FAULTY = ("load", "segfault"), ("prompt", "hang"), ("prompt", "abort"), ("load", "hang")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(tiny_gguf, folder / "tiny.gguf")
    (folder / "cut.gguf").write_bytes(tiny_gguf.read_bytes()[:5000])
    write_script(folder, "steady", tokens=COUNTING, step_delay_s=0.015)
    write_script(folder, "slow", tokens=["Hel", "lo"], load_delay_s=15.0)
    grow = {"at": "loaded", "kind": "grow", "size": 2**26}
    write_script(folder, "growing", step_delay_s=0.06, faults=[grow])
    write_script(folder, "mended", faults=[{"at": "load", "kind": "segfault", "times": 3}])
    write_script(folder, "recovers", faults=[{"at": "load", "kind": "segfault", "times": 2}])
    for at, kind in FAULTY:
        write_script(folder, f"{at}-{kind}", faults=[{"at": at, "kind": kind}])
    return folder


@pytest.fixture(scope="module")
def server(home: Path, models_dir: Path) -> Iterator[Server]:
    with serve(
        home,
        *("--models-dir", str(models_dir)),
        OPTA_LMX_LOAD_STALL_S="2",
        OPTA_LMX_CANARY_TIMEOUT_S="2",
        OPTA_LMX_BEAT_INTERVAL_S="0.2",
        OPTA_LMX_MEMORY_INTERVAL_S="0.2",
        OPTA_LMX_RESTART_DELAY_CAP_S="0.1",
        OPTA_LMX_WORKER_MEMORY_LIMIT_BYTES=str(2**29),
    ) as running:
        assert running.load("steady").status_code == 200
        yield running


def probe(server: Server, model_id: str, **options: object) -> httpx.Response:
    return server.http.post("/admin/models/probe", json={"model_id": model_id, **options})


def only_result(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    (result,) = answer.json()["results"]
    found: dict[str, Any] = result
    return found


def records(server: Server, model_id: str) -> list[dict[str, Any]]:
    answer = server.http.get("/admin/models/compatibility", params={"model": model_id})
    found: list[dict[str, Any]] = answer.json()["records"]
    return found


def accounts(home: Path, model_id: str) -> list[dict[str, Any]]:
    path = home / FILE_NAME
    known = json.loads(path.read_text())["accounts"] if path.exists() else []
    return [account for account in known if account["key"]["model"] == model_id]


def await_workers(server: Server, count: int) -> list[int]:
    """Poll until there are so many workers, sooner than a slow load ends; their pids."""
    for _ in polls(8):
        if len(workers := server.workers()) == count:
            return [worker.pid for worker in workers]
    raise AssertionError(f"{server.workers()}\n{server.text}")


def test_a_gguf_passes_on_llama(server: Server) -> None:
    answer = probe(server, "tiny", context_length=512)
    result = only_result(answer)
    assert (result["backend"], result["outcome"], result["code"]) == ("llama", "pass", None)
    assert result["time_to_load_ms"] > 0
    assert result["tokens_per_s"] > 0
    assert result["time_to_first_token_s"] > 0
    assert result["memory_gb"] > 0.01
    assert answer.json()["recommended"] == "llama"
    (record,) = records(server, "tiny")
    assert (record["outcome"], record["backend_version"]) == ("pass", result["backend_version"])
    assert record["metadata"]["probe"] is True
    assert record["metadata"]["tokens_per_s"] == result["tokens_per_s"]
    assert record["metadata"]["load_parts_s"].keys() == {"start", "import", "load", "canary"}
    assert server.http.get("/admin/models/tiny").status_code == 404
    verdicts = server.http.get(
        "/admin/models/compatibility/recommendations", params={"model": "tiny"}
    ).json()["recommendations"]
    assert [verdict["verdict"] for verdict in verdicts if verdict["installed"]] == ["allow"]


def test_the_same_canary_as_that_of_a_load(server: Server) -> None:
    assert only_result(probe(server, "tiny"))["outcome"] == "pass"
    assert server.load("tiny").status_code == 200
    load, tried = records(server, "tiny")[:2]
    assert "probe" not in load["metadata"]
    assert tried["metadata"]["probe"] is True
    for same in ("canary", "output_digest", "digest", "completion_tokens"):
        assert load["metadata"][same] == tried["metadata"][same]
    server.http.post("/admin/models/unload", json={"model_id": "tiny"})


def test_a_folder_passes_on_mlx_from_its_path(server: Server, tiny_mlx: Path) -> None:
    answer = probe(server, "folder", path=str(tiny_mlx), backends=["llama", "mlx", "mlx"])
    assert answer.status_code == 200, answer.text
    llama, mlx = answer.json()["results"]
    assert (llama["backend"], llama["outcome"]) == ("llama", "skipped")
    assert llama["code"] == "model_unsupported_backend"
    assert "does not read mlx models" in llama["reason"]
    assert (mlx["backend"], mlx["outcome"]) == ("mlx", "pass")
    assert answer.json()["recommended"] == "mlx"


def test_faults_of_a_probe_touch_nothing_else(server: Server, home: Path) -> None:
    (steady,) = await_workers(server, 1)
    payloads: list[str] = []
    reader = threading.Thread(target=lambda: payloads.extend(server.stream("steady")))
    reader.start()
    expected = {
        "load-segfault": ("model_loader_crashed", "SIGSEGV"),
        "prompt-hang": ("model_canary_failed", "not passed within 2 s"),
        "prompt-abort": ("model_canary_failed", "SIGABRT"),
    }
    for model_id, (code, said) in expected.items():
        answer = probe(server, model_id)
        result = only_result(answer)
        assert (result["outcome"], result["code"]) == ("fail", code)
        assert said in result["reason"]
        assert answer.json()["recommended"] is None
        assert said in answer.json()["reason"]
        (record,) = records(server, model_id)
        assert (record["outcome"], record["reason"]) == ("fail", result["reason"])
        assert (record["metadata"]["probe"], record["metadata"]["code"]) == (True, code)
        assert server.http.get(f"/admin/models/{model_id}").status_code == 404
        assert server.http.get("/admin/incidents", params={"model": model_id}).json()["count"] == 0
        assert accounts(home, model_id) == []
    assert "Segmentation fault" in records(server, "load-segfault")[0]["metadata"]["output_tail"]
    reader.join(30)
    assert text_of(payloads) == "".join(COUNTING)
    assert payloads[-1] == "[DONE]"
    view = server.model("steady")
    assert (view["pid"], view["generation"]) == (steady, 1)
    assert view["readiness"]["crash_count"] == 0
    assert await_workers(server, 1) == [steady]


def test_failures_of_probes_are_not_counted(server: Server) -> None:
    for _ in range(2):
        assert only_result(probe(server, "recovers"))["outcome"] == "fail"
    answer = server.load("recovers")
    assert answer.status_code == 200, answer.text
    assert answer.json()["readiness"]["crash_count"] == 0
    assert server.model("recovers")["generation"] == 1
    server.http.post("/admin/models/unload", json={"model_id": "recovers"})


def test_a_load_that_makes_no_progress_ends(server: Server) -> None:
    result = only_result(probe(server, "load-hang"))
    assert (result["outcome"], result["code"]) == ("fail", "model_load_timeout")
    (record,) = records(server, "load-hang")
    assert record["metadata"]["kind"] == "load_timeout"


def test_a_deadline_of_the_caller_is_no_fault_of_the_model(server: Server) -> None:
    result = only_result(probe(server, "slow", timeout_s=1))
    assert (result["outcome"], result["code"]) == ("fail", "model_load_timeout")
    assert result["reason"] == "not through within the 1 s of this probe"
    assert records(server, "slow") == []
    await_workers(server, 1)


def test_what_grows_in_a_probe_is_stopped_at_its_limit(server: Server) -> None:
    result = only_result(probe(server, "growing"))
    assert result["outcome"] == "fail"
    assert "over its limit" in result["reason"]
    assert result["memory_gb"] > 0.5
    (record,) = records(server, "growing")
    assert record["metadata"]["kind"] == "memory"
    assert server.model("steady")["generation"] == 1


def test_what_cannot_be_probed_is_refused_as_a_load(server: Server) -> None:
    def code_of(answer: httpx.Response) -> tuple[int, str]:
        return answer.status_code, answer.json()["error"]["code"]

    assert code_of(probe(server, "nobody")) == (404, "model_not_found")
    assert code_of(probe(server, "cut")) == (409, "model_incomplete")
    unknown = probe(server, "tiny", backends=["lama"])
    assert code_of(unknown) == (422, "model_unsupported_backend")
    assert unknown.json()["error"]["param"] == "backends"


def test_a_quarantined_model_can_be_probed_and_stays_quarantined(
    server: Server, home: Path
) -> None:
    server.load("mended")
    server.await_state("mended", "quarantined")
    for _ in polls(10):
        account = accounts(home, "mended")
        if account and account[0]["quarantined"]:
            break
    before = server.model("mended")
    answer = probe(server, "mended")
    assert only_result(answer)["outcome"] == "pass"
    assert answer.json()["recommended"] == "simulated"
    assert "quarantine has to be released" in answer.json()["reason"]
    after = server.model("mended")
    for name in ("generation", "pid", "last_incident_id"):
        assert after[name] == before[name]
    for name in ("state", "reason", "crash_count"):
        assert after["readiness"][name] == before["readiness"][name]
    assert accounts(home, "mended") == account != []
    assert server.load("mended").json()["error"]["code"] == "model_unstable"
    (verdict,) = server.http.get(
        "/admin/models/compatibility/recommendations", params={"model": "mended"}
    ).json()["recommendations"]
    assert verdict["verdict"] == "deny"


def test_one_probe_at_a_time_and_it_ends_with_its_client(server: Server) -> None:
    (steady,) = await_workers(server, 1)
    body = json.dumps({"model_id": "slow"}).encode()
    head = b"POST /admin/models/probe HTTP/1.1\r\nhost: localhost\r\n"
    address = server.http.base_url.host, server.http.base_url.port
    with socket.create_connection(address) as client:
        client.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        await_workers(server, 2)
        second = probe(server, "tiny")
        assert second.status_code == 409
        assert second.json()["error"]["code"] == "model_conflict"
        assert "'slow' is being probed" in second.json()["error"]["message"]
        assert second.headers["retry-after"] == "5"
    assert await_workers(server, 1) == [steady]
    for _ in polls(15):
        if (answer := probe(server, "tiny")).status_code == 200:
            break
    assert only_result(answer)["outcome"] == "pass"


def test_a_server_that_stops_takes_its_probe_along(tmp_path: Path, models_dir: Path) -> None:
    fast = {"OPTA_LMX_SHUTDOWN_GRACE_S": "0.2"}
    with serve(tmp_path / "home", "--models-dir", str(models_dir), **fast) as server:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(probe, server, "slow")
            pids = await_workers(server, 1)
            assert server.stop() == 0
            answer = waiting.result(15)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "server_shutting_down"
        await_gone(pids)


def test_a_killed_server_leaves_no_probe_behind(tmp_path: Path, models_dir: Path) -> None:
    with (
        serve(tmp_path / "home", "--models-dir", str(models_dir)) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(probe, server, "slow")
        pids = await_workers(server, 1)
        server.stop(signal.SIGKILL)
        await_gone(pids)
        assert isinstance(waiting.exception(15), httpx.HTTPError)

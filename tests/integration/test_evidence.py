"""What is left after a failure: incidents, memory kills, the ledger of workers."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.memory_cgroup import NotAllowed, memory_cgroup
from tests.support.server import NO_RESUME, Server, await_gone, polls, serve, write_script


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    with serve(
        tmp_path_factory.mktemp("evidence") / "home",
        *("--models-dir", str(models_dir)),
        OPTA_LMX_DECODE_STALL_S="2",
        OPTA_LMX_BEAT_INTERVAL_S="0.2",
        OPTA_LMX_MEMORY_INTERVAL_S="0.2",
    ) as running:
        yield running


def test_a_crash_mid_stream_leaves_a_whole_record(server: Server, models_dir: Path) -> None:
    write_script(models_dir, "crash", tokens=["some ", "words "], repeat=True, step_delay_s=0.01)
    server.load("crash")
    stream = server.stream("crash", "a secret", NO_RESUME)
    for _ in range(5):
        next(stream)
    server.kill_worker("crash", signal.SIGSEGV)
    error = json.loads(list(stream)[-1])["error"]
    assert error["code"] == "model_crashed"
    assert error["tokens_sent"] >= 3
    server.await_state("crash", "routable", generation=2)

    summary = server.http.get("/admin/incidents", params={"model": "crash"}).json()
    assert summary["count"] == 1
    assert summary["incidents"][0]["id"] == error["incident_id"]
    assert server.model("crash")["last_incident_id"] == error["incident_id"]
    incident = server.http.get(f"/admin/incidents/{error['incident_id']}").json()
    assert (incident["phase"], incident["kind"]) == ("decode", "signal")
    assert (incident["exit_status"], incident["signal"]) == (-11, "SIGSEGV")
    assert "Fatal Python error: Segmentation fault" in incident["stacks"]
    assert "worker/session.py" in incident["stacks"]
    assert len(incident["in_flight"]) == 1
    assert "a secret" not in json.dumps(incident)
    assert [moment["what"] for moment in incident["timeline"]][:5] == [
        "spawned",
        "first sign of life",
        "said hello",
        "loaded",
        "routable",
    ]
    assert incident["memory"][-1]["bytes"] > 1_000_000
    assert server.http.get("/admin/incidents/nothing").status_code == 404


def test_a_hang_leaves_the_stacks_of_the_hung_worker(server: Server, models_dir: Path) -> None:
    write_script(
        models_dir,
        "hang",
        faults=[{"at": "token", "n": 1, "kind": "hang", "prompt_contains": "hang", "times": 1}],
    )
    server.load("hang")
    assert server.chat("hang", "hang once").status_code == 200
    (incident,) = server.http.get("/admin/incidents", params={"model": "hang"}).json()["incidents"]
    whole = server.http.get(f"/admin/incidents/{incident['id']}").json()
    assert whole["kind"] == "hang"
    assert "strike" in whole["stacks"]


def test_a_worker_over_its_memory_limit_is_stopped(tmp_path: Path) -> None:
    write_script(tmp_path, "greedy", tokens=["some ", "words "])
    with serve(
        tmp_path / "home",
        *("--models-dir", str(tmp_path)),
        OPTA_LMX_WORKER_MEMORY_LIMIT_BYTES="1000000",
        OPTA_LMX_MEMORY_INTERVAL_S="0.1",
    ) as server:
        server.load("greedy", wait=False)
        view = server.await_state("greedy", "quarantined")
        assert "over its limit of 0.00 GB" in view["readiness"]["reason"]
        incidents = server.http.get("/admin/incidents").json()["incidents"]
        assert [incident["kind"] for incident in incidents] == ["memory"] * 3


def test_explain_tells_what_happened_and_what_to_do(server: Server, models_dir: Path) -> None:
    write_script(models_dir, "unsound", tokens=["!"])
    server.load("unsound")
    server.await_state("unsound", "quarantined")
    told = subprocess.check_output(
        [sys.executable, "-m", "supervisor.cli", "explain", "unsound", "--url", server.url],
        text=True,
    )
    incidents = server.http.get("/admin/incidents", params={"model": "unsound"}).json()["incidents"]
    assert [(i["kind"], i["phase"]) for i in incidents] == [("canary", "canary")] * 3
    assert "unsound is quarantined since" in told
    assert "repeats itself" in told
    assert "opta-lmx release unsound" in told


def test_a_crash_under_the_canary_is_in_the_canary(server: Server, models_dir: Path) -> None:
    write_script(
        models_dir,
        "at-trial",
        faults=[{"at": "token", "n": 2, "kind": "segfault", "times": 1}],
    )
    server.load("at-trial")
    server.await_state("at-trial", "routable", generation=2)
    (incident,) = server.http.get("/admin/incidents?model=at-trial").json()["incidents"]
    assert (incident["kind"], incident["phase"]) == ("signal", "canary")


def test_what_a_backend_says_at_length_is_cut(server: Server, models_dir: Path) -> None:
    """A load that is refused with all of an unreadable script in the message."""
    name = "talkative"
    (models_dir / f"{name}.sim.json").write_text(json.dumps({"x" * 100_000: 1}))
    answer = server.load(name)
    assert answer.json()["error"]["code"] == "model_incomplete"
    assert len(answer.text) < 2000


def test_what_a_killed_server_left_is_swept_at_the_next_start(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    left = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    other = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    try:
        started = psutil.Process(left.pid).create_time()
        workers = [
            {"pid": left.pid, "started_at": started},
            # The same number, but another process than the one that was recorded.
            {"pid": other.pid, "started_at": started - 1000.0},
        ]
        ledger = json.dumps({"schema_version": 1, "workers": workers})
        (home / "workers.json").write_text(ledger)
        with serve(home):
            await_gone([left.pid])
            assert other.poll() is None
    finally:
        for process in (left, other):
            process.kill()
            process.wait()


def test_the_ledger_names_the_workers_that_run(server: Server, models_dir: Path) -> None:
    write_script(models_dir, "listed")
    server.load("listed")
    home = next(models_dir.parent.glob("evidence*/home"))
    pid = server.model("listed")["pid"]
    for _ in polls(5):
        workers = json.loads((home / "workers.json").read_text())["workers"]
        if pid in [worker["pid"] for worker in workers]:
            break
    assert pid in [worker["pid"] for worker in workers]
    os.kill(pid, 0)


def test_a_pass_tells_where_the_time_of_its_load_went(tmp_path: Path) -> None:
    write_script(tmp_path, "slow", load_delay_s=0.3, prefill_delay_s=0.05)
    with serve(tmp_path / "home", "--models-dir", str(tmp_path)) as server:
        server.load("slow")
        found = server.http.get("/admin/models/compatibility?model=slow").json()["records"]
        metadata = found[0]["metadata"]
    parts = metadata["load_parts_s"]
    assert list(parts) == ["start", "import", "load", "canary"]
    assert all(seconds >= 0 for seconds in parts.values())
    assert parts["start"] > 0
    assert parts["load"] >= 0.3
    assert parts["canary"] >= 0.05
    assert metadata["load_s"] == pytest.approx(sum(parts.values()), abs=0.005)


def test_a_real_kill_by_the_kernel_is_one_for_memory(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        try:
            cgroup = stack.enter_context(memory_cgroup(600 * 1024**2))
        except NotAllowed as reason:
            pytest.skip(f"no cgroup: {reason}")
        write_script(
            tmp_path,
            "greedy",
            repeat=True,
            step_delay_s=0.01,
            faults=[{"at": "token", "n": 3, "kind": "grow", "prompt_contains": "more", "times": 1}],
        )
        write_script(tmp_path, "modest")
        # The server is in it before it can look where it is.
        into = f"open({str(cgroup / 'cgroup.procs')!r}, 'w').write('0')"
        server = stack.enter_context(
            serve(
                tmp_path / "home",
                *("--models-dir", str(tmp_path)),
                patch=into,
                OPTA_LMX_MEMORY_LOW_WATER_BYTES="0",
            )
        )
        for name in ("greedy", "modest"):
            assert server.load(name).status_code == 200
        last = list(server.stream("greedy", "more", NO_RESUME))[-1]
        assert "out-of-memory killer" in json.loads(last)["error"]["message"]
        view = server.await_state("greedy", "routable", generation=2)
        assert view["readiness"]["crash_count"] == 1
        # It explained that death, and no other one.
        server.kill_worker("modest")
        server.await_state("modest", "routable", generation=2)
        kinds = {
            i["model"]: i["kind"] for i in server.http.get("/admin/incidents").json()["incidents"]
        }
        assert kinds == {"greedy": "memory", "modest": "signal"}

"""Processes that do not start, do not end, or are left behind."""

import json
import os
import signal
import threading
from pathlib import Path

import psutil
import pytest

from tests.support.server import alive, await_gone, polls, serve, start, write_script
from worker.faults import BOOT_FAULTS_ENV, FAULTS_ENV


def test_what_waits_is_answered_while_no_process_can_be_made(tmp_path: Path) -> None:
    write_script(tmp_path, "stuck", prefill_delay_s=0.5)
    with serve(tmp_path / "home", "--models-dir", str(tmp_path)) as server:
        server.load("stuck")
        answers: list[int] = []
        waiting = threading.Thread(target=lambda: answers.append(server.chat("stuck").status_code))
        waiting.start()
        for _ in polls():
            if server.model("stuck")["in_flight"]:
                break
        process = psutil.Process(server.process.pid)
        limits = process.rlimit(psutil.RLIMIT_NOFILE)
        process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds(), limits[1]))
        server.kill_worker("stuck")
        waiting.join(20)
        assert answers == [500]
        process.rlimit(psutil.RLIMIT_NOFILE, limits)
        view = server.await_state("stuck", "routable", generation=2)
        assert view["readiness"]["crash_count"] == 1


@pytest.mark.parametrize("phase", ["serving", "loading"])
def test_no_worker_outlives_a_killed_supervisor(tmp_path: Path, phase: str) -> None:
    write_script(tmp_path, "quick", step_delay_s=0.01, repeat=True)
    write_script(tmp_path, "stuck", faults=[{"at": "load", "kind": "hang"}])
    with serve(tmp_path / "home", "--models-dir", str(tmp_path)) as server:
        if phase == "serving":
            server.load("quick")
            server.load("quick")
        else:
            server.load("stuck", wait=False)
            server.await_state("stuck", "loading")
        pids = [worker.pid for worker in server.workers()]
        assert pids
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
        await_gone(pids)


def test_faults_are_refused_where_only_their_backend_is_enabled(tmp_path: Path) -> None:
    write_script(tmp_path, "mined", faults=[{"at": "token", "kind": "kill"}])
    boot_faults = tmp_path / "boot-faults.json"
    boot_faults.write_text(json.dumps([{"at": "spawn", "kind": "kill"}]))
    write_script(tmp_path, "sound")
    environment = {FAULTS_ENV: "", BOOT_FAULTS_ENV: str(boot_faults)}
    with serve(tmp_path / "home", "--models-dir", str(tmp_path), **environment) as server:
        refused = server.load("mined")
        assert refused.status_code == 400
        assert "not enabled" in refused.json()["error"]["message"]
        assert server.load("sound").status_code == 200


def test_two_supervisors_on_one_home(tmp_path: Path) -> None:
    with serve(tmp_path / "home") as first:
        second = start(tmp_path / "home")
        output, _ = second.communicate(timeout=30)
        assert second.returncode == 1
        assert f"pid {first.process.pid}" in output
        assert first.http.get("/healthz").status_code == 200


SPAWNS_FAIL_ONCE = """
import supervisor.worker as worker
real, left = worker.WorkerProcess, [1]
def process(*arguments, **options):
    if left:
        raise RuntimeError(f"can't start new thread{left.pop()}")
    return real(*arguments, **options)
worker.WorkerProcess = process
"""


def test_whatever_keeps_a_process_from_starting_is_an_answer(tmp_path: Path) -> None:
    write_script(tmp_path, "model")
    with serve(tmp_path / "home", "--models-dir", str(tmp_path), patch=SPAWNS_FAIL_ONCE) as server:
        refused = server.load("model")
        assert (refused.status_code, refused.json()["error"]["code"]) == (500, "internal_error")
        assert "new thread" in refused.json()["error"]["message"]
        view = server.await_state("model", "routable", generation=1)
        assert view["readiness"]["crash_count"] == 0


CANNOT_BE_KILLED = """
import supervisor.process as process
process.KILL_TIMEOUT_S = 0.5
process.WorkerProcess._signal = lambda self, number: None
"""


def test_a_process_that_cannot_be_killed_blocks_nothing(tmp_path: Path) -> None:
    write_script(tmp_path, "stuck", faults=[{"at": "close", "kind": "hang"}])
    write_script(tmp_path, "other", tokens=["0 ", "1 "])
    with serve(
        tmp_path / "home",
        "--models-dir",
        str(tmp_path),
        patch=CANNOT_BE_KILLED,
        OPTA_LMX_STOP_GRACE_S="0.5",
    ) as server:
        assert server.load("stuck").status_code == 200
        assert server.load("other").status_code == 200
        pid = server.model("stuck")["pid"]
        unloaded = server.http.post("/admin/models/unload", json={"model_id": "stuck"})
        assert unloaded.status_code == 500
        assert f"process {pid} cannot be killed" in unloaded.json()["error"]["message"]
        server.await_text("CRITICAL")
        assert server.load("stuck").status_code == 200
        assert server.model("stuck")["pid"] != pid
        assert alive(pid)
        os.kill(pid, signal.SIGKILL)
        for _ in polls(10):
            if "has ended after all" in server.text:
                break
        else:
            raise AssertionError(server.text)
        assert server.chat("other", max_tokens=1).status_code == 200
        # The second one is as stuck as the first.
        assert server.stop() == 0
    await_gone([pid])


def test_a_worker_that_hangs_before_it_is_guarded_is_a_load_that_timed_out(tmp_path: Path) -> None:
    """Asked for its stacks, it would die of that, and be counted as killed."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(
        "import os, time\nif 'OPTA_LMX_WORKER_BOOT' in os.environ:\n    time.sleep(600)\n"
    )
    write_script(tmp_path, "model")
    with serve(
        tmp_path / "home",
        "--models-dir",
        str(tmp_path),
        PYTHONPATH=str(tmp_path / "path"),
        OPTA_LMX_START_TIMEOUT_S="1",
    ) as server:
        refused = server.load("model")
        assert refused.json()["error"]["code"] == "model_load_timeout"
        incident = server.http.get("/admin/incidents").json()["incidents"][-1]
        assert incident["kind"] == "load_timeout"

"""The supervisor as a process: what it imports, how it starts and how it ends."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from supervisor.fleet import Fleet
from supervisor.marks import MARK_ENV, home_mark
from supervisor.metrics import Metrics
from supervisor.settings import Settings
from tests.support.server import alive, polls, serve, start, write_script

HEAVY = {"mlx", "mlx_lm", "llama_cpp", "transformers", "numpy", "torch", "tokenizers", "jinja2"}


def test_the_supervisor_imports_no_inference_library() -> None:
    program = (
        "import json, sys\n"
        "import supervisor.cli, supervisor.main, supervisor.gateway.app\n"
        "from supervisor.runtimes import installed_backends\n"
        "installed_backends(simulated=True)\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", program], text=True))
    assert not HEAVY & {name.split(".")[0] for name in loaded}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_in_the_middle_of_everything(tmp_path: Path, number: int) -> None:
    write_script(tmp_path, "busy", repeat=True, step_delay_s=0.01)
    write_script(tmp_path, "slow", load_delay_s=60)
    with serve(
        tmp_path / "home", "--models-dir", str(tmp_path), OPTA_LMX_SHUTDOWN_GRACE_S="0.2"
    ) as server:
        server.load("busy")
        server.load("slow", wait=False)
        stream = server.stream("busy")
        next(stream)
        last: list[str] = []
        reader = threading.Thread(target=lambda: last.extend(stream))
        reader.start()
        assert server.stop(number) == 0
        reader.join(10)
        assert "server_shutting_down" in last[-1]
        assert "Traceback" not in server.text


def test_a_port_in_use_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with serve(tmp_path / "first") as server:
        port = server.url.rsplit(":", 1)[1]
        second = start(tmp_path / "second", port=port)
        output, _ = second.communicate(timeout=30)
        assert second.returncode == 1
        assert "cannot listen" in output


def test_a_model_that_cannot_be_loaded_at_the_start_is_announced(tmp_path: Path) -> None:
    with serve(tmp_path / "home", "--model", str(tmp_path / "nowhere.gguf")) as server:
        assert server.http.get("/healthz").status_code == 200
        ready = server.http.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["reason"]
    assert "model_not_found" in server.text


def test_a_home_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    # For root no folder is read-only: a folder in the place of each file is.
    names = ("supervisor.pid", "workers.json", "failure-accounts.json", "fingerprint.key")
    for name in (*names, "compatibility-registry.json"):
        (home / name / "occupied").mkdir(parents=True)
    (home / "incidents").write_text("a file in the place of the folder")
    write_script(tmp_path, "model")
    with serve(home, "--models-dir", str(tmp_path)) as server:
        server.await_text("will be forgotten")
        assert server.load("model").status_code == 200
        server.kill_worker("model")
        server.await_state("model", "routable", generation=2)
        assert server.http.get("/admin/incidents").json()["count"] == 1
        assert server.chat("model").status_code == 200


def test_nothing_outlives_a_killed_supervisor_not_even_a_workers_detached_helper(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    write_script(
        tmp_path, "model", repeat=True, faults=[{"at": "token", "n": 1, "kind": "detached_helper"}]
    )
    with serve(home, "--models-dir", str(tmp_path)) as server:
        server.load("model")
        for _ in polls():
            if len(_marked(home)) >= 2:
                break
        server.stop(signal.SIGKILL)
        for _ in polls(10):
            if not _marked(home):
                return
        raise AssertionError(f"still there: {_marked(home)}")


def _marked(home: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK_ENV, "").startswith(home_mark(home)):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_a_fault_of_the_supervisor_itself_is_a_failure_to_its_service_manager(
    tmp_path: Path,
) -> None:
    """Restart=on-failure has to see it, and no worker may be left."""
    program = (
        "import asyncio, supervisor.gateway.server as server\n"
        "async def broken(self):\n"
        "    await asyncio.wait_for(self.exit_asked.wait(), 2)\n"
        "server.Server.main_loop = broken\n"
        "from supervisor.cli import main\n"
        "main()\n"
    )
    model = write_script(tmp_path, "model")
    home = tmp_path / "home"
    command = [sys.executable, "-c", program, "serve", "--port", "0", "--home", str(home)]
    command += ["--enable-simulated", "--model", str(model)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ}, check=False
    )
    assert done.returncode not in {0, 2}, done.stderr
    assert not _marked(home)


def sleeper(seconds: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", seconds])


async def test_a_start_waits_until_what_was_left_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds its memory until then. A process that was killed may take a while to end."""
    left = sleeper("0.5")
    monkeypatch.setattr("supervisor.sweep.kill_marked", lambda _: [left.pid])
    fleet = Fleet(Settings(home=tmp_path), Metrics(), [], on_autoload=lambda *_: None)
    assert not alive(left.pid)
    left.wait()
    await fleet.stop()


async def test_a_start_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = sleeper("60")
    monkeypatch.setattr("supervisor.sweep.kill_marked", lambda _: [left.pid])
    monkeypatch.setattr("supervisor.sweep.SWEEP_TIMEOUT_S", 0.2)
    fleet = Fleet(Settings(home=tmp_path), Metrics(), [], on_autoload=lambda *_: None)
    assert str(left.pid) in caplog.text
    left.kill()
    left.wait()
    await fleet.stop()

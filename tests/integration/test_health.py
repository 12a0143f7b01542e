"""``/admin/health`` and ``/admin/status`` of a real server, well and ill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.server import Server, polls, serve, write_script

FAST = {"OPTA_LMX_RESTART_DELAY_CAP_S": "0.1", "OPTA_LMX_FAILURE_THRESHOLD": "2"}
#: Of this machine, not of the server.
SURROUNDINGS = {"disk_low", "memory_low", "event_loop_late"}


def reasons(server: Server) -> dict[str, Any]:
    answer = server.http.get("/admin/health")
    assert answer.status_code == 200
    found = answer.json()
    assert (found["status"] == "ok") == (not found["reasons"])
    return {each["code"]: each for each in found["reasons"] if each["code"] not in SURROUNDINGS}


def test_what_is_wrong_is_told_and_what_is_well_again_is_not(tmp_path: Path) -> None:
    folder, home = tmp_path / "models", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    write_script(folder, "talker", tokens=["Hel", "lo"])
    registry = home / "compatibility-registry.json"
    registry.write_text("{nonsense")
    arguments = ("--models-dir", str(folder), "--model", "talker", "--model", "missing")
    with serve(home, *arguments, **FAST) as server:
        server.await_state("talker", "routable")
        for _ in polls():
            if "model_not_loaded" in (found := reasons(server)):
                break
        assert set(found) == {"state_file_set_aside", "model_not_loaded"}
        assert found["model_not_loaded"]["model"] == "missing"
        (aside,) = home.glob("compatibility-registry.json.unreadable-*")
        assert aside.name in found["state_file_set_aside"]["message"]
        aside.unlink()
        # The registry cannot be written from here on ...
        registry.unlink()
        registry.mkdir()
        (registry / "in the way").touch()
        for generation in (1, 2):
            server.await_state("talker", "routable", generation=generation)
            server.kill_worker("talker")
        server.await_state("talker", "quarantined")
        for _ in polls():
            if "state_not_written" in (found := reasons(server)):
                break
        assert set(found) == {"state_not_written", "model_quarantined", "model_not_loaded"}
        assert found["model_quarantined"]["model"] == "talker"
        # ... until here: an operator repairs what is wrong, one by one.
        (registry / "in the way").unlink()
        registry.rmdir()
        assert server.http.post("/admin/models/talker/release").status_code == 200
        assert server.load("talker").status_code == 200
        assert server.chat("talker").status_code == 200
        write_script(folder, "missing", tokens=["Hel", "lo"])
        assert server.load("missing").status_code == 200
        for _ in polls():
            if not (found := reasons(server)):
                break
        assert found == {}
        status = server.http.get("/admin/status").json()
        assert status["pid"] == server.process.pid
        assert status["versions"]["backends"]["simulated"]
        assert [model["id"] for model in status["models"]] == ["missing", "talker"]
        assert status["counters"]["worker_failures"] == 2
        assert status["counters"]["requests"] > 10
        assert status["memory"]["measured_bytes"] > 10**6
        assert status["memory"]["promised_bytes"] > 0
        assert 0 <= status["event_loop_lag_s"] < 60
        assert 0 < status["uptime_s"] < 120
        # The events that follow can be asked for from here.
        last = status["last_event_id"]
        told = server.http.get(
            "/admin/events", params={"follow": "false"}, headers={"Last-Event-ID": last}
        )
        assert told.text.count("event: ") == 1
        assert f"id: {last}\nevent: hello" in told.text

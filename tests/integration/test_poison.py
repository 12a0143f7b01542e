"""One request that kills its model costs the others a pause, and is not let in again."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server, serve, write_script

COUNTING = [f"{number} " for number in range(60)]
SETTINGS = {
    "OPTA_LMX_RESTART_DELAY_CAP_S": "0.05",
    "OPTA_LMX_FAILURE_THRESHOLD": "10",
    # Who comes while the model is restarted waits, as some of those that are sent at once may.
    "OPTA_LMX_LOAD_ON_DEMAND": "true",
}


def ask(server: Server, content: str) -> dict[str, Any]:
    answer = server.chat("model", content, max_tokens=60)
    return {"status": answer.status_code, **answer.json()}


def incidents(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.http.get("/admin/incidents").json()["incidents"]
    return found


@pytest.mark.parametrize(
    "fault",
    [
        {"at": "prompt", "kind": "segfault"},
        {"at": "token", "kind": "abort", "n": 20},
        {"at": "token", "kind": "raise", "n": 1},
    ],
    ids=["in its prompt", "at a token", "by an exception"],
)
def test_seven_finish_and_one_is_convicted(tmp_path: Path, fault: dict[str, object]) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    write_script(
        folder,
        "model",
        tokens=COUNTING,
        step_delay_s=0.01,
        faults=[{**fault, "prompt_contains": "poison"}],
    )
    home = tmp_path / "home"
    arguments = ("--models-dir", str(folder), "--enable-simulated", "--max-sequences", "8")
    with serve(home, *arguments, **SETTINGS) as server:
        assert server.load("model").status_code == 200
        contents = [f"good {number}" for number in range(7)]
        contents.insert(3, "poison")
        with ThreadPoolExecutor(8) as pool:
            answers = dict(zip(contents, pool.map(lambda c: ask(server, c), contents), strict=True))
        bad = answers.pop("poison")
        for answer in answers.values():
            assert answer["status"] == 200, answer
            [choice] = answer["choices"]
            assert choice["message"]["content"] == "".join(COUNTING)
            assert answer["usage"]["completion_tokens"] == 60
        assert (bad["status"], bad["error"]["code"]) == (422, "request_poisoned")
        newest, first = incidents(server)
        assert (first["convicted"], newest["id"]) == (None, bad["error"]["incident_id"])
        details = server.http.get(f"/admin/incidents/{newest['id']}").json()
        assert details["in_flight"] == [details["convicted"]]
        assert "poison" not in json.dumps(details)
        # Refused at the door, without a crash.
        generation = server.model("model")["generation"]
        again = ask(server, "poison")
        assert (again["status"], again["error"]["code"]) == (422, "request_poisoned")
        assert again["error"]["incident_id"] == newest["id"]
        assert server.model("model")["generation"] == generation == 3
        assert server.model("model")["readiness"]["crash_count"] == 2
        assert ask(server, "another")["status"] == 200
    with serve(home, *arguments, **SETTINGS) as server:
        assert server.load("model").status_code == 200
        assert ask(server, "poison")["status"] == 422

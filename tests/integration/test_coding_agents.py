"""A coding agent as its users run it, on a model that calls its tools."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from client_setup import node

from tests.support.server import Server

TIMEOUT_S = 60.0


def test_qwen_code_runs_what_a_model_calls(client_server: Server, tmp_path: Path) -> None:
    home = node()
    if home is None:
        pytest.skip("there is no Node.js")
    settings = tmp_path / "home" / ".qwen" / "settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"privacy": {"usageStatisticsEnabled": False}}))
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        **os.environ,
        "HOME": str(tmp_path / "home"),
        "OPENAI_BASE_URL": f"{client_server.url}/v1",
        "OPENAI_API_KEY": "none",
    }
    # The script would call again and again, so the agent is given one turn.
    agent = subprocess.run(
        [
            home / "node_modules" / ".bin" / "qwen",
            *("--auth-type", "openai", "--model", "coder"),
            *("--yolo", "--max-session-turns", "1", "--prompt", "Make the file."),
        ],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (work / "made.txt").is_file(), agent.stdout + agent.stderr
    assert (work / "made.txt").read_text() == "made\n"

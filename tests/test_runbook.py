"""The runbook is what happens: its commands, in their order, and what they print."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from supervisor import jsonfile, modelfiles
from supervisor.runtimes import SIMULATED_VERSION
from tests.support import hub
from tests.support.server import NO_RESUME, Server, polls, serve, write_script

ROOT = Path(__file__).resolve().parents[1]
RUNBOOK = ROOT / "docs" / "runbook.md"

#: The version of the story's backend that the model of the story was well on.
EARLIER_VERSION = "0.9"

#: Told with a hub and a real model, by a test of its own.
DOWNLOAD = "A model that is not on disk"

INCIDENT_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")


class Step(NamedTuple):
    """A command of the runbook, what it prints there, and the heading it stands under."""

    heading: str
    command: str
    printed: str


def steps() -> Iterator[Step]:
    heading = ""
    text = RUNBOOK.read_text()
    blocks = r"^(?P<level>#+ |\d+\. \*\*)(?P<heading>[^\n*.]+)|^ *```console\n(?P<block>.*?)^ *```"
    for found in re.finditer(blocks, text, re.MULTILINE | re.DOTALL):
        if found["heading"] is not None:
            heading = found["heading"]
            continue
        for command in textwrap.dedent(found["block"]).removeprefix("$ ").split("\n$ "):
            line, _, printed = command.partition("\n")
            yield Step(heading, line, printed)


class Walk:
    """Does what the runbook says on a server whose models follow the story."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._incident_id = ""

    def crash(self) -> None:
        """Three times in the middle of an answer."""
        for generation in (1, 2, 3):
            self.server.await_state("qwen3-4b", "routable", generation=generation)
            stream = self.server.stream("qwen3-4b", "a secret", NO_RESUME)
            for _ in range(3):
                next(stream)
            self.server.kill_worker("qwen3-4b", signal.SIGSEGV)
            assert "error" in list(stream)[-1]
        view = self.server.await_state("qwen3-4b", "quarantined")
        self._incident_id = view["last_incident_id"]
        for _ in polls():
            incident = self.server.http.get(f"/admin/incidents/{self._incident_id}").json()
            if incident["exit_status"] is not None:
                return

    def take(self, step: Step) -> None:
        command = INCIDENT_ID.sub(self._incident_id, step.command)
        command = command.replace("http://127.0.0.1:8000", self.server.url)
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "OPTA_LMX_URL": self.server.url,
            },
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        if not pattern(step.printed).fullmatch(timeless(done.stdout)):
            pytest.fail(f"$ {command}\n{done.stdout}\n--- the runbook has:\n{step.printed}")


def timeless(text: str) -> str:
    """Without what differs from one machine, one run and one backend to the next."""
    text = text.replace("simulated", "llama")
    text = INCIDENT_ID.sub("ID", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)
    text = re.sub(r"(llama|backend_version\": \"|version\": \")( ?)\d[\d.]*", r"\1\2VERSION", text)
    text = re.sub(r"\bon \d[\d.]*\b", "on VERSION", text)
    text = re.sub(r"\b\d+\.\d+(e-?\d+)?\b", "NUMBER", text)
    return "".join(re.sub(r"\s+", " ", line).strip() + "\n" for line in text.splitlines())


def pattern(printed: str) -> re.Pattern[str]:
    """``...`` on a line of its own stands for any lines, in a line for any text."""
    lines = []
    for line in timeless(printed).splitlines():
        if line == "...":
            lines.append(r"(?:.*\n)*?")
        else:
            lines.append(re.escape(line).replace(re.escape("..."), ".*") + r"\n")
    return re.compile("".join(lines))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where the model passed on an earlier version of the backend, with this file."""
    models = tmp_path / "home" / "models"
    models.mkdir(parents=True)
    words = [f"{n} " for n in range(1, 200)]
    model = write_script(models, "qwen3-4b", tokens=words, repeat=True, step_delay_s=0.01)
    write_script(models, "small")
    passed = {
        "model": "qwen3-4b",
        "backend": "simulated",
        "backend_version": EARLIER_VERSION,
        "outcome": "pass",
        "reason": "canary passed",
        "metadata": {"digest": modelfiles.inspect(model).digest},
        "timestamp": 1_790_000_000.0,
    }
    jsonfile.write(
        tmp_path / "home" / "compatibility-registry.json",
        {"schema_version": 1, "records": [passed]},
    )
    return tmp_path / "home"


@pytest.mark.skipif(shutil.which("curl") is None, reason="the runbook uses curl")
def test_an_incident_goes_as_the_runbook_says(home: Path) -> None:
    assert EARLIER_VERSION < SIMULATED_VERSION
    with serve(home) as server:
        walk = Walk(server)
        assert server.load("small").status_code == 200
        server.http.post("/admin/models/unload", json={"model_id": "small"})
        #: What happens before the first command under a heading.
        story: dict[str, Callable[[], None]] = {"Status": walk.crash}
        told = []
        for step in steps():
            if step.heading in {"Checking an installation", DOWNLOAD}:
                continue
            story.pop(step.heading, lambda: None)()
            walk.take(step)
            told.append(step.heading)
        assert not story
        order = ["The normal load", "Status", "Registry", "Unload", "Fallback"]
        assert list(dict.fromkeys(told)) == [*order, "Controlled override", "Evidence"]
        # The secret of the request is in nothing that goes into a report.
        assert "a secret" not in server.http.get("/admin/incidents").text


@pytest.mark.skipif(shutil.which("curl") is None, reason="the runbook uses curl")
def test_a_download_goes_as_the_runbook_says(tmp_path: Path, tiny_gguf: Path) -> None:
    told = [step for step in steps() if step.heading == DOWNLOAD]
    with hub.running() as loopback:
        files = {f"small-{name}.gguf": tiny_gguf.read_bytes() for name in ("Q4_K_M", "Q8_0")}
        loopback.add("org/small", files)
        settings = {
            "OPTA_LMX_HUB_ENDPOINT": loopback.url,
            "OPTA_LMX_HUB_CACHE_DIR": str(tmp_path / "cache"),
            "OPTA_LMX_DOWNLOAD_DISK_RESERVE_BYTES": "0",
            "HF_HOME": str(tmp_path / "hf"),
        }
        with serve(tmp_path / "home", **settings) as server:
            walk = Walk(server)
            for step in told:
                walk.take(step)
    assert len(told) == 5
    assert loopback.served.keys() == {"small-Q8_0.gguf"}


def test_checking_an_installation_names_what_is_there() -> None:
    commands = [step.command for step in steps() if step.heading == "Checking an installation"]
    assert commands
    for command in commands:
        program, *_, path = command.split()
        assert program == ".venv/bin/python"
        assert (ROOT / path).exists(), path

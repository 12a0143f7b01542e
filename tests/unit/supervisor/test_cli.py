"""The command line against the real application on a socket, over the fake fleet."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import uvicorn
from typer.testing import CliRunner, Result

from protocol.errors import CodedError, ErrorCode
from supervisor import main as supervisor_main
from supervisor.chat_session import Session
from supervisor.cli import app
from supervisor.client import Client, ClientError
from supervisor.gate import LoadSpec
from supervisor.gateway.app import application, create_gateway
from supervisor.gateway.server import BindRefused
from supervisor.journal import LoadRefused
from supervisor.metrics import Metrics
from supervisor.presets import Preset, PresetParameters
from supervisor.probe import ProbeSpec
from supervisor.settings import ModelSetting, Settings
from supervisor.views import BackendProbe, ProbeResult
from tests.support.fake_fleet import FakeFleet, readiness, view

KEYS = {"OPTA_LMX_ADMIN_KEY": "a", "OPTA_LMX_API_KEY": "i"}


class Listening(uvicorn.Server):
    """Runs in a thread; ``ready`` is set once it accepts connections."""

    ready: threading.Event

    async def main_loop(self) -> None:
        self.ready.set()
        await super().main_loop()


@pytest.fixture
def fleet() -> FakeFleet:
    fleet = FakeFleet()
    fleet.add(view("org/m", in_flight=1))
    return fleet


@pytest.fixture
def reread() -> dict[str, Any]:
    """The settings that a reload finds changed."""
    return {}


@pytest.fixture
def url(fleet: FakeFleet, tmp_path: Path, reread: dict[str, Any]) -> Iterator[str]:
    preset = Preset(
        model="org/m", system_prompt="Be\nbrief.", parameters=PresetParameters(temperature=0.5)
    )
    names = {"aliases": {"best": ("org/big", "org/m")}, "presets": {"short": preset}}
    settings = Settings(home=tmp_path, admin_key="a", api_key="i", **names)  # type: ignore[arg-type]
    gateway = create_gateway(
        fleet, settings, Metrics(), lambda: msgspec.structs.replace(settings, **reread)
    )
    config = uvicorn.Config(application(gateway), log_config=None, access_log=False, ws="none")
    server = Listening(config)
    server.ready = threading.Event()
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert server.ready.wait(20)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("OPTA_LMX_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPTA_LMX_HOME", str(tmp_path))


def opta(*arguments: str, env: dict[str, str] | None = None, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, env=KEYS if env is None else env, input=stdin)


def test_ps(url: str, fleet: FakeFleet) -> None:
    fleet.add(view("b", readiness=readiness("quarantined", "3 crashes"), memory_gb=None))
    result = opta("ps", "--url", url)
    assert result.exit_code == 0
    header, b, m = result.stdout.splitlines()
    assert header.split()[:3] == ["MODEL", "STATE", "BACKEND"]
    assert b.split() == [
        *("b", "quarantined", "simulated", "-", "2048", "0", "0", "0", "3", "crashes")
    ]
    assert m.split()[:7] == ["org/m", "routable", "simulated", "0.50", "GB", "2048", "1"]
    assert [model["id"] for model in json.loads(opta("ps", "--url", url, "--json").stdout)] == [
        "b",
        "org/m",
    ]


def test_models(url: str, fleet: FakeFleet) -> None:
    here = {"id": "a", "path": "/a.gguf", "source": "models_dir", "format": "gguf"}
    option = {"backend": "llama", "version": None, "usable": False, "reason": "it is not installed"}
    known = {
        **{"complete": True, "kind": "generate", "architecture": "llama", "quantization": "Q4_K_M"},
        **{"parameters": 8_030_000_000, "size_bytes": 4_900_000_000, "context_length": 8192},
        "backends": [option],
    }
    fleet.records.on_disk = [
        {**here, **known},
        {**here, "id": "b", "complete": False, "problem": "b is incomplete: it is empty"},
        {**here, **known, "id": "c", "parameters": 135e6, "backends": [{**option, "usable": True}]},
    ]
    result = opta("models", "--url", url)
    assert result.exit_code == 0
    header, a, b, c = result.stdout.splitlines()
    assert header.split()[:3] == ["MODEL", "FORMAT", "KIND"]
    assert a.split()[:8] == ["a", "gguf", "generate", "llama", "8.0B", "Q4_K_M", "4.90", "GB"]
    assert a.rstrip().endswith("not on llama: it is not installed")
    assert b.rstrip().endswith("b is incomplete: it is empty")
    assert c.split()[4] == "135M"
    assert c.split()[-1] == "llama"
    assert json.loads(opta("models", "--url", url, "--json").stdout) == fleet.records.on_disk


def probed(outcome: Literal["pass", "fail"], recommended: str | None) -> ProbeResult:
    skipped = BackendProbe(
        backend="mlx",
        backend_version=None,
        outcome="skipped",
        code="model_unsupported_backend",
        reason="not here\x1b[2J",
    )
    tried = BackendProbe(
        backend="llama",
        backend_version="0.3",
        outcome=outcome,
        reason="canary passed",
        time_to_load_ms=1234.5,
        time_to_first_token_s=0.02,
        tokens_per_s=99.94,
        memory_gb=1.5,
    )
    return ProbeResult(
        model_id="m", results=[skipped, tried], recommended=recommended, reason="because"
    )


def test_probe(url: str, fleet: FakeFleet) -> None:
    fleet.found = probed("pass", "llama")
    result = opta("probe", "org/x", "--url", url)
    assert result.exit_code == 0, result.output
    header, mlx, llama, recommended = result.stdout.splitlines()
    assert header.split()[:3] == ["BACKEND", "VERSION", "OUTCOME"]
    assert mlx.split()[:7] == ["mlx", "-", "skipped", "-", "-", "-", "-"]
    assert mlx.rstrip().endswith("not here[2J (model_unsupported_backend)")
    assert llama.split()[:5] == ["llama", "0.3", "pass", "1.2", "s"]
    assert llama.split()[5:10] == ["0.020", "s", "99.9", "1.50", "GB"]
    assert recommended == "recommended: llama (because)"
    assert fleet.probes == [ProbeSpec(load=LoadSpec(model_id="org/x"))]
    as_json = opta("probe", "org/x", "--url", url, "--json")
    assert json.loads(as_json.stdout)["results"][1]["tokens_per_s"] == 99.94


def test_a_probe_that_finds_nothing_says_so_with_its_status(url: str, fleet: FakeFleet) -> None:
    fleet.found = probed("fail", None)
    options = ("--backend", "llama", "--backend", "mlx", "--context-length", "512")
    more = ("--allow-unsupported-runtime", "--timeout-s", "2.5")
    result = opta("probe", "x=/models/x.gguf", *options, *more, "--url", url)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "recommended: none (because)"
    load = LoadSpec(
        model_id="x",
        path="/models/x.gguf",
        allow_unsupported_runtime=True,
        context_length=512,
    )
    assert fleet.probes == [ProbeSpec(load=load, backends=("llama", "mlx"), timeout_s=2.5)]
    fleet.refusal = CodedError(ErrorCode.MODEL_CONFLICT, "another one runs")
    refused = opta("probe", "x", "--url", url)
    assert refused.exit_code == 1
    assert "another one runs (model_conflict)" in refused.stderr


def test_presets(url: str) -> None:
    result = opta("presets", "--url", url)
    assert result.exit_code == 0
    header, short, best = result.stdout.splitlines()
    assert header.split()[:3] == ["NAME", "KIND", "MODEL"]
    assert short.split() == ["short", "preset", "org/m", "temperature=0.5", "-", "Be", "brief."]
    assert best.split() == ["best", "alias", "org/big,", "org/m", "-", "-", "-"]
    told = json.loads(opta("presets", "--url", url, "--json").stdout)
    assert told["aliases"] == {"best": ["org/big", "org/m"]}


def test_reload_says_what_has_changed(url: str, reread: dict[str, Any]) -> None:
    assert opta("reload", "--url", url).stdout == "nothing has changed\n"
    reread |= {"api_key": "new", "port": 9, "aliases": {"fast": "org/m"}}
    result = opta("reload", "--url", url)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "port: 8000 -> 9 (needs a restart)",
        'aliases: {"best": ["org/big", "org/m"]} -> {"fast": "org/m"}',
        'api_key: "(secret)" -> "(secret)"',
    ]
    reread |= {"host": "0.0.0.0", "admin_key": None}
    result = opta("reload", "--url", url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "reachable from outside" in result.stderr


def test_ps_shows_probation_and_nothing_that_moves_the_cursor(url: str, fleet: FakeFleet) -> None:
    fleet.add(view("p", readiness=readiness(reason="a\x1b[2Jb\n", probation=True)))
    result = opta("ps", "--url", url)
    assert "routable (probation)" in result.stdout
    assert "\x1b" not in result.stdout


def test_load_unload_release(url: str, fleet: FakeFleet, tmp_path: Path) -> None:
    fleet.load_may_end.set()
    result = opta("load", "org/new", "--backend", "llama", "--url", url)
    assert result.stdout == "org/new is routable in 0.0 s\n"
    assert result.stderr.startswith("loading org/new ...")
    assert [(spec.backend, spec.path) for spec in fleet.loads] == [("llama", None)]
    path = tmp_path / "tiny.gguf"
    path.touch()
    assert opta("load", str(path), "--no-wait", "--url", url).stdout == "tiny is loading\n"
    last = fleet.loads[-1]
    assert (last.model_id, last.path) == ("tiny", str(path))
    assert opta("load", f"n={path}", "--no-wait", "--url", url).stdout == "n is loading\n"
    assert opta("unload", "org/new", "--url", url).stdout == "org/new unloaded\n"
    fleet.add(view("org/q", readiness=readiness("quarantined")))
    result = opta("release", "org/q", "--url", url)
    assert result.stdout == "org/q released from quarantine\n"


def test_a_failed_load_shows_the_servers_words(url: str, fleet: FakeFleet) -> None:
    fleet.refusal = CodedError(ErrorCode.MODEL_LOADER_CRASHED, "it broke")
    result = opta("load", "x", "--url", url)
    assert result.exit_code == 1
    assert "error: it broke (model_loader_crashed)" in result.stderr


def test_a_file_that_is_not_there_is_no_id() -> None:
    result = opta("load", "./no.gguf")
    assert (result.exit_code, result.stderr) == (2, "error: ./no.gguf: no such file or folder\n")


def test_errors_of_the_server_are_shown(url: str, fleet: FakeFleet) -> None:
    result = opta("unload", "nobody", "--url", url)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error: nobody is not loaded (model_not_found)\n"
    result = opta("ps", "--url", url, env={})
    assert result.exit_code == 1
    assert "(invalid_admin_key)" in result.stderr


def test_no_server() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    for command in (["ps"], ["chat", "m", "--prompt", "x"]):
        result = opta(*command, "--url", url)
        assert result.exit_code == 1
        assert f"error: no server at {url}" in result.stderr
        assert "opta-lmx serve" in result.stderr


def test_url_from_the_environment(url: str) -> None:
    assert opta("ps", env={**KEYS, "OPTA_LMX_URL": url}).exit_code == 0


def test_port_from_the_environment(url: str) -> None:
    port = url.rpartition(":")[2]
    assert opta("ps", env={**KEYS, "OPTA_LMX_PORT": port}).exit_code == 0
    result = opta("ps", env={**KEYS, "OPTA_LMX_PORT": "0"})
    assert (result.exit_code, "OPTA_LMX_PORT=0" in result.stderr) == (1, True)


def test_keys_that_fit_no_header_are_an_error(url: str) -> None:
    result = opta("ps", "--url", url, "--admin-key", "ü")
    assert result.exit_code == 1
    assert "--admin-key / OPTA_LMX_ADMIN_KEY must be printable ASCII" in result.stderr


def test_a_bad_url_is_an_error_not_a_traceback() -> None:
    for url in ("http://[", "ftp://x", "localhost:1"):
        result = opta("ps", "--url", url)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
    assert "--url" in opta("ps", "--url", "localhost:1").stderr


def test_chat_prompt_and_pipe(url: str, fleet: FakeFleet) -> None:
    result = opta("chat", "org/m", "--prompt", "Hi", "--system", "S", "--url", url)
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    result = opta("chat", "org/m", "--max-tokens", "7", "--url", url, stdin="two\nlines\n")
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    first, second = [submitted.request for submitted in fleet.requests]
    assert [(m.role, m.content) for m in first.messages or []] == [("system", "S"), ("user", "Hi")]
    assert [(m.role, m.content) for m in second.messages or []] == [("user", "two\nlines\n")]
    assert (second.max_tokens, second.sampling.temperature) == (7, 0.7)
    assert opta("chat", "org/m", "--url", url, stdin="").exit_code == 1


def test_chat_errors(url: str, fleet: FakeFleet) -> None:
    fleet.refusal = CodedError(ErrorCode.MODEL_UNSTABLE, "it is quarantined")
    result = opta("chat", "org/m", "--prompt", "x", "--url", url)
    assert result.exit_code == 1
    assert result.stderr == "error: it is quarantined (model_unstable)\n"


def test_chat_survives_odd_text(url: str, fleet: FakeFleet) -> None:
    result = CliRunner().invoke(app, ["chat", "org/m", "--url", url], env=KEYS, input=b"\xff")
    assert result.exit_code == 1
    assert "not valid UTF-8" in result.stderr
    result = opta("chat", "org/m", "--prompt", "\udcff", "--url", url)
    assert result.exit_code == 1
    assert "not valid UTF-8" in result.stderr
    fleet.script = ("a\x1b[31m\tb", "\x07\x9b\r\nc")
    assert opta("chat", "org/m", "--prompt", "x", "--url", url).stdout == "a[31m\tb\nc\n"
    fleet.script = ("\N{GRINNING FACE}",)
    result = CliRunner(charset="ascii").invoke(
        app, ["chat", "org/m", "--prompt", "x", "--url", url], env=KEYS
    )
    assert (result.exit_code, result.stdout) == (0, "?\n")


def test_ctrl_c_is_the_exit_status_of_one_question(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Iterator[str]:
        yield "Hel"
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "chat", interrupted)
    result = opta("chat", "org/m", "--prompt", "x", "--url", url)
    assert (result.exit_code, result.stdout) == (130, "Hel\n")


def test_a_conversation_with_nobody_does_not_begin(url: str, fleet: FakeFleet) -> None:
    with Client(url, api_key="i") as client, pytest.raises(ClientError, match="model_not_found"):
        Session(client, "nobody").converse()


@pytest.mark.parametrize("farewell", ["/exit", " /quit "])
def test_a_conversation_ends_when_told(
    url: str, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch, farewell: str
) -> None:
    monkeypatch.setattr("builtins.input", lambda _prompt: farewell)
    with Client(url, api_key="i") as client:
        Session(client, "org/m").converse()
    assert not fleet.requests


def test_a_conversation_remembers(
    url: str,
    fleet: FakeFleet,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = iter(["one", "", "two", "three"])

    def typed(_prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        fleet.refusal = CodedError(ErrorCode.MODEL_NOT_READY, "wait") if line == "two" else None
        return line

    monkeypatch.setattr("builtins.input", typed)
    with Client(url, api_key="i") as client:
        Session(client, "org/m").converse()
    captured = capsys.readouterr()
    assert captured.out.count("Hello\n") == 2
    assert captured.err == "error: wait (model_not_ready)\n"
    messages = fleet.requests[-1].request.messages or []
    assert [message.content for message in messages] == ["one", "Hello", "three"]


def test_an_answer_cut_short_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                # All of it: closing with unread data would reset the connection.
                asked = b""
                while not asked.endswith(b"}"):
                    asked += connection.recv(65536)
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
                    b'data: {"choices":[{"delta":{"content":"Hel"}}]}\n\n'
                )

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with Client(url) as client:
            texts = client.chat("m", [])
            assert next(texts) == "Hel"
            with pytest.raises(ClientError, match="ended early"):
                next(texts)
        thread.join()


def test_serve_passes_its_flags_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Settings] = []

    def run(settings: Settings, reread: Callable[[], Settings]) -> None:
        # A reload reads the same flags, variables and file.
        given.extend((settings, reread()))

    monkeypatch.setattr(supervisor_main, "run", run)
    monkeypatch.setattr("supervisor.logs.set_up", lambda level: None)
    result = opta(
        *("serve", "--port", "1234", "--model", "x=/a", "--model", "org/b"),
        *("--enable-simulated", "--max-sequences", "2", "--context-length", "512"),
        *("--max-queue", "9", "--prompt-cache-bytes", "0"),
        *("--models-dir", str(tmp_path / "models"), "--log-level", "warning"),
        env={"OPTA_LMX_ADMIN_KEY": "k"},
    )
    assert result.exit_code == 0, result.output
    assert given == 2 * [
        Settings(
            home=tmp_path,
            port=1234,
            models=(ModelSetting(path="/a", id="x"), ModelSetting(path="org/b")),
            models_dir=tmp_path / "models",
            enable_simulated=True,
            max_sequences=2,
            max_queue=9,
            prompt_cache_bytes=0,
            context_length=512,
            log_level="warning",
            admin_key="k",
        )
    ]


def test_serve_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    result = opta("serve", "--port", "99999")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: --port: must be a port from 0 to 65535, not 99999\n"

    def refuse(_settings: Settings, _reread: object) -> None:
        raise BindRefused("cannot listen")

    monkeypatch.setattr(supervisor_main, "run", refuse)
    monkeypatch.setattr("supervisor.logs.set_up", lambda level: None)
    result = opta("serve")
    assert (result.exit_code, result.stderr) == (1, "error: cannot listen\n")


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, supervisor.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"rich", "httpx", "uvicorn", "starlette", "zmq", "asyncio", "msgspec"}


@pytest.mark.parametrize("argument", ["version", "--version"])
def test_version(argument: str) -> None:
    result = opta(argument)
    assert result.exit_code == 0
    assert result.stdout.strip()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_full_disk_is_said_plainly() -> None:
    command = [sys.executable, "-m", "supervisor.cli", "version"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: cannot write the output: No space left on device\n"


def test_a_home_that_cannot_be_made_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("supervisor.logs.set_up", lambda level: None)
    (tmp_path / "file").touch()
    home = str(tmp_path / "file" / "home")
    result = opta("serve", "--home", home, "--port", "0", env={})
    assert result.exit_code == 1
    expected = f"error: cannot use {home} as the home folder (--home / OPTA_LMX_HOME): Not a"
    assert result.stderr.startswith(expected)


def test_events(url: str, fleet: FakeFleet) -> None:
    fleet.journal.add(LoadRefused(model="org/m", code="model_incomplete", message="cut\x1b[2J"))
    result = opta("events", "--no-follow", "--url", url)
    assert result.exit_code == 0
    started, refused = result.stdout.splitlines()
    assert "started, pid" in started
    assert refused.endswith(" org/m: load refused: cut[2J (model_incomplete)")
    only = opta("events", "--no-follow", "--kind", "load_refused", "--json", "--url", url)
    (event,) = [json.loads(text) for text in only.stdout.splitlines()]
    assert (event["event"], event["id"]) == ("load_refused", f"{fleet.journal.start_id}-1")
    wrong = opta("events", "--kind", "token", "--url", url)
    assert wrong.exit_code == 1
    assert "model_changed" in wrong.stderr
    assert opta("events", "--url", url, env={}).exit_code == 1


def test_status_and_health(url: str, fleet: FakeFleet) -> None:
    told = opta("status", "--url", url)
    assert told.exit_code == 0
    assert told.stdout.startswith("health: ok\nserver: ")
    assert "model: org/m routable (ready) on simulated, 0.50 GB" in told.stdout
    assert "requests: 1 running, 0 queued" in told.stdout
    assert "0.50 GB held by workers, 1.00 GB promised, 8.00 GB available" in told.stdout
    assert json.loads(opta("status", "--json", "--url", url).stdout)["pid"] == os.getpid()
    well = opta("health", "--url", url)
    assert (well.exit_code, well.stdout) == (0, "ok\n")
    fleet.overview.facts = replace(fleet.overview.facts, left=[4711])
    ill = opta("health", "--url", url)
    assert ill.exit_code == 1
    assert ill.stdout.splitlines() == [
        "degraded",
        "  process_left_behind: process 4711 should have ended, and holds its memory",
    ]
    assert json.loads(opta("health", "--json", "--url", url).stdout)["status"] == "degraded"

"""One server for the tests of other people's clients, and what they ask of its models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.server import Server, serve, write_script
from tests.support.tiny_bert import write_tiny_bert

WEATHER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
#: A template of a model that thinks and calls tools as Hermes does.
AGENT_TEMPLATE = (
    "{% if tools %}<tool_call>{{ tool_call.name }}{% endif %}<think>{{ c.split('</think>') }}"
)
#: What the model ``agent`` says, torn where a model might tear it.
AGENT = [
    *("<think>", "Where", " is it?", "</think>", "\n\n", "I look", ".", "<tool", "_call>"),
    *('{"name": "get_', 'weather", "argu', 'ments": {"city": "Par', 'is", "days": 2}}'),
    *("</tool_call>", '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}'),
    "</tool_call>",
]
#: What the model ``coder`` calls the shell of an agent with.
CODE = "echo made > made.txt"
CODER = [
    *("Now. ", "<tool_call>", '{"name": "run_shell_', 'command", "arguments": {"comm'),
    *(f'and": "{CODE}", "is_back', 'ground": false}}', "</tool_call>"),
]
CRASH = {"at": "token", "n": 3, "kind": "kill", "prompt_contains": "crash"}


@contextmanager
def serve_client_models(folder: Path, tiny: Path, demo: Path) -> Iterator[Server]:
    """Real models ``tiny``, ``demo``, ``embedder`` and ``ranker``; scripted ones ``agent``, which
    says ``AGENT``, ``coder``, which has ``CODE`` run, and ``talker``, which counts and is killed
    by a prompt with "crash"."""
    models = folder / "models"
    models.mkdir()
    write_tiny_bert(models / "embedder.gguf")
    write_tiny_bert(models / "ranker.gguf", pooling="rank")
    write_script(models, "agent", tokens=AGENT, chat_template=AGENT_TEMPLATE)
    coder = {"chat_template": AGENT_TEMPLATE, "context_length": 1_000_000}
    write_script(models, "coder", tokens=CODER, **coder)
    write_script(models, "talker", tokens=["one", " two", " three", " four"], faults=[CRASH])
    given = [f"--model=tiny={tiny}", f"--model=demo={demo}"]
    # Every client's tests kill it once.
    often = {"OPTA_LMX_FAILURE_THRESHOLD": "100", "OPTA_LMX_RESTART_DELAY_CAP_S": "0.1"}
    with serve(folder / "home", "--models-dir", str(models), *given, **often) as server:
        for model in ("embedder", "ranker", "agent", "coder", "talker"):
            answer = server.load(model)
            assert answer.status_code == 200, answer.text
        for model in ("tiny", "demo"):
            server.await_state(model, "routable")
        yield server

"""Kills a worker at one exact token of an answer, and reads what the client gets of it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.server import Server, polls, serve

_PLAN = "OPTA_LMX_TEST_INTERRUPTION"

#: Runs in the server. A file says how many tokens of the first answer it sees are passed on
#: before the worker is killed; nothing that it says after that counts, so it is exact.
_PATCH = f"""
import os, pathlib, signal
from protocol.messages import Accepted, Step
from supervisor.generation import Generation
plan = pathlib.Path(os.environ["{_PLAN}"])
passed_on = Generation.on_message
progress = {{}}
def on_message(self, message):
    if progress.get(self.pid, ()) is None:
        return
    at = int(plan.read_text()) if plan.exists() else None
    if at is None or not isinstance(message, Accepted | Step):
        return passed_on(self, message)
    made, first = progress.setdefault(self.pid, [0, None])
    if isinstance(message, Step):
        if first is None:
            first = min(delta.request_id for delta in message.deltas)
        made += sum(len(d.tokens) for d in message.deltas if d.request_id == first)
    progress[self.pid] = [made, first]
    passed_on(self, message)
    if made >= at:
        plan.unlink()
        progress[self.pid] = None
        os.kill(self.pid, signal.SIGKILL)
Generation.on_message = on_message
"""


#: Runs in the workers: what is sent together begins in one step, however busy the machine is.
#: Otherwise it is not the same batch, and the last digits may be others.
_IN_WORKERS = """
import os
if "OPTA_LMX_WORKER_BOOT" in os.environ:
    import time
    import worker.session, worker.transport
    from protocol.messages import Generate
    worker.session.SUBMISSION_BUDGET_S = 10.0
    first = worker.transport.DataLink.wait
    def wait(self):
        message = first(self)
        if isinstance(message, Generate):
            time.sleep(0.05)
        return message
    worker.transport.DataLink.wait = wait
"""


class Interruptible:
    """A server whose workers die when told; no failure quarantines, each restart is at once."""

    def __init__(self, server: Server, plan: Path) -> None:
        self.server = server
        self._plan = plan

    def arm(self, tokens: int) -> None:
        """Let the worker of the next answer die once so many of its tokens were passed on."""
        scratch = self._plan.with_suffix(".new")
        scratch.write_text(str(tokens))
        scratch.rename(self._plan)

    @property
    def armed(self) -> bool:
        return self._plan.exists()

    def together(self, model: str, bodies: list[dict[str, Any]]) -> list[Answer]:
        """Stream answers that a worker begins with in the same step."""
        pid = int(self.server.model(model)["pid"])
        os.kill(pid, signal.SIGSTOP)
        with ThreadPoolExecutor(len(bodies)) as pool:
            streams = []
            for number, body in enumerate(bodies, 1):
                # In this order, which is that of the rows of a batch.
                streams.append(pool.submit(stream, self.server, body))
                for _ in polls(10):
                    if self.server.model(model)["in_flight"] == number:
                        break
            os.kill(pid, signal.SIGCONT)
            return [each.result(120) for each in streams]


@contextmanager
def serve_interruptible(
    folder: Path, *arguments: str, **environment: str
) -> Iterator[Interruptible]:
    plan = folder / "interruption"
    patches = folder / "patches"
    patches.mkdir()
    (patches / "sitecustomize.py").write_text(_IN_WORKERS)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(patches), os.environ.get("PYTHONPATH", "")]),
        _PLAN: str(plan),
        "OPTA_LMX_FAILURE_THRESHOLD": "100000",
        "OPTA_LMX_RESTART_DELAY_CAP_S": "0.001",
        # What is found of a prompt changes the sums of what is computed of it.
        "OPTA_LMX_PROMPT_CACHE_BYTES": "0",
        **environment,
    }
    with serve(folder / "home", *arguments, patch=_PATCH, **environment) as server:
        yield Interruptible(server, plan)


@dataclass
class Answer:
    """A streamed chat answer, as a client puts it together."""

    roles: int = 0
    text: str = ""
    reasoning: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    logprobs: list[Any] = field(default_factory=list)
    finish: list[str] = field(default_factory=list)
    usage: list[Any] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    errors: list[Any] = field(default_factory=list)
    done: int = 0

    @property
    def resumes(self) -> int:
        """As the comment before the end says."""
        told = [each for each in self.comments if each.startswith(": resumed ")]
        assert len(told) <= 1
        return int(told[0].split()[-1]) if told else 0

    @property
    def content(self) -> tuple[object, ...]:
        """All that must not depend on whether there was a crash."""
        return (
            *(self.roles, self.text, self.reasoning, self.calls, self.logprobs),
            *(self.finish, self.usage, self.errors, self.done),
        )

    def take(self, line: str) -> None:
        if line.startswith(":"):
            self.comments.append(line)
        elif line == "data: [DONE]":
            self.done += 1
        elif line:
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                self.errors.append(chunk["error"])
                return
            if chunk.get("usage"):
                self.usage.append(chunk["usage"])
            for choice in chunk["choices"]:
                self._take_choice(choice)

    def _take_choice(self, choice: dict[str, Any]) -> None:
        delta = choice["delta"]
        self.roles += "role" in delta
        self.text += delta.get("content") or ""
        self.reasoning += delta.get("reasoning_content") or ""
        for piece in delta.get("tool_calls", ()):
            call = self.calls.setdefault(piece["index"], [])
            if "id" in piece:
                # A second beginning would be a second name.
                call.append(piece["function"]["name"])
                call.append("")
            call[-1] += piece["function"]["arguments"]
        if choice["logprobs"]:
            self.logprobs += choice["logprobs"]["content"]
        if choice["finish_reason"]:
            self.finish.append(choice["finish_reason"])


#: What is drawn or timed anew for every answer.
_PASSING = {
    *("id", "item_id", "call_id", "created", "created_at", "completed_at", "timings"),
    "sequence_number",
}
#: Texts that are streamed in pieces, of any size.
_PIECES = {
    *("content", "reasoning_content", "arguments", "text", "delta", "thinking", "partial_json"),
}


def gist(body: str) -> list[tuple[str, list[str]]]:
    """What an answer says, however its events are cut: pieces that follow each other are one."""
    lines = body.splitlines() if not body.startswith("{") else [f"data: {body}"]
    said: list[tuple[str, list[str]]] = []
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if event.get("type") == "ping":
            continue
        if event.get("type") == "message_start":
            # How far the answer is by then is a matter of moments.
            del event["message"]["usage"]
        for part in _parts(event):
            texts: list[str] = []
            frame = json.dumps(_blank(part, texts))
            if said and said[-1][0] == frame:
                texts = [first + more for first, more in zip(said.pop()[1], texts, strict=True)]
            said.append((frame, texts))
    return said


def _parts(event: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A chunk with pieces of several calls as one for each; their beginnings by themselves."""
    match event:
        case {"choices": [{"delta": {"tool_calls": calls}, **choice}], **chunk}:
            for call in calls:
                piece = {"index": call["index"], "function": {**call["function"]}}
                if "id" in call:
                    begun = {**call, "function": {**call["function"], "arguments": ""}}
                    yield {**chunk, "choices": [{**choice, "delta": begun}]}
                    del piece["function"]["name"]
                if piece["function"]["arguments"]:
                    yield {**chunk, "choices": [{**choice, "delta": piece}]}
        case _:
            yield event


def _blank(value: Any, texts: list[str], key: str = "") -> Any:
    """Without what is passing; its texts are put by."""
    if isinstance(value, dict):
        return {k: _blank(v, texts, k) for k, v in value.items() if k not in _PASSING}
    if isinstance(value, list):
        return [_blank(each, texts) for each in value]
    if isinstance(value, str) and key in _PIECES:
        texts.append(value)
        return "..."
    return value


def stream(server: Server, body: dict[str, Any], headers: dict[str, str] | None = None) -> Answer:
    answer = Answer()
    body = {"stream": True, "stream_options": {"include_usage": True}, **body}
    with server.http.stream(
        "POST", "/v1/chat/completions", json=body, headers=headers or {}
    ) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            answer.take(line)
    return answer

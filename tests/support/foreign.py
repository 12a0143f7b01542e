"""Clients in another process, in another language or with other dependencies.

They take one JSON object per line, ``{"call": name, "arguments": {...}}``, and answer each with
``{"result": ...}`` or ``{"error": {"type": ..., "message": ..., "status": ...}}``.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class ForeignError(Exception):
    """The client raised ``type``; ``status`` is that of the HTTP answer, if it knows."""

    def __init__(self, kind: str, message: str, status: int | None) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message
        self.status = status


class ForeignClient:
    """A running client."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, call: str, **arguments: Any) -> Any:
        """Let it make a call; raises ForeignError when it raises."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"call": call, "arguments": arguments}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, f"the client has ended: {process.wait(10)}"
        answer = json.loads(line)
        if error := answer.get("error"):
            raise ForeignError(error["type"], error["message"], error.get("status"))
        return answer["result"]


@contextmanager
def foreign_client(
    command: Sequence[str | Path], folder: Path, **environment: str
) -> Iterator[ForeignClient]:
    """Run a client in ``folder`` until the block ends."""
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        try:
            yield ForeignClient(process)
        finally:
            process.kill()

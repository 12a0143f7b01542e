"""What the operator reads on stdout: where the server is, and how each configured model fared."""

from __future__ import annotations

import contextlib
import json
import shlex

from protocol.errors import CodedError
from supervisor.gateway.server import base_url, bound_to
from supervisor.settings import Settings


class Announcer:
    """Told how the load of each configured model ended; ``settings.port`` is the real one."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._way_in_known = False

    def started(self) -> None:
        """Say where the server is when no model is going to say it."""
        if not self._settings.models:
            self._say(next_step_lines(self._settings))

    def loaded(self, model_id: str, error: CodedError | None) -> None:
        if error is None:
            self._say(ready_lines(self._settings, model_id))
            return
        lines = [f"{model_id} failed to load: {error.message} ({error.code.value})"]
        if not self._way_in_known:
            lines += next_step_lines(self._settings)
        self._say(lines)

    def _say(self, lines: list[str]) -> None:
        self._way_in_known = True
        # Nobody may be reading (``opta-lmx serve | head -1``): no reason to stop serving.
        with contextlib.suppress(OSError):
            print("\n".join(lines), flush=True)


def ready_lines(settings: Settings, model_id: str) -> list[str]:
    url = base_url(settings)
    request = {
        "model": model_id,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        "temperature": 0,
    }
    # The key itself does not belong into a terminal's scrollback.
    key = ' -H "Authorization: Bearer $OPTA_LMX_API_KEY"' if settings.api_key else ""
    return [
        f"{model_id} is ready",
        *_where(settings),
        f"  try              curl {url}/v1/chat/completions{key} "
        f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(request))}",
    ]


def next_step_lines(settings: Settings) -> list[str]:
    """For an operator with a server and no model."""
    # The command line finds a server on the default port by itself.
    url = base_url(settings)
    option = "" if url == "http://127.0.0.1:8000" else f" --url {url}"
    return [
        "no model is loaded yet",
        *_where(settings),
        f"  load one         opta-lmx load MODEL{option}",
    ]


def _where(settings: Settings) -> list[str]:
    url = base_url(settings)
    return [
        f"  server           {url}{bound_to(settings)}",
        f"  OpenAI base_url  {url}/v1",
    ]

"""What the operator reads on stdout once a configured model is ready, or is not."""

from __future__ import annotations

import json
import shlex

from protocol.errors import CodedError
from supervisor.gateway.server import base_url
from supervisor.settings import Settings


def announce(settings: Settings, model_id: str, error: CodedError | None) -> None:
    """Say how the load of a configured model ended; ``settings.port`` is the real one, not 0."""
    lines = [_failed(model_id, error)] if error is not None else ready_lines(settings, model_id)
    print("\n".join(lines), flush=True)


def ready_lines(settings: Settings, model_id: str) -> list[str]:
    url = base_url(settings)
    request = {"model": model_id, "messages": [{"role": "user", "content": "Hello!"}]}
    # The key itself does not belong into a terminal's scrollback.
    key = ' -H "Authorization: Bearer $OPTA_LMX_API_KEY"' if settings.api_key else ""
    return [
        f"{model_id} is ready",
        f"  server           {url}",
        f"  OpenAI base_url  {url}/v1",
        f"  try              curl {url}/v1/chat/completions{key} "
        f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(request))}",
    ]


def _failed(model_id: str, error: CodedError) -> str:
    return f"{model_id} failed to load: {error.message} ({error.code.value})"

"""When a server that was started can be asked."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable

from benchmark.children import READY_TIMEOUT_S, Child
from benchmark.plan import Failed


def await_http(child: Child, port: int, path: str) -> None:
    """Wait until a GET is answered with 200."""
    _await(child, lambda: get(port, path)[0] == 200)


def await_routed(child: Child, port: int, model: str) -> None:
    """Wait until llama-server's router has loaded a model."""

    def loaded() -> bool:
        status, body = get(port, "/models")
        if status != 200:
            return False
        models = {model["id"]: model for model in json.loads(body)["data"]}
        state = models.get(model, {}).get("status", {})
        if state.get("failed"):
            raise Failed(f"the router could not load the model: {child.log()[-400:]}")
        return bool(state.get("value") == "loaded")

    _await(child, loaded)


def _await(child: Child, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        child.check()
        with contextlib.suppress(OSError, http.client.HTTPException):
            if ready():
                return
        time.sleep(0.1)
    raise Failed(f"not ready after {READY_TIMEOUT_S:.0f} s")


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()

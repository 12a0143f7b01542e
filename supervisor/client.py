"""The command line's side of the HTTP contract. Imported only by commands that talk."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx

_CONNECT_S = 5.0


class ClientError(Exception):
    """What went wrong, for a person; ``code`` when the server named one."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class Client:
    """Talks to one server; a context manager. Every method raises ``ClientError``."""

    def __init__(
        self, url: str, *, admin_key: str | None = None, api_key: str | None = None
    ) -> None:
        self._url = url.rstrip("/")
        self._admin = {"x-admin-key": admin_key} if admin_key else {}
        self._inference = {"authorization": f"Bearer {api_key}"} if api_key else {}
        # A load or a long answer takes the time it takes. A proxy that the
        # environment names is for the world outside, not for a local server.
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        self._http = httpx.Client(timeout=timeout, trust_env=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def admin(self, method: str, path: str, body: object = None) -> Any:
        try:
            response = self._http.request(method, self._url + path, json=body, headers=self._admin)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        return _value(response.status_code, response.content)

    def models(self) -> list[dict[str, Any]]:
        models: list[dict[str, Any]] = self.admin("GET", "/admin/models")["models"]
        return models

    def release(self, model_id: str) -> Any:
        return self.admin("POST", f"/admin/models/{quote(model_id, safe='')}/release")

    def chat(
        self, model: str, messages: Sequence[Mapping[str, str]], **parameters: object
    ) -> Generator[str, None, None]:
        """Yield the answer as it comes. An answer cut short raises at its end."""
        given = {name: value for name, value in parameters.items() if value is not None}
        body = {"model": model, "messages": messages, "stream": True, **given}
        try:
            with self._http.stream(
                "POST", f"{self._url}/v1/chat/completions", json=body, headers=self._inference
            ) as response:
                if response.status_code != 200:
                    _value(response.status_code, response.read())
                yield from _texts(response.iter_lines())
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> ClientError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return ClientError(f"no server at {self._url}: {error}. Start one with: opta-lmx serve")
        return ClientError(f"the connection to {self._url} failed: {error}")


def _texts(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise _refusal(event["error"])
        for choice in event["choices"]:
            text = choice["delta"].get("content")
            if text:
                yield text
    raise ClientError("the answer ended early: the connection was closed")


def _value(status: int, content: bytes) -> Any:
    """The JSON value of a good answer."""
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ClientError(f"not an Opta-LMX server: HTTP {status} without JSON") from error
    if status < 400:
        return value
    refusal = value.get("error") if isinstance(value, dict) else None
    raise _refusal(refusal) if isinstance(refusal, dict) else ClientError(f"HTTP {status}")


def _refusal(error: Mapping[str, Any]) -> ClientError:
    return ClientError(str(error.get("message")), error.get("code"))

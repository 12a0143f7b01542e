"""The command line's side of the HTTP contract. Imported only by commands that talk."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx

_CONNECT_S = 5.0
#: Longer than servers leave a stream without a comment.
_SILENCE_S = 60.0

_NOT_UTF8 = "the request cannot be sent: its text is not valid UTF-8"


class ClientError(Exception):
    """What went wrong, for a person; ``code`` when the server named one."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(f"{message} ({code})" if code else message)
        self.message = message
        self.code = code


class NoServer(ClientError):
    """Nobody listens there."""


def default_url() -> str:
    """This machine's server, on the port that the environment gives to ``serve`` as well."""
    port = os.environ.get("OPTA_LMX_PORT") or "8000"
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) <= 65535):
        raise ClientError(f"no server can be found on OPTA_LMX_PORT={port}; use --url")
    return f"http://127.0.0.1:{int(port[:6])}"


MODEL_COLUMNS = (
    *("MODEL", "STATE", "BACKEND", "MEMORY", "CONTEXT"),
    *("RUNNING", "QUEUED", "FAILURES", "REASON"),
)


def model_cells(view: Mapping[str, Any]) -> list[str]:
    """A model object in the words of ``MODEL_COLUMNS``."""
    readiness, memory, context = view["readiness"], view["memory_gb"], view["context_length"]
    state = "unloading" if view["unloading"] else readiness["state"]
    return [
        view["id"],
        f"{state} (probation)" if readiness["probation"] else state,
        view["backend"],
        "-" if memory is None else f"{memory:.2f} GB",
        "-" if context is None else str(context),
        str(view["in_flight"]),
        str(view["queued"]),
        str(readiness["crash_count"]),
        readiness["reason"],
    ]


AVAILABLE_COLUMNS = (
    *("MODEL", "FORMAT", "KIND", "ARCHITECTURE", "PARAMETERS"),
    *("QUANTIZATION", "SIZE", "CONTEXT", "RUNS ON"),
)


def available_cells(model: Mapping[str, Any]) -> list[str]:
    """A model on disk in the words of ``AVAILABLE_COLUMNS``; what is wrong comes last."""
    if not model["complete"]:
        return [model["id"], model["format"], *6 * ["-"], model["problem"]]
    return [
        model["id"],
        model["format"],
        model["kind"],
        model["architecture"] or "-",
        _parameters(model["parameters"]),
        model["quantization"] or "-",
        f"{model['size_bytes'] / 1e9:.2f} GB",
        "-" if model["context_length"] is None else str(model["context_length"]),
        ", ".join(map(_option, model["backends"])),
    ]


def _parameters(count: int) -> str:
    """As models are named by them: 135M, 8.0B."""
    if not count:
        return "-"
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def _option(option: Mapping[str, Any]) -> str:
    name = str(option["backend"])
    return name if option["usable"] else f"not on {name}: {option['reason']}"


PROBE_COLUMNS = (
    *("BACKEND", "VERSION", "OUTCOME", "LOADED IN"),
    *("FIRST TOKEN", "TOKENS/S", "MEMORY", "REASON"),
)


def probe_cells(result: Mapping[str, Any]) -> list[str]:
    """How a model fared on one backend, in the words of ``PROBE_COLUMNS``."""
    loaded_ms, first_s = result["time_to_load_ms"], result["time_to_first_token_s"]
    speed, memory = result["tokens_per_s"], result["memory_gb"]
    return [
        result["backend"],
        result["backend_version"] or "-",
        result["outcome"],
        "-" if loaded_ms is None else f"{loaded_ms / 1000:.1f} s",
        "-" if first_s is None else f"{first_s:.3f} s",
        "-" if speed is None else f"{speed:.1f}",
        "-" if memory is None else f"{memory:.2f} GB",
        result["reason"] if result["code"] is None else f"{result['reason']} ({result['code']})",
    ]


NAME_COLUMNS = ("NAME", "KIND", "MODEL", "PARAMETERS", "LOAD", "SYSTEM PROMPT")


def names_in(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Presets, then aliases, each with its ``kind``."""
    aliases = [
        {"name": name, "kind": "alias", "model": model} for name, model in told["aliases"].items()
    ]
    return [*({**preset, "kind": "preset"} for preset in told["presets"]), *aliases]


def name_cells(entry: Mapping[str, Any]) -> list[str]:
    """A preset or an alias in the words of ``NAME_COLUMNS``."""
    model = entry["model"]
    return [
        entry["name"],
        entry["kind"],
        model if isinstance(model, str) else ", ".join(model),
        _assignments(entry.get("parameters", {})),
        _assignments(entry.get("load", {})),
        # A table has one line for each.
        " ".join((entry.get("system_prompt") or "-").split()),
    ]


def _assignments(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={json.dumps(value)}" for name, value in values.items()) or "-"


def change_line(change: Mapping[str, Any], needs_restart: Sequence[str]) -> str:
    """What a reload has changed, or what waits for a restart."""
    name = change["name"]
    later = " (needs a restart)" if name in needs_restart else ""
    return f"{name}: {json.dumps(change['before'])} -> {json.dumps(change['after'])}{later}"


class Client:
    """Talks to one server; a context manager. Every method raises ``ClientError``."""

    def __init__(
        self, url: str, *, admin_key: str | None = None, api_key: str | None = None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ClientError(
                f"--url / OPTA_LMX_URL must begin with http:// or https://, not {url!r}"
            )
        _check_key("admin", admin_key)
        _check_key("api", api_key)
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
        except UnicodeEncodeError as error:
            raise ClientError(_NOT_UTF8) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        return _value(response.status_code, response.content)

    def admin_lines(self, path: str, headers: Mapping[str, str]) -> Iterator[str]:
        """The lines of an answer that comes bit by bit, and is never silent for long."""
        timeout = httpx.Timeout(_SILENCE_S, connect=_CONNECT_S)
        try:
            with self._http.stream(
                "GET", self._url + path, headers={**self._admin, **headers}, timeout=timeout
            ) as response:
                if response.status_code != 200:
                    _value(response.status_code, response.read())
                yield from response.iter_lines()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error

    def models(self) -> list[dict[str, Any]]:
        models: list[dict[str, Any]] = self.admin("GET", "/admin/models")["models"]
        return models

    def available(self) -> list[dict[str, Any]]:
        """The models on the server's machine, loaded or not."""
        models: list[dict[str, Any]] = self.admin("GET", "/admin/models/available")["models"]
        return models

    def explain(self, model_id: str) -> list[str]:
        """Why the model is as it is, in lines to read."""
        from supervisor.explain import explain

        view: Mapping[str, Any] | None = None
        refusal = ""
        try:
            view = self.admin("GET", f"/admin/models/{_quoted(model_id)}")
        except ClientError as error:
            # Refusals that are about the model are what there is to explain.
            if error.code is None or not error.code.startswith("model_"):
                raise
            refusal = error.code
        query = f"?model={_quoted(model_id)}"
        incidents = self.admin("GET", f"/admin/incidents{query}")["incidents"]
        records = self.admin("GET", f"/admin/models/compatibility{query}")["records"]
        return explain(model_id, view, incidents, records, refusal=refusal)

    def release(self, model_id: str) -> Any:
        return self.admin("POST", f"/admin/models/{_quoted(model_id)}/release")

    def remove(self, model_id: str) -> Any:
        """Delete a model's files."""
        return self.admin("DELETE", f"/admin/models/{_quoted(model_id)}")

    def check_model(self, model_id: str) -> None:
        """Raise what a question to this model would be refused with."""
        path = f"{self._url}/v1/models/{_quoted(model_id)}"
        try:
            response = self._http.get(path, headers=self._inference)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        _value(response.status_code, response.content)

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
        except UnicodeEncodeError as error:
            raise ClientError(_NOT_UTF8) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> ClientError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return NoServer(f"no server at {self._url}: {error}. Start one with: opta-lmx serve")
        return ClientError(f"the connection to {self._url} failed: {error}")


def _check_key(name: str, key: str | None) -> None:
    """A header takes nothing else; httpx would fail with the codec's words."""
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ClientError(
            f"--{name}-key / OPTA_LMX_{name.upper()}_KEY must be printable ASCII: "
            "it is not the key of any server"
        )


def _quoted(model_id: str) -> str:
    return quote(model_id, safe="", errors="replace")


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

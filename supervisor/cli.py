"""``opta-lmx``: run the server, and talk to a running one.

Only typer is imported here: each command imports what it needs, so that
``serve`` does not pay for the client nor the client for the server.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from supervisor.client import Client

app = typer.Typer(
    help="A local LLM server where one crashing model cannot take down another.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option(envvar="OPTA_LMX_URL", help="The server to talk to.")]
AdminKey = Annotated[
    str | None,
    typer.Option(envvar="OPTA_LMX_ADMIN_KEY", show_envvar=True, help="Opens /admin."),
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="OPTA_LMX_API_KEY", show_envvar=True, help="Opens /v1."),
]
ModelId = Annotated[str, typer.Argument(metavar="MODEL", help="The model's id.")]


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; 0 picks one.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="PATH, ID or NAME=PATH to load; may be repeated."),
    ] = None,
    models_dir: Annotated[Path | None, typer.Option(help="Where ids are looked up.")] = None,
    admin_key: Annotated[
        str | None, typer.Option(help="Key for /admin; better in OPTA_LMX_ADMIN_KEY.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key for /v1; better in OPTA_LMX_API_KEY.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    home: Annotated[Path | None, typer.Option(help="State folder (~/.opta-lmx).")] = None,
    max_sequences: Annotated[
        int | None, typer.Option(help="Requests a model runs at once.")
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(help="Requests per model, running or waiting.")
    ] = None,
    context_length: Annotated[int | None, typer.Option(help="Tokens per request.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a worker.")] = None,
    enable_simulated: Annotated[
        bool | None, typer.Option("--enable-simulated", help="The backend without a model.")
    ] = None,
    allow_unauthenticated: Annotated[
        bool | None,
        typer.Option("--allow-unauthenticated", help="Serve the network without keys."),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning, error.")] = None,
) -> None:
    """Run the server until it is told to stop."""
    flags = {
        "host": host,
        "port": port,
        "models": model,
        "models_dir": _text(models_dir),
        "admin_key": admin_key,
        "api_key": api_key,
        "config": config,
        "home": _text(home),
        "max_sequences": max_sequences,
        "max_queue": max_queue,
        "context_length": context_length,
        "threads": threads,
        "enable_simulated": enable_simulated,
        "allow_unauthenticated": allow_unauthenticated,
        "log_level": log_level,
    }
    from supervisor.config import ConfigError, load_settings

    try:
        settings = load_settings(flags)
    except ConfigError as error:
        _fail(str(error), status=2)

    from supervisor import logs

    logs.set_up(settings.log_level)

    from supervisor.blocklist import BlocklistError
    from supervisor.gateway.server import BindRefused
    from supervisor.main import HomeInUse, run

    try:
        run(settings)
    except (HomeInUse, BlocklistError, BindRefused, OSError) as error:
        _fail(str(error))


@app.command()
def ps(
    url: Url = _DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="As the server says it.")] = False,
) -> None:
    """List the models and how they are."""
    with _connected(url, admin_key=admin_key) as client:
        models = client.models()
    if as_json:
        import json

        typer.echo(json.dumps(models, indent=2))
        return
    rows = [["MODEL", "STATE", "BACKEND", "MEMORY", "RUNNING", "QUEUED", "FAILURES", "REASON"]]
    rows += [_row(view) for view in models]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


@app.command()
def load(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="ID, PATH or NAME=PATH.")],
    backend: Annotated[str | None, typer.Option(help="mlx or llama; else by format.")] = None,
    context_length: Annotated[int | None, typer.Option(help="Tokens per request.")] = None,
    keep_alive: Annotated[int | None, typer.Option(help="Idle seconds before unload.")] = None,
    allow_unsupported_runtime: Annotated[
        bool, typer.Option("--allow-unsupported-runtime", help="Load on probation.")
    ] = False,
    wait: Annotated[bool, typer.Option(help="Until it can be used.")] = True,
    url: Url = _DEFAULT_URL,
    admin_key: AdminKey = None,
) -> None:
    """Load a model and wait until it is routable."""
    model_id, path = _model_argument(model)
    body = {
        "model_id": model_id,
        "path": path,
        "backend": backend,
        "context_length": context_length,
        "keep_alive_sec": keep_alive,
        "allow_unsupported_runtime": allow_unsupported_runtime,
        "wait": wait,
    }
    with _connected(url, admin_key=admin_key) as client:
        result = client.admin("POST", "/admin/models/load", body)
    took = result.get("time_to_load_ms")
    after = "" if took is None else f" in {took / 1000:.1f} s"
    typer.echo(f"{result['model_id']} is {result['readiness']['state']}{after}")


@app.command()
def unload(model: ModelId, url: Url = _DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Stop a model's worker."""
    with _connected(url, admin_key=admin_key) as client:
        result = client.admin("POST", "/admin/models/unload", {"model_id": model})
    typer.echo(f"{result['model_id']} unloaded")


@app.command()
def release(model: ModelId, url: Url = _DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """End a model's quarantine."""
    with _connected(url, admin_key=admin_key) as client:
        result = client.release(model)
    typer.echo(f"{result['model_id']} released from quarantine")


@app.command()
def chat(
    model: ModelId,
    prompt: Annotated[str | None, typer.Option(help="Ask this and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    url: Url = _DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Talk to a model. With a pipe on stdin: its text is the prompt, one answer."""
    with _connected(url, api_key=api_key) as client:
        from supervisor.chat_session import Session

        session = Session(
            client, model, system=system, max_tokens=max_tokens, temperature=temperature
        )
        if prompt is None and sys.stdin.isatty():
            session.converse()
            return
        question = sys.stdin.read() if prompt is None else prompt
        if not question.strip():
            _fail("nothing to ask: the prompt is empty")
        session.ask(question)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib import metadata

    try:
        typer.echo(metadata.version("opta-lmx"))
    except metadata.PackageNotFoundError:
        typer.echo("unknown (not installed)")


def main() -> None:
    app()


@contextmanager
def _connected(
    url: str, *, admin_key: str | None = None, api_key: str | None = None
) -> Iterator[Client]:
    """A client whose errors end the command."""
    from supervisor.client import Client, ClientError

    try:
        with Client(url, admin_key=admin_key, api_key=api_key) as client:
            yield client
    except ClientError as error:
        _fail(error.message, error.code)


def _row(view: dict[str, Any]) -> list[str]:
    readiness = view["readiness"]
    memory = view["memory_gb"]
    return [
        view["id"],
        "unloading" if view["unloading"] else readiness["state"],
        view["backend"],
        "-" if memory is None else f"{memory:.2f} GB",
        str(view["in_flight"]),
        str(view["queued"]),
        str(readiness["crash_count"]),
        readiness["reason"],
    ]


def _model_argument(text: str) -> tuple[str, str | None]:
    """The id and, when a file or folder was named, its path."""
    from supervisor.config import ConfigError, parse_model

    try:
        setting = parse_model(text)
    except ConfigError as error:
        _fail(str(error), status=2)
    path = Path(setting.path)
    if setting.id is not None:
        return setting.id, str(path.absolute())
    if path.exists():
        return path.absolute().name.removesuffix(".gguf"), str(path.absolute())
    return text, None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _fail(message: str, code: str | None = None, status: int = 1) -> NoReturn:
    typer.echo(f"error: {message}" + (f" ({code})" if code else ""), err=True)
    raise typer.Exit(status)


if __name__ == "__main__":
    main()

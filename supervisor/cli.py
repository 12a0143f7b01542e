"""``opta-lmx``: run the server, and talk to a running one.

Only typer is imported here: each command imports what it needs, so that
``serve`` does not pay for the client nor the client for the server.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from supervisor import commands
from supervisor.terminal import fail, give_up_stdout, never_fail_to_encode

app = typer.Typer(
    help="A local LLM server where one crashing model cannot take down another.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _before_any_command(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    never_fail_to_encode()


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
    load_on_demand: Annotated[
        bool | None,
        typer.Option("--load-on-demand", help="Load what is on disk at the first request for it."),
    ] = None,
    keep_alive_sec: Annotated[
        int | None, typer.Option(help="Unload what was idle for so long; 0: never.")
    ] = None,
    context_length: Annotated[int | None, typer.Option(help="Tokens per request.")] = None,
    prompt_cache_bytes: Annotated[
        int | None, typer.Option(help="KV cache kept of ended requests, per model; 0: none.")
    ] = None,
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
        "load_on_demand": load_on_demand,
        "keep_alive_sec": keep_alive_sec,
        "context_length": context_length,
        "prompt_cache_bytes": prompt_cache_bytes,
        "threads": threads,
        "enable_simulated": enable_simulated,
        "allow_unauthenticated": allow_unauthenticated,
        "log_level": log_level,
    }
    from supervisor.config import ConfigError, load_settings

    try:
        settings = load_settings(flags)
    except ConfigError as error:
        fail(str(error), status=2)

    from supervisor import logs

    logs.set_up(settings.log_level)

    from supervisor.blocklist import BlocklistError
    from supervisor.gateway.server import BindRefused
    from supervisor.main import HomeUnusable, run

    try:
        run(settings, lambda: load_settings(flags))
    except (HomeUnusable, BlocklistError, BindRefused, OSError) as error:
        fail(str(error))


@app.command()
def version() -> None:
    """Print the version."""
    from importlib import metadata

    try:
        typer.echo(metadata.version("opta-lmx"))
    except metadata.PackageNotFoundError:
        typer.echo("unknown (not installed)")


app.add_typer(commands.app)


def main() -> None:
    try:
        app()
    except OSError as error:
        # Everything else has been caught by name: this is a full disk under stdout.
        give_up_stdout()
        print(f"error: cannot write the output: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


if __name__ == "__main__":
    main()

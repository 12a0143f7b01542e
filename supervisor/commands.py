"""The commands of ``opta-lmx`` that talk to a running server.

Only typer is imported here; see ``supervisor.cli``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from supervisor.asking import (
    AdminKey,
    ApiKey,
    AsJson,
    ModelId,
    Url,
    connected,
    note,
    print_json,
    show,
    show_lines,
)
from supervisor.terminal import fail, plain, print_table, size_text

if TYPE_CHECKING:
    pass

app = typer.Typer()


@app.command()
def ps(
    url: Url = None,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """List the models and how they are."""
    from supervisor.client import MODEL_COLUMNS, model_cells

    with connected(url, admin_key=admin_key) as client:
        show(client.models(), MODEL_COLUMNS, model_cells, as_json=as_json)


@app.command()
def models(
    url: Url = None,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """List the models on the server's machine, loaded or not."""
    from supervisor.client import AVAILABLE_COLUMNS, available_cells

    with connected(url, admin_key=admin_key) as client:
        show(client.available(), AVAILABLE_COLUMNS, available_cells, as_json=as_json)


@app.command()
def status(url: Url = None, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """Tell how the server is, what it holds, and what it has done since its start."""
    from supervisor.summary import status_lines

    with connected(url, admin_key=admin_key) as client:
        found = client.admin("GET", "/admin/status")
    show_lines(found, status_lines, as_json=as_json)


@app.command()
def health(url: Url = None, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """Tell whether every promise is kept; status 1 if not, or if the server cannot be reached."""
    from supervisor.summary import health_lines

    with connected(url, admin_key=admin_key) as client:
        found = client.admin("GET", "/admin/health")
    show_lines(found, health_lines, as_json=as_json)
    if found["status"] != "ok":
        raise typer.Exit(1)


@app.command()
def events(
    model: Annotated[str | None, typer.Option(help="Only what is about this model.")] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only events of this kind; may be repeated.")
    ] = None,
    history: Annotated[
        bool, typer.Option("--history", help="First what has happened, as far as it is kept.")
    ] = False,
    follow: Annotated[bool, typer.Option(help="Wait for what is to come.")] = True,
    url: Url = None,
    admin_key: AdminKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each.")] = False,
) -> None:
    """Tell what happens to the server, as it happens, also after its restarts."""
    import json

    from supervisor.watching import line, watch

    query = {"model": model or [], "kind": kind or []}
    with connected(url, admin_key=admin_key) as client:
        told = watch(client, query, note, history=history or not follow, follow=follow)
        try:
            for event in told:
                data = json.dumps({"id": event.id, **event.value})
                typer.echo(data if as_json else plain(line(event)))
                sys.stdout.flush()
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


@app.command()
def presets(
    url: Url = None,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """List the presets and aliases, and what they stand for."""
    from supervisor.client import NAME_COLUMNS, name_cells, names_in

    with connected(url, admin_key=admin_key) as client:
        told = client.admin("GET", "/admin/presets")
        show(told if as_json else names_in(told), NAME_COLUMNS, name_cells, as_json=as_json)


@app.command()
def reload(url: Url = None, admin_key: AdminKey = None) -> None:
    """Let the server read its configuration again."""
    from supervisor.client import change_line

    with connected(url, admin_key=admin_key) as client:
        told = client.admin("POST", "/admin/config/reload")
    for change in told["changed"]:
        typer.echo(plain(change_line(change, told["needs_restart"])))
    if not told["changed"]:
        typer.echo("nothing has changed")


@app.command()
def load(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="ID, PATH or NAME=PATH.")],
    backend: Annotated[str | None, typer.Option(help="mlx or llama; else by format.")] = None,
    context_length: Annotated[int | None, typer.Option(help="Tokens per request.")] = None,
    allow_unsupported_runtime: Annotated[
        bool, typer.Option("--allow-unsupported-runtime", help="Load on probation.")
    ] = False,
    pinned: Annotated[
        bool, typer.Option("--pinned", help="Never unload it for another model, nor when idle.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell the memory plan, and load nothing.")
    ] = False,
    wait: Annotated[bool, typer.Option(help="Until it can be used.")] = True,
    yes: Annotated[
        bool, typer.Option("--yes", help="Download what is not on disk, without asking.")
    ] = False,
    url: Url = None,
    admin_key: AdminKey = None,
) -> None:
    """Load a model and wait until it is routable; download it first, after a question."""
    model_id, path = _model_to_load(model)
    body = {
        "model_id": model_id,
        "path": path,
        "backend": backend,
        "context_length": context_length,
        "allow_unsupported_runtime": allow_unsupported_runtime,
        "pinned": pinned,
        "dry_run": dry_run,
        "wait": wait,
    }
    if wait and not dry_run:
        typer.echo(f"loading {plain(model_id)} ... (Ctrl-C ends the wait, not the load)", err=True)
    with connected(url, admin_key=admin_key) as client:
        try:
            result = client.admin("POST", "/admin/models/load", body)
            if result.get("status") == "download_required" and not dry_run:
                from supervisor.pull import load_after_question

                result = load_after_question(client, result, yes=yes, wait=wait)
        except KeyboardInterrupt:
            typer.echo("not waiting any more; the load goes on: see opta-lmx ps", err=True)
            raise typer.Exit(130) from None
    if dry_run and "message" in result:
        typer.echo(plain(result["message"]))
        if "estimated_size_bytes" in result:
            typer.echo(f"{size_text(result['estimated_size_bytes'])} would be downloaded")
        raise typer.Exit(0 if result.get("fits") else 1)
    if result.get("status") == "downloading":
        typer.echo(f"{result['model_id']} is being downloaded")
        return
    took = result.get("time_to_load_ms")
    after = "" if took is None else f" in {took / 1000:.1f} s"
    typer.echo(f"{result['model_id']} is {result['readiness']['state']}{after}")


@app.command()
def pull(model: ModelId, url: Url = None, admin_key: AdminKey = None) -> None:
    """Download a model from the hub: by the server or, if none runs here, without one.

    What has come is kept, whatever ends it: run it again to go on. A server goes on by
    itself after Ctrl-C.
    """
    from supervisor.client import ClientError
    from supervisor.config import ConfigError
    from supervisor.pull import pull as pull_model

    try:
        model_id = pull_model(url, admin_key, model)
    except (ClientError, ConfigError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        typer.echo("not waiting any more; a server goes on, else run it again to go on", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{plain(model_id)} is here, and verified")


@app.command()
def rm(model: ModelId, url: Url = None, admin_key: AdminKey = None) -> None:
    """Delete a model's files."""
    with connected(url, admin_key=admin_key) as client:
        result = client.remove(model)
    typer.echo(f"{result['model_id']} deleted, {size_text(result['freed_bytes'])} freed")


@app.command()
def probe(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="ID, PATH or NAME=PATH.")],
    backend: Annotated[
        list[str] | None, typer.Option(help="mlx or llama; may be repeated; else by format.")
    ] = None,
    context_length: Annotated[int | None, typer.Option(help="Tokens per request.")] = None,
    allow_unsupported_runtime: Annotated[
        bool, typer.Option("--allow-unsupported-runtime", help="Try blocklisted ones, too.")
    ] = False,
    timeout_s: Annotated[
        float | None, typer.Option(help="Seconds for each backend, 600 by default.")
    ] = None,
    url: Url = None,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Try a model on each backend, beside what is loaded; status 1 if none runs it."""
    from supervisor.client import PROBE_COLUMNS, probe_cells

    model_id, path = _model_to_load(model)
    body = {
        "model_id": model_id,
        "path": path,
        "backends": backend or None,
        "context_length": context_length,
        "allow_unsupported_runtime": allow_unsupported_runtime,
        "timeout_s": timeout_s,
    }
    typer.echo(f"probing {plain(model_id)} ... (Ctrl-C ends the probe)", err=True)
    with connected(url, admin_key=admin_key) as client:
        try:
            found = client.admin("POST", "/admin/models/probe", body)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    if as_json:
        print_json(found)
    else:
        print_table(PROBE_COLUMNS, map(probe_cells, found["results"]))
        typer.echo(f"recommended: {found['recommended'] or 'none'} ({plain(found['reason'])})")
    if found["recommended"] is None:
        raise typer.Exit(1)


@app.command()
def unload(
    model: ModelId,
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait for requests that are running.")
    ] = False,
    url: Url = None,
    admin_key: AdminKey = None,
) -> None:
    """Stop a model's worker, once its running requests have ended."""
    body = {"model_id": model, "drain_timeout_sec": 0 if now else None}
    with connected(url, admin_key=admin_key) as client:
        result = client.admin("POST", "/admin/models/unload", body)
    typer.echo(f"{result['model_id']} unloaded")


@app.command()
def release(model: ModelId, url: Url = None, admin_key: AdminKey = None) -> None:
    """End a model's quarantine."""
    with connected(url, admin_key=admin_key) as client:
        result = client.release(model)
    typer.echo(f"{result['model_id']} released from quarantine")


@app.command()
def explain(model: ModelId, url: Url = None, admin_key: AdminKey = None) -> None:
    """Tell why a model is not routable, what happened, and what to do next."""
    with connected(url, admin_key=admin_key) as client:
        for line in client.explain(model):
            typer.echo(plain(line))


@app.command()
def chat(
    model: ModelId,
    prompt: Annotated[str | None, typer.Option(help="Ask this and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; else what the context holds.")
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(min=0, max=2, help="0: always the likeliest word; higher: more varied."),
    ] = 0.7,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Talk to a model. With a pipe on stdin: its text is the prompt, one answer."""
    with connected(url, api_key=api_key) as client:
        from supervisor.chat_session import Session

        session = Session(
            client, model, system=system, max_tokens=max_tokens, temperature=temperature
        )
        if prompt is None and sys.stdin.isatty():
            session.converse()
            return
        try:
            question = sys.stdin.buffer.read().decode() if prompt is None else prompt
        except UnicodeDecodeError as error:
            fail(f"the prompt on stdin is not valid UTF-8 (byte {error.start})")
        if not question.strip():
            fail("nothing to ask: the prompt is empty")
        try:
            session.ask(question)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _model_to_load(model: str) -> tuple[str, str | None]:
    """The id and path of ID, PATH or NAME=PATH; what is neither ends the command."""
    from supervisor.config import ConfigError, model_to_load

    try:
        return model_to_load(model)
    except ConfigError as error:
        fail(str(error), status=2)

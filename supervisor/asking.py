"""What the commands that talk to a running server share: options, a connection, the answer shown.

Only typer is imported here; see ``supervisor.cli``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supervisor.terminal import fail, plain, print_table

if TYPE_CHECKING:
    from supervisor.client import Client

Url = Annotated[
    str | None,
    typer.Option(
        envvar="OPTA_LMX_URL",
        help="The server to talk to; else this machine's, on OPTA_LMX_PORT or 8000.",
    ),
]
AdminKey = Annotated[
    str | None,
    typer.Option(envvar="OPTA_LMX_ADMIN_KEY", show_envvar=True, help="Opens /admin."),
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="OPTA_LMX_API_KEY", show_envvar=True, help="Opens /v1."),
]
AsJson = Annotated[bool, typer.Option("--json", help="As the server says it.")]
ModelId = Annotated[str, typer.Argument(metavar="MODEL", help="The model's id.")]


@contextmanager
def connected(
    url: str | None, *, admin_key: str | None = None, api_key: str | None = None
) -> Iterator[Client]:
    """A client whose errors end the command."""
    from supervisor.client import Client, ClientError, default_url

    try:
        with Client(url or default_url(), admin_key=admin_key, api_key=api_key) as client:
            yield client
    except ClientError as error:
        fail(str(error))


def show(
    found: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    cells: Callable[[Mapping[str, Any]], Sequence[str]],
    *,
    as_json: bool,
) -> None:
    """What the server has told, as a table or as it is."""
    if as_json:
        print_json(found)
    else:
        print_table(columns, map(cells, found))


def show_lines(
    found: Mapping[str, Any], lines: Callable[[Mapping[str, Any]], Sequence[str]], *, as_json: bool
) -> None:
    if as_json:
        print_json(found)
        return
    for line in lines(found):
        typer.echo(plain(line))


def note(text: str) -> None:
    typer.echo(f"({plain(text)})", err=True)


def print_json(found: object) -> None:
    import json

    typer.echo(json.dumps(found, indent=2))

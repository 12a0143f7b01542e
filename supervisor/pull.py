"""The command line's downloads: with a server, which does them, or without. With a bar."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from protocol.errors import CodedError
from supervisor.client import Client, ClientError, NoServer, default_url
from supervisor.config import load_settings
from supervisor.downloads import alone
from supervisor.downloads.messages import Plan
from supervisor.downloads.messages import Progress as Moved
from supervisor.downloads.operation import Operation
from supervisor.settings import Settings
from supervisor.terminal import plain, size_text

_POLL_S = 0.25


class Bar:
    """How far a download is. Not on a terminal: a line for each new state."""

    def __init__(self, progress: Progress, model_id: str) -> None:
        self._progress = progress
        self._task = progress.add_task(plain(model_id), total=None)
        self._model_id = model_id
        self._status = ""

    def show(self, status: str, done: int, total: int) -> None:
        self._progress.update(
            self._task, description=f"{status} {plain(self._model_id)}", completed=done, total=total
        )
        if status != self._status and not self._progress.console.is_terminal:
            share = f" ({done / 1e6:.1f} of {total / 1e6:.1f} MB)"
            print(f"{status} {plain(self._model_id)}{share}", file=sys.stderr)
        self._status = status


@contextmanager
def bar(model_id: str) -> Iterator[Bar]:
    columns = (
        *(TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn()),
        *(TransferSpeedColumn(), TimeRemainingColumn()),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bar(progress, model_id)


def follow(client: Client, progress_url: str, model_id: str) -> dict[str, Any]:
    """Wait for the end of a server's download; raises ``ClientError`` if that is a bad one."""
    with bar(model_id) as shown:
        while True:
            view: dict[str, Any] = client.admin("GET", progress_url)
            shown.show(view["status"], view["downloaded_bytes"], view["total_bytes"])
            if view["status"] in ("failed", "cancelled"):
                raise ClientError(view["error"]["message"], view["error"]["code"])
            if view["status"] == "done":
                return view
            time.sleep(_POLL_S)


def load_after_question(
    client: Client, question: Mapping[str, Any], *, yes: bool, wait: bool
) -> Mapping[str, Any]:
    """What a load comes to once somebody has said yes. Raises ``ClientError``."""
    size = size_text(question["estimated_size_bytes"])
    what = f"{plain(question['model_id'])} is not on the server's disk: {size} to download"
    if not yes and not sys.stdin.isatty():
        raise ClientError(f"{what}; to do that, run it again with --yes")
    if not yes:
        free = size_text(question["free_disk_bytes"])
        typer.confirm(f"{what}, {free} are free. Go on?", abort=True, err=True)
    token = {"confirmation_token": question["confirmation_token"]}
    begun: dict[str, Any] = client.admin("POST", question["confirm_url"], token)
    if not wait:
        return begun
    follow(client, begun["progress_url"], begun["model_id"])
    models = client.models()
    view = next((each for each in models if each["id"] == begun["model_id"]), None)
    if view is None:
        raise ClientError(f"{begun['model_id']} was loaded, and is not any more")
    return {"model_id": view["id"], "readiness": view["readiness"]}


def pull(url: str | None, admin_key: str | None, model_id: str) -> str:
    """Download a model; its full id. Without a server here, and none named, from here.

    Raises ``ClientError`` and ``ConfigError``.
    """
    try:
        with Client(url or default_url(), admin_key=admin_key) as client:
            begun = client.admin("POST", "/admin/models/download", {"model_id": model_id})
            return str(follow(client, begun["progress_url"], begun["model_id"])["model_id"])
    except NoServer:
        if url is not None:
            raise
    return pull_alone(load_settings({}), model_id)


def pull_alone(settings: Settings, model_id: str) -> str:
    """Download a model from here; its full id. Raises ``ClientError``."""
    with bar(model_id) as shown:
        view: Operation | None = None

        def on_plan(plan: Plan) -> None:
            nonlocal view
            view = Operation(plan, None)

        def on_progress(progress: Moved) -> None:
            assert view is not None
            view.progress(progress)
            now = view.view()
            shown.show(now.status, now.downloaded_bytes, now.total_bytes)

        try:
            return asyncio.run(alone.fetch(model_id, settings, on_plan, on_progress)).model_id
        except CodedError as error:
            raise ClientError(error.message, error.code.value) from error

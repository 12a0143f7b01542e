"""One engine: start it, hear what it tells, end it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import BinaryIO

import msgspec

from protocol.errors import CodedError, ErrorCode
from supervisor.downloads.messages import Failed, Fetched, Job, Note, Plan, Progress, Report
from supervisor.marks import MARK_ENV, own_environment

log = logging.getLogger(__name__)

#: Longest line of an engine: the plan of a repository of some ten thousand files.
_MAX_LINE_BYTES = 16 * 1024 * 1024
_TAIL_BYTES = 2000

_decoder: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)


def engine_environment(endpoint: str | None, mark: str | None = None) -> dict[str, str]:
    """Ours, from which huggingface_hub takes its token; ``endpoint`` None: and its endpoint.

    ``mark`` as for ``marks``: of an engine that a server starts.
    """
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_VERBOSITY": "error"}
    chosen = {"HF_ENDPOINT": endpoint, MARK_ENV: mark}
    return {
        **own_environment(),
        **quiet,
        **{name: value for name, value in chosen.items() if value is not None},
    }


async def run_engine(
    job: Job,
    environment: Mapping[str, str],
    on_progress: Callable[[Progress], None] = lambda _progress: None,
) -> Plan | None:
    """Run one job to its end: the plan that was asked for, or None when all is fetched.

    Who is cancelled ends the engine. Raises ``CodedError`` with what the engine says, or
    ``download_failed`` when it dies.
    """
    with tempfile.TemporaryFile() as errors:
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "supervisor.downloads.engine"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env=environment,
                limit=_MAX_LINE_BYTES,
                start_new_session=True,
            )
        except OSError as error:
            raise CodedError(
                ErrorCode.DOWNLOAD_FAILED, f"cannot start a download: {error}"
            ) from error
        try:
            end = await _converse(process, job, on_progress)
        finally:
            await _end(process)
        if end is None:
            raise CodedError(
                ErrorCode.DOWNLOAD_FAILED,
                f"the download ended with status {process.returncode}: {_tail(errors)}",
            )
    if isinstance(end, Failed):
        raise CodedError(end.code, end.message)
    return end if isinstance(end, Plan) else None


async def _converse(
    process: asyncio.subprocess.Process, job: Job, on_progress: Callable[[Progress], None]
) -> Plan | Fetched | Failed | None:
    """How it ended; None when it has not said so."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(ConnectionError):
        # Its stdin stays open: that is how it knows that we are there.
        process.stdin.write(msgspec.json.encode(job) + b"\n")
        await process.stdin.drain()
    async for line in process.stdout:
        try:
            report = _decoder.decode(line)
        except msgspec.MsgspecError:
            log.debug("download: %r", line[:200])  # A library's own words.
            continue
        match report:
            case Progress() as progress:
                on_progress(progress)
            case Note() as note:
                log.info("download: %s", note.text)
            case end:
                return end
    return None


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    # It cannot resist, and must not be left as a zombie by who is cancelled twice.
    await asyncio.shield(asyncio.ensure_future(process.wait()))


def _tail(errors: BinaryIO) -> str:
    size = errors.seek(0, 2)
    errors.seek(max(0, size - _TAIL_BYTES))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it says nothing"

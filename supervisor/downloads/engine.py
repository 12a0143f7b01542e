"""The program that talks to the hub: one job on stdin, JSON lines on stdout.

A process of its own, for huggingface_hub is heavy and hashing takes the interpreter, and
since to kill it is the whole of cancelling. It ends as soon as nobody holds the other end
of its stdin: it never outlives who started it.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from pathlib import Path

import msgspec

from protocol.errors import CodedError, ErrorCode
from supervisor.downloads.messages import (
    Failed,
    Fetched,
    FetchJob,
    Job,
    Note,
    PlanJob,
    PlannedFile,
    Progress,
    Report,
)

_PROGRESS_INTERVAL_S = 0.1


def main() -> None:
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        tell(do(job))
    except CodedError as error:
        tell(Failed(error.code, error.message))
    except OSError as error:
        tell(failed(error))


def failed(error: OSError) -> Failed:
    """What the disk's refusal means."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    code = ErrorCode.INSUFFICIENT_DISK if full else ErrorCode.DOWNLOAD_FAILED
    return Failed(code, f"{error.strerror or error}: {error.filename or 'the cache'}")


def tell(report: Report) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()


def do(job: Job) -> Report:
    """Raises ``CodedError``, and ``OSError`` of the disk."""
    from supervisor.downloads import hub

    if isinstance(job, PlanJob):
        return hub.plan(job)
    _fetch(job)
    return Fetched()


def _fetch(job: FetchJob) -> None:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

    from supervisor.downloads import hub
    from supervisor.downloads.cache import RepoFolder
    from supervisor.downloads.fetch import Fetcher

    plan = job.plan
    folder = RepoFolder(Path(job.cache), plan.repo)
    meter = _Meter()
    with Fetcher(
        build_hf_headers(library_name="opta-lmx"),
        stall_s=job.stall_s,
        progress=meter.bytes_on_disk,
        note=lambda text: tell(Note(text)),
    ) as fetcher:
        for index, file in enumerate(plan.files):
            meter.begin(index, file.size)
            # Held by everybody who writes this file, other programs as well.
            with WeakFileLock(folder.lock(file.etag)):
                if folder.is_whole(file):
                    meter.whole()
                else:
                    url = hf_hub_url(plan.repo, file.name, revision=plan.revision)
                    begun = folder.incomplete(file.etag)
                    fetcher.fetch(url, file, begun, hub.denied(plan.repo, constants.ENDPOINT))
                    _verify(begun, file, meter)
                    begun.replace(folder.blob(file.etag))
    # Last of all: before, no reader of the cache can find any of it.
    folder.publish(plan)


def _verify(path: Path, file: PlannedFile, meter: _Meter) -> None:
    from supervisor.downloads.fetch import matches

    meter.verify()
    if not matches(path, file):
        path.unlink()
        raise CodedError(
            ErrorCode.DOWNLOAD_FAILED,
            f"{file.name} is not what the hub says it is (its checksum differs); it has been "
            "deleted: ask again to fetch it anew",
        )


class _Meter:
    """Tells how far it is, not more often than anybody looks."""

    def __init__(self) -> None:
        self._index = self._size = 0
        self._last = 0.0

    def begin(self, index: int, size: int) -> None:
        self._index, self._size = index, size

    def bytes_on_disk(self, count: int) -> None:
        now = time.monotonic()
        if now - self._last >= _PROGRESS_INTERVAL_S:
            self._last = now
            tell(Progress(self._index, count))

    def verify(self) -> None:
        tell(Progress(self._index, self._size, verifying=True))

    def whole(self) -> None:
        tell(Progress(self._index, self._size))


def _end_with_parent() -> None:
    # Not ``sys.stdin``, whose lock the interpreter would want at its exit.
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()

"""Brings the bytes of one file here: from where the last attempt ended, and all of them.

huggingface_hub 2 begins a file anew after a kill (its temporary files have random names),
so the transfer is ours; names, keys and the layout of the cache are its.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import BinaryIO

import httpx

from protocol.errors import CodedError, ErrorCode
from supervisor.downloads import hub
from supervisor.downloads.messages import PlannedFile

#: Attempts in a row that bring nothing.
MAX_ATTEMPTS = 6
MAX_WAIT_S = 60.0
_CONNECT_S = 15.0
#: Of one request: content networks refuse answers beyond some 50 GB.
MAX_RANGE_BYTES = 16 * 1024**3
_HASH_BLOCK = 4 * 1024 * 1024
_RETRIED = frozenset({408, 425, 429})


class _TryAgain(Exception):
    """``wait_s`` is what the hub asks for, if it does."""

    def __init__(self, what: str, wait_s: float | None = None) -> None:
        super().__init__(what)
        self.wait_s = wait_s


class Fetcher:
    """Use it as a context. ``headers`` are for the hub alone: httpx drops keys when it follows
    to another host."""

    def __init__(
        self,
        headers: dict[str, str],
        *,
        stall_s: float,
        progress: Callable[[int], None],
        note: Callable[[str], None],
    ) -> None:
        self._client = httpx.Client(
            headers={**headers, "accept-encoding": "identity"},
            timeout=httpx.Timeout(stall_s, connect=_CONNECT_S),
            follow_redirects=True,
        )
        self._progress = progress
        self._note = note

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def fetch(self, url: str, file: PlannedFile, path: Path, refusal: CodedError) -> None:
        """Bring ``path`` to the file's size. ``refusal``: what to raise for 401 and 403.

        Raises ``CodedError``, and ``OSError`` of the disk.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what has been counted is on disk after a kill.
        with path.open("ab", buffering=0) as out:
            if out.tell() > file.size:
                out.truncate(0)
            attempts = 0
            while (have := _end(out)) < file.size:
                try:
                    if self._continue(url, file, out, have, refusal):
                        attempts = 0
                        continue
                    what, wait_s = "the answer ended early", None
                except _TryAgain as trouble:
                    what, wait_s = str(trouble), trouble.wait_s
                except httpx.TransportError as error:
                    what, wait_s = f"{type(error).__name__}: {error}".rstrip(": "), None
                if (now := _end(out)) == file.size:
                    break
                attempts = 0 if now > have and wait_s is None else attempts + 1
                if attempts >= MAX_ATTEMPTS:
                    raise CodedError(
                        ErrorCode.DOWNLOAD_FAILED,
                        f"{file.name}: {what}; given up after {attempts} attempts at byte {now} "
                        f"of {file.size}. What has come is kept: ask again to go on",
                    )
                self._note(f"{file.name}: {what}; trying again at byte {now}")
                sleep(min(wait_s or 0.25 * 2**attempts, MAX_WAIT_S))
            os.fsync(out.fileno())

    def _continue(
        self, url: str, file: PlannedFile, out: BinaryIO, have: int, refusal: CodedError
    ) -> bool:
        """One request; whether all came that it asked for."""
        last = min(file.size, have + MAX_RANGE_BYTES) - 1
        ranged = have > 0 or last < file.size - 1
        headers = {"range": f"bytes={have}-{last}"} if ranged else {}
        with self._client.stream("GET", url, headers=headers) as answer:
            _check(answer, url, file, refusal)
            if ranged and answer.status_code == 206:
                if not answer.headers.get("content-range", "").startswith(f"bytes {have}-"):
                    raise _TryAgain("the hub sends another part than it was asked for")
            elif have:
                # All of it once more: the host knows no ranges.
                out.truncate(0)
                have = 0
            for piece in answer.iter_raw():
                piece = piece[: file.size - have]
                _write(out, piece)
                have += len(piece)
                self._progress(have)
                if have == file.size:
                    # Whatever follows does not belong to it.
                    return True
            return have > last


def matches(path: Path, file: PlannedFile) -> bool:
    """Whether the content is what the hub's checksum says."""
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % file.size)
    with path.open("rb") as content:
        while block := content.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest() == file.etag


def _check(answer: httpx.Response, url: str, file: PlannedFile, refusal: CodedError) -> None:
    status = answer.status_code
    if status in (200, 206):
        return
    moved = answer.url.host != httpx.URL(url).host
    if status in (401, 403) and not moved:
        raise refusal
    if status == 404:
        raise CodedError(
            ErrorCode.MODEL_NOT_FOUND, f"{file.name} is not on the hub any more: ask again"
        )
    # A content network's 403 is a link that is too old; the next one comes from the hub.
    if status >= 500 or status in _RETRIED or (moved and status == 403):
        wait_s = hub.retry_after_s(answer.headers.get("retry-after"), MAX_WAIT_S)
        raise _TryAgain(f"the hub answers {status}", wait_s)
    raise CodedError(ErrorCode.DOWNLOAD_FAILED, f"{file.name}: the hub answers {status}")


def _write(out: BinaryIO, piece: bytes) -> None:
    """All of it: a disk that is nearly full takes a part first."""
    rest = memoryview(piece)
    while rest:
        rest = rest[out.write(rest) :]


def _end(out: BinaryIO) -> int:
    return out.seek(0, os.SEEK_END)

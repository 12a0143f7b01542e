"""One download, and the load that follows it: where it stands, for everybody who looks."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Sequence

import msgspec

from protocol.errors import CodedError, ErrorCode
from supervisor.downloads.messages import Plan, Progress
from supervisor.gate import LoadSpec
from supervisor.views import LoadResult

#: The states that an operation does not leave.
SETTLED = frozenset({"done", "failed", "cancelled"})
#: Over which the speed is taken.
_SPEED_WINDOW_S = 5.0


class FileView(msgspec.Struct, frozen=True):
    name: str
    size_bytes: int
    downloaded_bytes: int


class Failure(msgspec.Struct, frozen=True):
    code: str
    message: str


class DownloadView(msgspec.Struct, frozen=True, kw_only=True):
    """``status``: ``queued``, ``downloading``, ``verifying``, ``loading``, ``done``, ``failed``
    or ``cancelled``. ``downloaded_bytes`` counts what was there before; speed and the
    remaining time (seconds) are known while bytes come. Times are epoch seconds."""

    id: str
    model_id: str
    status: str
    downloaded_bytes: int
    total_bytes: int
    percent: float
    files: Sequence[FileView]
    started_at: float
    updated_at: float
    load: bool = False
    speed_bytes_per_s: float | None = None
    eta_s: float | None = None
    error: Failure | None = None


def operation_id(model_id: str) -> str:
    """The same for every download of a model, so that it is known before one has begun."""
    return f"dl-{hashlib.sha256(model_id.encode()).hexdigest()[:12]}"


class Operation:
    """Use on the event loop only. ``spec``: how to load the model afterwards; None: not at all."""

    def __init__(self, plan: Plan, spec: LoadSpec | None) -> None:
        self.id = operation_id(plan.model_id)
        self.plan = plan
        self.spec = spec
        self.status = "queued"
        self.failure: CodedError | None = None
        self.result: LoadResult | None = None
        self.task: asyncio.Task[None] | None = None
        #: Somebody has asked for its end.
        self.cancelling = False
        self._done = [file.on_disk for file in plan.files]
        self._started_at = self._updated_at = time.time()
        self._samples: deque[tuple[float, int]] = deque()
        self._changed = asyncio.Event()

    @property
    def settled(self) -> bool:
        return self.status in SETTLED

    @property
    def to_write_bytes(self) -> int:
        """What it will still take from the disk."""
        return 0 if self.settled else self.plan.total_bytes - sum(self._done)

    def progress(self, progress: Progress) -> None:
        self._done[progress.index] = progress.bytes
        now = time.monotonic()
        self._samples.append((now, sum(self._done)))
        while self._samples[0][0] < now - _SPEED_WINDOW_S and len(self._samples) > 2:
            self._samples.popleft()
        self.turn("verifying" if progress.verifying else "downloading")

    def turn(self, status: str) -> None:
        self.status = status
        self._updated_at = time.time()
        self._changed.set()
        self._changed = asyncio.Event()

    def fail(self, failure: CodedError) -> None:
        self.failure = failure
        cancelled = failure.code is ErrorCode.DOWNLOAD_CANCELLED
        self.turn("cancelled" if cancelled else "failed")

    async def changed(self) -> None:
        """Wait for the next change."""
        await self._changed.wait()

    async def end(self) -> None:
        """Wait until it is settled. Raises how it ended, if that was badly."""
        while not self.settled:
            await self.changed()
        if (failure := self.failure) is not None:
            # One for each: a raised exception belongs to whoever raised it.
            raise CodedError(failure.code, failure.message, details=failure.details)

    def view(self) -> DownloadView:
        done, total = sum(self._done), self.plan.total_bytes
        speed = self._speed()
        return DownloadView(
            id=self.id,
            model_id=self.plan.model_id,
            status=self.status,
            downloaded_bytes=done,
            total_bytes=total,
            percent=round(100 * done / total, 1) if total else 100.0,
            files=[
                FileView(file.name, file.size, have)
                for file, have in zip(self.plan.files, self._done, strict=True)
            ],
            started_at=self._started_at,
            updated_at=self._updated_at,
            load=self.spec is not None,
            speed_bytes_per_s=speed,
            eta_s=round((total - done) / speed, 1) if speed else None,
            error=None
            if self.failure is None
            else Failure(self.failure.code.value, self.failure.message),
        )

    def _speed(self) -> float | None:
        if self.status != "downloading" or len(self._samples) < 2:
            return None
        (first, before), (last, after) = self._samples[0], self._samples[-1]
        return round((after - before) / (last - first), 1) if last > first else None

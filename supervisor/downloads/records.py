"""The downloads of one home, on disk: what a server's end interrupted is told by the next."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from protocol.errors import ErrorCode
from supervisor import jsonfile
from supervisor.downloads.operation import SETTLED, DownloadView, Failure

FILE_NAME = "downloads.json"
SCHEMA_VERSION = 1
#: How many settled ones are kept; the oldest go first.
MAX_RECORDS = 100

INTERRUPTED = Failure(
    ErrorCode.DOWNLOAD_FAILED.value,
    "interrupted by the end of the server; what has come is kept: ask again to go on",
)


class _File(msgspec.Struct, kw_only=True):
    schema_version: int = SCHEMA_VERSION
    downloads: list[DownloadView] = []


class Records:
    """Open it once per supervisor. The views of an earlier one are all settled."""

    def __init__(self, home: Path) -> None:
        file, self._writer = jsonfile.open_state(
            home / FILE_NAME, _File, schema_version=SCHEMA_VERSION
        )
        self.earlier = [_settled(view) for view in (file.downloads if file is not None else [])]

    def save(self, views: Sequence[DownloadView]) -> None:
        """All there are, the oldest first."""
        self._writer.save(_File(downloads=list(views)))

    async def flush(self) -> None:
        """Wait for the pending write."""
        await self._writer.flush()


def _settled(view: DownloadView) -> DownloadView:
    if view.status in SETTLED:
        return view
    return msgspec.structs.replace(
        view,
        status="failed",
        error=INTERRUPTED,
        speed_bytes_per_s=None,
        eta_s=None,
        updated_at=min(view.updated_at, time.time()),
    )

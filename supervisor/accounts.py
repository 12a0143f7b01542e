"""Failure accounts on disk, so that a restart of the supervisor is no amnesty.

In memory times are monotonic, on disk they are wall time; a stamp from the
future (a clock that was set back) counts as now.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from supervisor import jsonfile
from supervisor.quarantine import Account

FILE_NAME = "failure-accounts.json"
SCHEMA_VERSION = 1


class AccountKey(msgspec.Struct, frozen=True):
    """What failures are counted under: an upgrade of any part starts clean."""

    model: str
    digest: str
    backend: str
    backend_version: str


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    key: AccountKey
    failed_at: list[float]
    streak: int = 0
    level: int
    quarantined: bool
    quarantines: int
    last_reason: str = ""


class _File(msgspec.Struct, kw_only=True):
    schema_version: int = SCHEMA_VERSION
    accounts: list[_Entry] = []


class AccountStore:
    """All accounts of this home. ``monotonic`` and ``wall`` are clocks in seconds."""

    def __init__(
        self,
        home: Path,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        path = home / FILE_NAME
        self._monotonic = monotonic
        self._wall = wall
        file = jsonfile.read(path, _File, schema_version=SCHEMA_VERSION)
        entries = file.accounts if file is not None else []
        self._accounts = {entry.key: self._from_disk(entry) for entry in entries}
        self._writer = jsonfile.BackgroundWriter(path)

    def get(self, key: AccountKey) -> Account:
        """The account of ``key``, empty for one that never failed."""
        return self._accounts.get(key, Account())

    def put(self, key: AccountKey, account: Account) -> None:
        """Keep an account; it reaches the disk in the background."""
        self._accounts[key] = account
        entries = [self._to_disk(k, a) for k, a in self._accounts.items()]
        self._writer.save(_File(accounts=entries))

    def quarantined(self, model: str) -> list[AccountKey]:
        """The keys under which a model is quarantined, loaded or not."""
        return [key for key, a in self._accounts.items() if key.model == model and a.quarantined]

    async def flush(self) -> None:
        """Wait for the pending write."""
        await self._writer.flush()

    def _from_disk(self, entry: _Entry) -> Account:
        now, wall = self._monotonic(), self._wall()
        return Account(
            times=tuple(now - max(0.0, wall - at) for at in entry.failed_at),
            streak=entry.streak,
            level=entry.level,
            quarantined=entry.quarantined,
            quarantines=entry.quarantines,
            last_reason=entry.last_reason,
        )

    def _to_disk(self, key: AccountKey, account: Account) -> _Entry:
        now, wall = self._monotonic(), self._wall()
        return _Entry(
            key=key,
            failed_at=[wall - (now - at) for at in account.times],
            streak=account.streak,
            level=account.level,
            quarantined=account.quarantined,
            quarantines=account.quarantines,
            last_reason=account.last_reason,
        )

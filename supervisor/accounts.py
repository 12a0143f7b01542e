"""Failure accounts on disk, so that a restart of the supervisor is no amnesty.

In memory times are monotonic, on disk they are wall time; a stamp from the
future (a clock that was set back) counts as now.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from supervisor import jsonfile
from supervisor.quarantine import Account, Policy, brief, is_settled

FILE_NAME = "failure-accounts.json"
SCHEMA_VERSION = 1

#: Accounts kept; the longest without a failure go first, quarantined ones last.
MAX_ACCOUNTS = 1000


class AccountKey(msgspec.Struct, frozen=True):
    """What failures are counted under: an upgrade of any part starts clean."""

    model: str
    digest: str
    backend: str
    backend_version: str


class ReportTurn(Protocol):
    """Told when an account is quarantined, once more or for the first time, or released."""

    def __call__(
        self,
        event: Literal["quarantine", "release"],
        *,
        model: str,
        digest: str,
        backend: str,
        backend_version: str,
        reason: str,
    ) -> None: ...


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    key: AccountKey
    failed_at: list[float]
    streak: int = 0
    level: int
    healthy_s: float = 0.0
    quarantined: bool
    quarantines: int
    last_reason: str = ""


class _File(msgspec.Struct, kw_only=True):
    schema_version: int = SCHEMA_VERSION
    accounts: list[_Entry] = []


class AccountStore:
    """All accounts of this home that hold anything.

    ``policy`` says which failures are over. ``monotonic`` and ``wall`` are clocks in
    seconds.
    """

    def __init__(
        self,
        home: Path,
        policy: Policy | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        on_turn: ReportTurn | None = None,
    ) -> None:
        self._policy = policy or Policy()
        self._monotonic = monotonic
        self._wall = wall
        self._on_turn = on_turn
        file, self._writer = jsonfile.open_state(
            home / FILE_NAME, _File, schema_version=SCHEMA_VERSION
        )
        entries = file.accounts if file is not None else []
        self._accounts = {entry.key: self._from_disk(entry) for entry in entries}
        self._prune()

    def get(self, key: AccountKey) -> Account:
        """The account of ``key``, empty for one that never failed."""
        return self._accounts.get(key, Account())

    def put(
        self, key: AccountKey, account: Account, released: str = "released by the operator"
    ) -> None:
        """Keep an account; it reaches the disk in the background.

        ``released`` says how its quarantine ended, should this be the end of one.
        """
        before = self.get(key)
        if account == before:
            return
        self._accounts[key] = account
        self._prune()
        entries = [self._to_disk(k, a) for k, a in self._accounts.items()]
        self._writer.save(_File(accounts=entries))
        if account.quarantined and account.quarantines > before.quarantines:
            self._report(key, "quarantine", f"quarantined: {account.last_reason}")
        elif before.quarantined and not account.quarantined:
            self._report(key, "release", released)

    def quarantined(self, model: str) -> list[AccountKey]:
        """The keys under which a model is quarantined, loaded or not."""
        return [key for key, a in self._accounts.items() if key.model == model and a.quarantined]

    def all_quarantined(self) -> list[AccountKey]:
        """The keys of every quarantine."""
        return [key for key, account in self._accounts.items() if account.quarantined]

    async def flush(self) -> None:
        """Wait for the pending write."""
        await self._writer.flush()

    def _prune(self) -> None:
        """Forget what says no more than an empty account."""
        now = self._monotonic()
        kept = {k: a for k, a in self._accounts.items() if not is_settled(a, self._policy, now)}
        surplus = len(kept) - MAX_ACCOUNTS
        if surplus > 0:
            by_need = sorted(kept, key=lambda k: (kept[k].quarantined, kept[k].times[-1:]))
            for key in by_need[:surplus]:
                del kept[key]
        self._accounts = kept

    def _report(
        self, key: AccountKey, event: Literal["quarantine", "release"], reason: str
    ) -> None:
        if self._on_turn is not None:
            self._on_turn(
                event,
                model=key.model,
                digest=key.digest,
                backend=key.backend,
                backend_version=key.backend_version,
                reason=reason,
            )

    def _from_disk(self, entry: _Entry) -> Account:
        now, wall = self._monotonic(), self._wall()
        return Account(
            times=tuple(now - max(0.0, wall - at) for at in entry.failed_at),
            streak=entry.streak,
            level=entry.level,
            healthy_s=entry.healthy_s,
            quarantined=entry.quarantined,
            quarantines=entry.quarantines,
            last_reason=brief(entry.last_reason),
        )

    def _to_disk(self, key: AccountKey, account: Account) -> _Entry:
        now, wall = self._monotonic(), self._wall()
        return _Entry(
            key=key,
            failed_at=[wall - (now - at) for at in account.times],
            streak=account.streak,
            level=account.level,
            healthy_s=account.healthy_s,
            quarantined=account.quarantined,
            quarantines=account.quarantines,
            last_reason=account.last_reason,
        )

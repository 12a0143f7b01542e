"""Failure accounts: a restart of the supervisor is no amnesty."""

from pathlib import Path

import pytest

from supervisor.accounts import AccountKey, AccountStore
from supervisor.quarantine import Account, Policy, count_in_window

KEY = AccountKey("m", "digest", "llama", "1")
POLICY = Policy(window_s=600)


def store(home: Path, *, monotonic: float, wall: float) -> AccountStore:
    return AccountStore(home, monotonic=lambda: monotonic, wall=lambda: wall)


async def test_failures_keep_their_age_over_a_restart(tmp_path: Path) -> None:
    before = store(tmp_path, monotonic=1000, wall=50_000)
    before.put(KEY, Account(times=(500, 900), level=2, quarantines=1))
    await before.flush()
    after = store(tmp_path, monotonic=7, wall=50_150)
    account = after.get(KEY)
    assert list(account.times) == [7 - 650, 7 - 250]
    assert count_in_window(account, POLICY, now=7) == 1
    assert (account.level, account.quarantines) == (2, 1)


async def test_a_quarantine_survives(tmp_path: Path) -> None:
    before = store(tmp_path, monotonic=1000, wall=50_000)
    before.put(KEY, Account(quarantined=True))
    await before.flush()
    assert store(tmp_path, monotonic=0, wall=10**9).get(KEY).quarantined


async def test_stamps_from_the_future_count_as_now(tmp_path: Path) -> None:
    before = store(tmp_path, monotonic=1000, wall=50_000)
    before.put(KEY, Account(times=(1000,)))
    await before.flush()
    assert store(tmp_path, monotonic=7, wall=100).get(KEY).times == (7.0,)


@pytest.mark.parametrize(
    "other",
    [
        AccountKey("n", "digest", "llama", "1"),
        AccountKey("m", "changed", "llama", "1"),
        AccountKey("m", "digest", "mlx", "1"),
        AccountKey("m", "digest", "llama", "2"),
    ],
)
async def test_an_upgrade_of_any_part_starts_clean(tmp_path: Path, other: AccountKey) -> None:
    accounts = store(tmp_path, monotonic=0, wall=0)
    accounts.put(KEY, Account(quarantined=True))
    await accounts.flush()
    assert accounts.get(other) == Account()

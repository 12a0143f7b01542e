"""Failure accounts: a restart of the supervisor is no amnesty."""

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from supervisor import accounts as accounts_module
from supervisor.accounts import AccountKey, AccountStore
from supervisor.quarantine import Account, Policy, count_in_window, release

KEY = AccountKey("m", "digest", "llama", "1")
POLICY = Policy(window_s=600)


def store(home: Path, *, monotonic: float, wall: float) -> AccountStore:
    return AccountStore(home, monotonic=lambda: monotonic, wall=lambda: wall)


async def test_failures_keep_their_age_over_a_restart(tmp_path: Path) -> None:
    before = store(tmp_path, monotonic=1000, wall=50_000)
    before.put(KEY, Account(times=(500, 900), streak=2, level=2, healthy_s=7.5, quarantines=1))
    await before.flush()
    after = store(tmp_path, monotonic=7, wall=50_150)
    account = after.get(KEY)
    assert list(account.times) == [7 - 650, 7 - 250]
    assert count_in_window(account, POLICY, now=7) == 1
    assert (account.streak, account.level, account.healthy_s) == (2, 2, 7.5)
    assert account.quarantines == 1


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


async def test_quarantines_and_releases_are_told(tmp_path: Path) -> None:
    told: list[tuple[str, str, str]] = []

    def on_turn(event: str, *, reason: str, **key: str) -> None:
        assert key == msgspec.structs.asdict(KEY)
        told.append((event, reason, key["digest"]))

    accounts = AccountStore(tmp_path, on_turn=on_turn)
    failed = Account(streak=1, last_reason="segfault")
    accounts.put(KEY, failed)
    assert told == []
    quarantined = replace(failed, quarantined=True, quarantines=1)
    accounts.put(KEY, quarantined)
    accounts.put(KEY, quarantined)
    assert told == [("quarantine", "quarantined: segfault", "digest")]
    # On probation it fails once more, then serves the next one.
    accounts.put(KEY, replace(quarantined, quarantines=2, last_reason="hang"))
    accounts.put(KEY, release(quarantined), "probation served")
    accounts.put(KEY, release(quarantined))
    assert told[1:] == [
        ("quarantine", "quarantined: hang", "digest"),
        ("release", "probation served", "digest"),
    ]
    await accounts.flush()


async def test_a_quarantine_of_before_the_restart_is_not_told_again(tmp_path: Path) -> None:
    before = AccountStore(tmp_path)
    before.put(KEY, Account(quarantined=True, quarantines=1))
    await before.flush()
    told: list[str] = []
    after = AccountStore(tmp_path, on_turn=lambda event, **_: told.append(event))
    after.put(KEY, after.get(KEY))
    after.put(KEY, release(after.get(KEY)))
    assert told == ["release"]
    await after.flush()


async def test_the_accounts_of_a_later_version_are_left_whole(tmp_path: Path) -> None:
    path = tmp_path / "failure-accounts.json"
    later = '{"schema_version": 2, "accounts": {"other": "shape"}}'
    path.write_text(later)
    before = AccountStore(tmp_path)
    before.put(KEY, Account(quarantined=True))
    await before.flush()
    assert path.read_text() == later
    assert AccountStore(tmp_path).get(KEY).quarantined


async def test_an_account_that_has_not_changed_is_not_written(tmp_path: Path) -> None:
    accounts = AccountStore(tmp_path)
    accounts.put(KEY, Account())
    await accounts.flush()
    assert not list(tmp_path.iterdir())


async def test_what_holds_nothing_any_more_is_forgotten(tmp_path: Path) -> None:
    before = store(tmp_path, monotonic=1000, wall=50_000)
    over, failed_late, slowed, other = (
        AccountKey(name, "d", "llama", "1") for name in ("over", "late", "slowed", "other")
    )
    before.put(over, Account(times=(900,), level=0, last_reason="once"))
    before.put(failed_late, Account(times=(999,), level=0))
    before.put(slowed, Account(times=(1,), level=1))
    before.put(KEY, Account(times=(1,), level=1, quarantined=True))
    await before.flush()
    after = store(tmp_path, monotonic=1000, wall=50_590)
    after.put(other, Account(level=1))
    await after.flush()
    kept = json.loads((tmp_path / "failure-accounts.json").read_bytes())["accounts"]
    assert [entry["key"]["model"] for entry in kept] == ["late", "slowed", "m", "other"]
    assert after.get(over) == Account()


async def test_the_number_of_accounts_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts_module, "MAX_ACCOUNTS", 3)
    accounts = store(tmp_path, monotonic=1000, wall=50_000)
    accounts.put(KEY, Account(times=(1,), level=1, quarantined=True))
    for number in range(5):
        key = AccountKey(f"m{number}", "d", "llama", "1")
        accounts.put(key, Account(times=(500.0 + number,), level=1))
    await accounts.flush()
    again = store(tmp_path, monotonic=1000, wall=50_000)
    assert [again.get(AccountKey(f"m{n}", "d", "llama", "1")).level for n in range(5)] == [
        *(0, 0, 0),
        *(1, 1),
    ]
    assert again.get(KEY).quarantined

"""Failure accounting: how often a model may fail, and how long it waits in between.

Pure: no clock, no randomness. Times are seconds on whatever clock the caller
uses throughout; the edges convert to wall time when they persist an account.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class FailureKind(StrEnum):
    """What went wrong. Every kind counts; what must not count never becomes one."""

    SIGNAL = "signal"
    EXIT = "exit"
    HANG = "hang"
    LOAD_TIMEOUT = "load_timeout"
    LOADER = "loader"
    PROTOCOL = "protocol"
    CANARY = "canary"
    BACKEND_EXCEPTION = "backend_exception"


@dataclass(frozen=True, slots=True)
class Policy:
    """``threshold`` failures within ``window_s`` quarantine a model (``>=``).

    Every ``decay_s`` of healthy time takes one level off the restart delay.
    """

    threshold: int = 3
    window_s: float = 600.0
    delay_cap_s: float = 60.0
    decay_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Account:
    """The failures of one model, file digest, backend and backend version.

    ``times`` are those of the counted failures, oldest first; ``level`` drives
    the restart delay; ``quarantines`` counts how often the threshold was
    reached and is not forgotten by a release.
    """

    times: tuple[float, ...] = ()
    level: int = 0
    quarantined: bool = False
    quarantines: int = 0


def count_in_window(account: Account, policy: Policy, now: float) -> int:
    """Counted failures now in the window."""
    return sum(1 for time in account.times if now - time < policy.window_s)


def record_failure(
    account: Account, policy: Policy, now: float, *, healthy_s: float = 0.0, probation: bool = False
) -> Account:
    """Count one failure; quarantine at the threshold, on probation at once.

    ``healthy_s`` is how long the model had been routable when it failed.
    """
    times = (*(t for t in account.times if now - t < policy.window_s), now)
    level = max(0, account.level - int(healthy_s // policy.decay_s)) + 1
    quarantined = probation or len(times) >= policy.threshold
    return Account(
        times=times,
        level=level,
        quarantined=quarantined,
        quarantines=account.quarantines + quarantined,
    )


def restart_delay(account: Account, policy: Policy, jitter: float) -> float:
    """Seconds until the next try: 0, 1, 2, 4 … up to the cap, by level.

    ``jitter`` (0..1) spreads the delay over its upper half, so that models felled
    by one cause do not come back in one moment.
    """
    if account.level <= 1:
        return 0.0
    # The exponent is bounded first: 2.0**1100 would overflow.
    delay = min(policy.delay_cap_s, 2.0 ** min(account.level - 2, 60))
    return delay * (0.5 + 0.5 * jitter)


def enter_probation(account: Account) -> Account:
    """Let a quarantined model try again while its failures stay on record."""
    return replace(account, quarantined=False)


def release(account: Account) -> Account:
    """End a quarantine by the operator's word: the window starts empty."""
    return replace(account, times=(), quarantined=False)

"""Failure accounting: how often a model may fail, and how long it waits in between.

Pure: no clock, no randomness. Times are seconds on whatever clock the caller
uses throughout; the edges convert to wall time when they persist an account.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

#: Longest account of a failure. A backend's own words may be megabytes, and go into
#: answers, accounts, incidents and the registry.
MAX_REASON_CHARS = 500


def brief(reason: str) -> str:
    """The reason, cut if it is too long."""
    return reason if len(reason) <= MAX_REASON_CHARS else reason[: MAX_REASON_CHARS - 2] + " …"


class FailureKind(StrEnum):
    """What went wrong. Every kind counts; what must not count never becomes one."""

    SIGNAL = "signal"
    EXIT = "exit"
    HANG = "hang"
    MEMORY = "memory"
    LOAD_TIMEOUT = "load_timeout"
    LOADER = "loader"
    PROTOCOL = "protocol"
    CANARY = "canary"
    BACKEND_EXCEPTION = "backend_exception"


@dataclass(frozen=True, slots=True)
class Policy:
    """``threshold`` failures within ``window_s`` quarantine a model (``>=``), and so do
    that many in a row without being routable in between, however slowly they come.

    Every ``decay_s`` of healthy time takes one level off the restart delay.
    """

    threshold: int = 3
    window_s: float = 600.0
    delay_cap_s: float = 60.0
    decay_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Account:
    """The failures of one model, file digest, backend and backend version.

    ``times`` are those of the counted failures, oldest first; ``streak`` is how
    many came since the model was last routable; ``level`` drives the restart
    delay; ``healthy_s`` is healthy time since the last failure that has not taken a
    level off yet; ``quarantines`` counts how often the model was quarantined and is
    not forgotten by a release; ``last_reason`` tells of the last failure. On
    probation an account stays ``quarantined``.
    """

    times: tuple[float, ...] = ()
    streak: int = 0
    level: int = 0
    healthy_s: float = 0.0
    quarantined: bool = False
    quarantines: int = 0
    last_reason: str = ""


def count_in_window(account: Account, policy: Policy, now: float) -> int:
    """Counted failures now in the window."""
    return sum(1 for time in account.times if now - time < policy.window_s)


def is_settled(account: Account, policy: Policy, now: float) -> bool:
    """Whether nothing of what was counted makes a difference any more."""
    return not (
        account.quarantined
        or account.level
        or account.streak
        or count_in_window(account, policy, now)
    )


def record_routable(account: Account) -> Account:
    """The model has become routable: that ends a row of failures."""
    return replace(account, streak=0)


def record_health(account: Account, policy: Policy, healthy_s: float) -> Account:
    """The model has been routable for so long, and is not any more, for whatever reason."""
    levels, rest = divmod(account.healthy_s + healthy_s, policy.decay_s)
    level = max(0, account.level - int(levels))
    return replace(account, level=level, healthy_s=rest if level else 0.0)


def record_failure(account: Account, policy: Policy, now: float, *, reason: str = "") -> Account:
    """Count one failure; quarantine at the threshold, on probation at once."""
    times = (*(t for t in account.times if now - t < policy.window_s), now)
    streak = account.streak + 1
    on_probation = account.quarantined
    quarantined = on_probation or max(len(times), streak) >= policy.threshold
    return Account(
        times=times,
        streak=streak,
        level=account.level + 1,
        quarantined=quarantined,
        quarantines=account.quarantines + quarantined,
        last_reason=reason,
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


def release(account: Account) -> Account:
    """End a quarantine, by the operator's word or a probation served: a clean window."""
    return replace(account, times=(), streak=0, quarantined=False)

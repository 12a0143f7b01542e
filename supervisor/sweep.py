"""Kills what an earlier server of the same home has left, before anything is started."""

from __future__ import annotations

import logging

from supervisor.marks import await_gone, home_mark, kill_marked
from supervisor.services import Services

log = logging.getLogger(__name__)

#: How long a start waits for what an earlier server left: it holds memory until it ends.
SWEEP_TIMEOUT_S = 10.0


def sweep(services: Services) -> None:
    """Nobody else runs workers of this home: its lock is the caller's."""
    swept = [*services.ledger.sweep(), *kill_marked(home_mark(services.settings.home))]
    if left := await_gone(swept, SWEEP_TIMEOUT_S):
        log.error("left by an earlier server, and they do not end: %s", left)
        services.left_behind.update(left)

"""What a server keeps in its home, as far as the harness looks at it."""

from __future__ import annotations

from tests.chaos.harness.report import Row
from tests.chaos.harness.rig import Rig

REGISTRY = "compatibility-registry.json"
ACCOUNTS = "failure-accounts.json"


def check_nothing_set_aside(rig: Rig, row: Row) -> None:
    if aside := [path.name for path in rig.home.glob("*.unreadable-*")]:
        row.breach(f"state files were torn: {aside}")

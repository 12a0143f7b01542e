"""What a worker inherits."""

from __future__ import annotations

import pytest

from protocol.handshake import BOOT_ENV, decode_boot
from supervisor.marks import MARK_ENV
from supervisor.process import worker_environment
from tests.unit.protocol.test_handshake import BOOT


def test_a_worker_inherits_its_boot_record_and_none_of_our_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPTA_LMX_ADMIN_KEY", "secret")
    monkeypatch.setenv("LANG", "C.UTF-8")
    found = worker_environment(BOOT, "mark")
    assert decode_boot(found[BOOT_ENV]) == BOOT
    assert (found[MARK_ENV], found["LANG"], found["HF_HUB_OFFLINE"]) == ("mark", "C.UTF-8", "1")
    assert "OPTA_LMX_ADMIN_KEY" not in found


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=3", "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
        # Whoever has decided otherwise knows why.
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_huge_pages_are_asked_for_beside_what_is_tuned_already(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if before is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", before)
    assert worker_environment(BOOT, "mark")["GLIBC_TUNABLES"] == after

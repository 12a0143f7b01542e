"""Which promises are not kept: each has its code, and a server without trouble has none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from supervisor.health import DISK_LOW_BYTES, LAG_HIGH_S, Facts, assess
from tests.support.fake_fleet import readiness, view

WELL = Facts(
    models=[view("m"), view("new", readiness=readiness("loading", "loading"))],
    available=2_000_000_000,
    low_water=1_000_000_000,
    home_free=DISK_LOW_BYTES,
)


def codes(facts: Facts) -> list[tuple[str, str | None]]:
    health = assess(facts)
    assert health.status == ("degraded" if health.reasons else "ok")
    assert all(reason.message for reason in health.reasons)
    return [(reason.code, reason.model) for reason in health.reasons]


def test_a_server_that_loads_and_serves_is_well() -> None:
    assert codes(WELL) == []


def test_models_are_told_one_by_one() -> None:
    failed = readiness("loading", "killed by SIGSEGV", code="model_crashed")
    facts = replace(
        WELL,
        models=[
            view("a", readiness=readiness("quarantined", "3 crashes", code="model_crashed")),
            view("b", readiness=failed),
            view("c", readiness=readiness("canary_pending", "canary", code="model_crashed")),
            view("d", readiness=failed, unloading=True),
            view("e", readiness=readiness("routable", "canary passed")),
        ],
    )
    assert codes(facts) == [
        *(("model_quarantined", "a"), ("model_restarting", "b"), ("model_restarting", "c")),
    ]
    assert assess(facts).reasons[0].message == "3 crashes"


def test_a_configured_model_that_could_not_be_loaded_is_missing_until_it_is_there() -> None:
    failed = replace(WELL, failed_loads={"gone": "no such file (model_not_found)", "m": "x"})
    assert codes(failed) == [("model_not_loaded", "gone")]
    # After a safe start none was loaded, for one reason.
    assert codes(replace(failed, safe_start="three bad starts")) == [("safe_start", None)]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"available": 999_999_999}, "memory_low"),
        ({"home_free": DISK_LOW_BYTES - 1}, "disk_low"),
        ({"home_free": None}, "home_unavailable"),
        ({"set_aside": ["x.json.unreadable-1"]}, "state_file_set_aside"),
        ({"unwritten": {"x.json": "no space left"}}, "state_not_written"),
        ({"lag": LAG_HIGH_S}, "event_loop_late"),
        ({"left": [4711]}, "process_left_behind"),
    ],
)
def test_what_is_wrong_with_the_server_has_a_code(change: dict[str, object], code: str) -> None:
    assert codes(replace(WELL, **change)) == [(code, None)]  # type: ignore[arg-type]

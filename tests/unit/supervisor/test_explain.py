"""What ``opta-lmx explain`` says of each state."""

from typing import Any

import pytest

from supervisor.explain import explain

READINESS: dict[str, Any] = {
    "state": "routable",
    "reason": "canary passed",
    "crash_count": 0,
    "updated_at": 1_700_000_000.0,
    "retry_at": None,
    "probation": False,
}
INCIDENT: dict[str, Any] = {
    "id": "20260101T000000Z-00000000",
    "timestamp": 1_700_000_000.0,
    "kind": "signal",
    "phase": "decode",
    "generation": 3,
    "reason": "killed by SIGSEGV",
}


def told(incidents: list[dict[str, Any]] | None = None, **readiness: object) -> str:
    view = {"readiness": {**READINESS, **readiness}, "unloading": False}
    return "\n".join(explain("m", view, incidents or [], []))


def test_a_routable_model_needs_nothing() -> None:
    assert "m is routable since 2023-11-" in told()
    assert "next: nothing" in told()


def test_a_model_that_is_on_its_way_is_waited_for() -> None:
    text = told(state="loading", reason="killed by SIGSEGV", retry_at=1_700_000_060.0)
    assert "next try: 2023-11-" in text
    assert "next: wait" in text


@pytest.mark.parametrize(
    ("kind", "advice"), [("memory", "smaller context"), ("signal", "backend version")]
)
def test_a_quarantined_model_has_ways_out(kind: str, advice: str) -> None:
    text = told([{**INCIDENT, "kind": kind}], state="quarantined", crash_count=3)
    assert "failures in the window: 3" in text
    assert f"{kind} in decode (generation 3)" in text
    assert f"GET /admin/incidents/{INCIDENT['id']}" in text
    assert advice in text
    assert "opta-lmx release m" in text
    assert "--allow-unsupported-runtime" in text


def test_many_incidents_are_not_all_told() -> None:
    text = told([INCIDENT] * 5, state="quarantined")
    assert text.count("killed by SIGSEGV") == 3
    assert "2 earlier incidents" in text


def record(outcome: str = "fail", reason: str = "killed", **metadata: str) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "backend": "llama",
        "backend_version": "0.3.36",
        "timestamp": 1_700_000_000.0,
        "reason": reason,
        "metadata": metadata,
    }


def test_a_model_that_is_not_loaded_tells_what_is_known() -> None:
    text = "\n".join(explain("m", None, [], [record(reason="unknown architecture")]))
    assert "m is not loaded" in text
    assert "fail on llama 0.3.36" in text
    assert "unknown architecture" in text
    assert "last passed: never" in text
    assert "next: opta-lmx load m" in text


def test_a_release_is_nothing_that_became_of_a_model() -> None:
    release = record(reason="released by the operator", event="release")
    quarantine = record(reason="quarantined: killed", event="quarantine")
    records = [release, quarantine, record(), record("pass", "canary passed")]
    text = "\n".join(explain("m", None, [], records))
    assert "released" not in text
    assert "last known: fail on llama 0.3.36, 2023-11-" in text
    assert "last passed: llama 0.3.36, 2023-11-" in text
    assert "last known" not in "\n".join(explain("m", None, [], [release]))


def test_a_refused_load_says_what_it_lacks() -> None:
    refused = record(reason="b.safetensors is missing", code="model_incomplete")
    text = "\n".join(explain("m", None, [], [refused]))
    assert "b.safetensors is missing" in text
    assert "next: complete its files; then opta-lmx load m" in text


def test_a_model_at_the_gate_is_waited_for() -> None:
    text = "\n".join(explain("m", None, [], [], refusal="model_not_ready"))
    assert "m is about to be loaded" in text
    assert "next: wait" in text


def test_a_model_that_leaves_is_waited_for() -> None:
    view = {"readiness": READINESS, "unloading": True}
    text = "\n".join(explain("m", view, [], []))
    assert "m is being unloaded" in text
    assert "next: wait" in text


def test_what_is_on_record_is_told_of_a_quarantined_model_too() -> None:
    view = {"readiness": {**READINESS, "state": "quarantined"}, "unloading": False}
    text = "\n".join(explain("m", view, [], [record(), record("pass", "canary passed")]))
    assert "last passed: llama 0.3.36, 2023-11-" in text


def test_the_canary_is_named_once() -> None:
    text = told([{**INCIDENT, "kind": "canary", "phase": "canary"}], state="quarantined")
    assert ": canary (generation 3)" in text

"""The compatibility registry: what is remembered, found again, and bounded."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from supervisor import registry as registry_module
from supervisor.compatibility import EventName, Outcome
from supervisor.registry import FILE_NAME, Registry


def add(registry: Registry, model: str, outcome: Outcome = "pass", version: str = "1") -> None:
    registry.add(
        model=model,
        backend="llama",
        backend_version=version,
        outcome=outcome,
        reason=f"{model} {outcome}",
        metadata={"tokens_per_s": 12.5},
    )


def add_event(registry: Registry, model: str, event: EventName) -> None:
    registry.add_event(
        event, model=model, digest="d", backend="llama", backend_version="1", reason=event
    )


def summaries(page: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = page["summary"]
    return found


def models(page: dict[str, Any]) -> list[str]:
    return [record.model for record in page["records"]]


@pytest.fixture
def ticking(tmp_path: Path) -> Registry:
    ticks = count(100)
    return Registry(tmp_path, clock=lambda: float(next(ticks)))


async def test_records_survive_a_restart(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    add(registry, "a")
    add(registry, "b", "fail")
    await registry.flush()
    assert Registry(tmp_path).query() == registry.query()


async def test_the_file_is_what_the_runbook_says(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    add(registry, "a")
    await registry.flush()
    (record,) = json.loads((tmp_path / FILE_NAME).read_text())["records"]
    assert set(record) == {
        "model",
        "backend",
        "backend_version",
        "outcome",
        "reason",
        "metadata",
        "timestamp",
    }


async def test_queries_filter_and_count_truly(ticking: Registry) -> None:
    for number in range(5):
        add(ticking, "a", "fail" if number == 2 else "pass")
    add(ticking, "b")
    page = ticking.query(model="a", limit=2)
    assert models(page) == ["a", "a"]
    assert page["total"] == 5
    assert ticking.query(outcome="fail")["total"] == 1
    assert ticking.query(backend="mlx")["total"] == 0
    assert ticking.query(since=104)["total"] == 2
    assert models(ticking.query(limit=1)) == ["b"]


async def test_the_summary_is_per_model_backend_and_version(ticking: Registry) -> None:
    add(ticking, "a", "pass")
    add(ticking, "a", "fail")
    add(ticking, "a", "pass", version="2")
    summary = ticking.query()["summary"]
    assert isinstance(summary, list)
    assert [(s["backend_version"], s["pass"], s["fail"], s["last_outcome"]) for s in summary] == [
        ("2", 1, 0, "pass"),
        ("1", 1, 1, "fail"),
    ]


async def test_the_history_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "MAX_RECORDS", 3)
    registry = Registry(tmp_path)
    for model in "abcde":
        add(registry, model)
    await registry.flush()
    assert models(Registry(tmp_path).query()) == ["e", "d", "c"]


async def test_a_busy_model_does_not_push_out_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "MAX_RECORDS", 4)
    registry = Registry(tmp_path)
    add(registry, "a", version="1")
    add(registry, "b")
    for _ in range(5):
        add(registry, "a", version="2")
    await registry.flush()
    kept = [(r.model, r.backend_version) for r in Registry(tmp_path).records]
    assert kept == [("a", "1"), ("b", "1"), ("a", "2"), ("a", "2")]


async def test_events_are_no_outcomes(ticking: Registry) -> None:
    add(ticking, "a", "pass")
    add(ticking, "a", "fail")
    add_event(ticking, "a", "quarantine")
    add_event(ticking, "a", "release")
    add_event(ticking, "b", "release")
    page = ticking.query(model="a")
    assert page["total"] == 4
    (summary,) = summaries(page)
    assert (summary["pass"], summary["fail"], summary["events"]) == (1, 1, 2)
    assert (summary["last_outcome"], summary["last_timestamp"]) == ("fail", 101.0)
    (summary,) = summaries(ticking.query(model="b"))
    assert (summary["fail"], summary["events"], summary["last_outcome"]) == (0, 1, None)
    assert ticking.query(outcome="fail")["total"] == 1


async def test_what_was_added_is_nobody_elses_to_change(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    metadata: dict[str, object] = {"tokens": [1]}
    registry.add(
        model="a",
        backend="llama",
        backend_version="1",
        outcome="pass",
        reason="x" * 100_000,
        metadata=metadata,
    )
    metadata["tokens"] = [2]
    (record,) = registry.records
    assert record.metadata == {"tokens": [1]}
    assert len(record.reason) < 10_000
    await registry.flush()


@pytest.mark.parametrize(
    ("reason", "metadata"),
    [("bad \udcff", {}), ("x", {"tail": "\ud800"}), ("x", {"odd": object()})],
)
async def test_a_record_that_is_no_json_keeps_no_other_off_the_disk(
    tmp_path: Path, reason: str, metadata: dict[str, object]
) -> None:
    registry = Registry(tmp_path)
    registry.add(
        model="a",
        backend="llama",
        backend_version="1",
        outcome="fail",
        reason=reason,
        metadata=metadata,
    )
    add(registry, "b")
    await registry.flush()
    assert models(Registry(tmp_path).query()) == ["b", "a"]
    assert Registry(tmp_path).query() == registry.query()


async def test_handed_out_records_stay_as_they_are(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    add(registry, "a")
    before = registry.records
    add(registry, "b")
    assert [record.model for record in before] == ["a"]
    await registry.flush()


async def test_the_registry_of_a_later_version_is_left_whole(tmp_path: Path) -> None:
    later = '{"schema_version": 2, "records": [{"model": "a", "verdict": "fine"}]}'
    (tmp_path / FILE_NAME).write_text(later)
    registry = Registry(tmp_path)
    add(registry, "b")
    await registry.flush()
    assert (tmp_path / FILE_NAME).read_text() == later
    assert models(Registry(tmp_path).query()) == ["b"]
    assert (tmp_path / "compatibility-registry.v1.json").exists()


async def test_garbage_is_no_reason_not_to_start(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("not json")
    registry = Registry(tmp_path)
    add(registry, "a")
    await registry.flush()
    assert models(Registry(tmp_path).query()) == ["a"]
    assert any("unreadable" in path.name for path in tmp_path.iterdir())

"""The compatibility registry: what is remembered, found again, and bounded."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from supervisor import registry as registry_module
from supervisor.registry import FILE_NAME, Outcome, Registry


def add(registry: Registry, model: str, outcome: Outcome = "pass", version: str = "1") -> None:
    registry.add(
        model=model,
        backend="llama",
        backend_version=version,
        outcome=outcome,
        reason=f"{model} {outcome}",
        metadata={"tokens_per_s": 12.5},
    )


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


async def test_garbage_is_no_reason_not_to_start(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("not json")
    registry = Registry(tmp_path)
    add(registry, "a")
    await registry.flush()
    assert models(Registry(tmp_path).query()) == ["a"]
    assert any("unreadable" in path.name for path in tmp_path.iterdir())

"""Loading the configured models, and not loading them after bad starts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from protocol.errors import CodedError, ErrorCode
from supervisor import autoload
from supervisor.autoload import Autoload
from supervisor.gate import LoadSpec

SPECS = [LoadSpec(model_id="a"), LoadSpec(model_id="b")]


async def begin(home: Path, *, limit: int = 3, fails: str = "") -> tuple[Autoload, list[str]]:
    """A start that loads its models, and what became of each; nothing ends it well."""
    made = Autoload(home, SPECS, limit)
    said: list[str] = []
    done: list[str] = []
    told = asyncio.Event()

    async def load(spec: LoadSpec) -> None:
        if spec.model_id == fails:
            raise CodedError(ErrorCode.MODEL_INCOMPLETE, "incomplete")

    def report(model_id: str, error: CodedError | None) -> None:
        said.append(f"{model_id}: {error.message if error else 'loaded'}")
        if model_id == SPECS[-1].model_id:
            told.set()

    task = asyncio.create_task(made.run(load, done.append, report))
    async with asyncio.timeout(10):
        await told.wait()
    task.cancel()
    assert done == ["a", "b"]
    return made, said


async def test_one_after_the_other_whatever_comes_of_it(tmp_path: Path) -> None:
    made, said = await begin(tmp_path, fails="a")
    assert said == ["a: incomplete", "b: loaded"]
    assert made.safe_start is None


async def test_three_bad_starts_make_a_safe_one(tmp_path: Path) -> None:
    for _ in range(3):
        made, said = await begin(tmp_path)
        assert said == ["a: loaded", "b: loaded"]
    made, said = await begin(tmp_path)
    assert made.safe_start is not None
    assert "last 3 starts" in made.safe_start
    assert said == [f"a: {made.safe_start}", f"b: {made.safe_start}"]
    await made.went_well()
    _, said = await begin(tmp_path)
    assert said == ["a: loaded", "b: loaded"]


async def test_a_start_that_has_settled_was_a_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoload, "SETTLED_S", 0.0)
    for _ in range(3):
        await begin(tmp_path)
    made = Autoload(tmp_path, SPECS, 3)
    await made.run(load_nothing, lambda _: None, lambda *_: None)
    assert Autoload(tmp_path, SPECS, 3).safe_start is None


async def load_nothing(_spec: LoadSpec) -> None:
    pass


async def test_it_can_be_turned_off(tmp_path: Path) -> None:
    for _ in range(5):
        made, said = await begin(tmp_path, limit=0)
        assert made.safe_start is None
        assert said == ["a: loaded", "b: loaded"]


async def test_without_models_there_is_nothing_to_be_safe_from(tmp_path: Path) -> None:
    for _ in range(3):
        await begin(tmp_path)
    assert Autoload(tmp_path, [], 3).safe_start is None

"""What can be looked up without a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.errors import CodedError, ErrorCode
from supervisor.compatibility import Outcome
from supervisor.gate import Gate
from supervisor.incidents import IncidentStore
from supervisor.records import Records
from supervisor.registry import Registry
from supervisor.runtimes import SIMULATED_VERSION
from supervisor.settings import Settings
from tests.support.server import write_script


class Scene:
    def __init__(self, home: Path) -> None:
        self.registry = Registry(home)
        settings = Settings(home=home, enable_simulated=True)
        gate = Gate(settings, self.registry, ())
        self.records = Records(self.registry, IncidentStore(home), lambda: gate)

    async def learn(self, model: str, version: str, outcome: Outcome) -> None:
        self.registry.add(
            model=model,
            backend="simulated",
            backend_version=version,
            outcome=outcome,
            reason=f"{outcome} on {version}",
            metadata={"digest": "file"},
        )
        await self.registry.flush()


async def test_verdicts_and_regressions_are_of_what_is_installed(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    await scene.learn("m", "0.1", "pass")
    await scene.learn("m", SIMULATED_VERSION, "fail")
    await scene.learn("other", SIMULATED_VERSION, "pass")
    told = await scene.records.recommendations(model="m")
    assert told["count"] == 2
    assert isinstance(found := told["recommendations"], list)
    assert [(r.backend_version, r.verdict, r.installed) for r in found] == [
        ("0.1", "allow", False),
        (SIMULATED_VERSION, "deny", True),
    ]
    assert (await scene.records.recommendations())["count"] == 3
    assert (await scene.records.regressions(backend="simulated"))["count"] == 1
    assert (await scene.records.regressions(model="other"))["count"] == 0
    assert (await scene.records.compatibility(model="m", outcome="fail"))["total"] == 1


async def test_an_incident_that_nobody_knows_is_not_found(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    assert scene.records.incidents() == []
    with pytest.raises(CodedError) as raised:
        scene.records.incident("inc_0")
    assert raised.value.code is ErrorCode.NOT_FOUND


async def test_what_is_on_disk_is_counted(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    (tmp_path / "models").mkdir()
    write_script(tmp_path / "models", "m")
    told = await scene.records.available()
    assert told["count"] == 1
    assert isinstance(models := told["models"], list)
    assert [model.id for model in models] == ["m"]

"""What the gate refuses is on record: of which file and backend, as far as that is known."""

from pathlib import Path

import pytest

from protocol.errors import CodedError, ErrorCode
from supervisor.admission import BlockRule
from supervisor.compatibility import Record
from supervisor.gate import Gate, LoadSpec
from supervisor.registry import Registry
from supervisor.runtimes import SIMULATED_VERSION
from supervisor.settings import ModelSetting, Settings


class Scene:
    def __init__(self, home: Path, *rules: BlockRule, simulated: bool = True) -> None:
        self.models = home / "models"
        self.models.mkdir(exist_ok=True)
        self.registry = Registry(home)
        settings = Settings(home=home, enable_simulated=simulated)
        self.gate = Gate(settings, self.registry, rules)

    async def refused(self, model_id: str, backend: str | None = None) -> ErrorCode:
        with pytest.raises(CodedError) as raised:
            await self.gate.admit(LoadSpec(model_id=model_id, backend=backend))
        await self.registry.flush()
        return raised.value.code

    @property
    def record(self) -> Record:
        (record,) = self.registry.records
        assert record.outcome == "fail"
        return record


async def test_a_file_that_cannot_be_read_is_on_record(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    (scene.models / "short.gguf").write_bytes(b"GGUF")
    assert await scene.refused("short") is ErrorCode.MODEL_INCOMPLETE
    assert (scene.record.model, scene.record.backend) == ("short", "llama")
    assert scene.record.text("code") == "model_incomplete"
    assert scene.record.digest is None


async def test_a_folder_without_its_config_is_on_record(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    (scene.models / "org" / "bare").mkdir(parents=True)
    assert await scene.refused("org/bare") is ErrorCode.MODEL_INCOMPLETE
    assert (scene.record.model, scene.record.backend) == ("org/bare", "mlx")


async def test_a_backend_that_does_not_suit_is_on_record_with_the_file(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    (scene.models / "sim.sim.json").write_text("{}")
    assert await scene.refused("sim", "llama") is ErrorCode.MODEL_UNSUPPORTED_BACKEND
    assert scene.record.backend == "llama"
    assert scene.record.digest is not None
    assert scene.record.text("architecture") == "simulated"


async def test_a_backend_that_is_not_here_has_no_version(tmp_path: Path) -> None:
    scene = Scene(tmp_path, simulated=False)
    (scene.models / "sim.sim.json").write_text("{}")
    assert await scene.refused("sim") is ErrorCode.MODEL_UNSUPPORTED_BACKEND
    assert (scene.record.backend, scene.record.backend_version) == ("simulated", "")


async def test_a_blocked_combination_is_on_record(tmp_path: Path) -> None:
    scene = Scene(tmp_path, BlockRule({}, "simulated", "", "known to crash"))
    (scene.models / "sim.sim.json").write_text("{}")
    assert await scene.refused("sim") is ErrorCode.MODEL_UNSUPPORTED_BACKEND
    assert scene.record.backend_version == SIMULATED_VERSION
    assert "known to crash" in scene.record.reason


async def test_asking_again_adds_no_second_record(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    (scene.models / "short.gguf").write_bytes(b"GGUF")
    await scene.refused("short")
    first = scene.record
    await scene.refused("short")
    assert scene.record.timestamp > first.timestamp
    (scene.models / "short.gguf").write_bytes(b"not a model")
    await scene.refused("short")
    assert len(scene.registry.records) == 2


async def test_what_is_nowhere_is_not_on_record(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    assert await scene.refused("nowhere") is ErrorCode.MODEL_NOT_FOUND
    assert not scene.registry.records


async def test_a_draft_model_is_a_path_or_in_the_models_folder(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for name in ("large", "small"):
        (scene.models / f"{name}.sim.json").write_text("{}")
    small = scene.models / "small.sim.json"
    for wanted in ("small", str(small)):
        model = await scene.gate.admit(LoadSpec(model_id="large", draft_model=wanted))
        assert model.draft_path == small
    assert (await scene.gate.admit(LoadSpec(model_id="large"))).draft_path is None


async def test_a_draft_model_of_the_settings(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for name in ("large", "small"):
        (scene.models / f"{name}.sim.json").write_text("{}")
    models = (ModelSetting(path="large", draft_model="small"),)
    settings = Settings(home=tmp_path, enable_simulated=True, models=models)
    gate = Gate(settings, scene.registry, ())
    model = await gate.admit(LoadSpec(model_id="large"))
    assert model.draft_path == scene.models / "small.sim.json"


@pytest.mark.parametrize(
    ("own", "all_", "expected"),
    [(None, True, True), (None, False, False), (False, True, False), (True, False, True)],
)
async def test_whether_answers_go_on_is_a_models_own_setting_first(
    tmp_path: Path, own: bool | None, all_: bool, expected: bool
) -> None:
    scene = Scene(tmp_path)
    (scene.models / "m.sim.json").write_text("{}")
    models = (ModelSetting(path="m", resume=own),)
    settings = Settings(home=tmp_path, enable_simulated=True, models=models, resume=all_)
    gate = Gate(settings, scene.registry, ())
    assert (await gate.admit(LoadSpec(model_id="m"))).resume is expected


async def test_a_draft_model_that_is_nowhere_is_no_verdict_on_the_model(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    (scene.models / "large.sim.json").write_text("{}")
    with pytest.raises(CodedError, match="draft model") as raised:
        await scene.gate.admit(LoadSpec(model_id="large", draft_model="nowhere"))
    assert (raised.value.code, raised.value.param) == (ErrorCode.INVALID_VALUE, "draft_model")
    assert not scene.registry.records

"""The models of a machine: found in every place, described without a backend."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from protocol.messages import ModelKind
from supervisor import modelfiles
from supervisor.admission import BlockRule
from supervisor.catalog import AvailableModel, Catalog, hub_cache_dir
from supervisor.settings import ModelSetting
from tests.support.tiny_bert import write_tiny_bert
from tests.support.tiny_gguf import write_tiny_gguf

INSTALLED = {"llama": "0.3", "mlx": "1.0", "simulated": None}


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def cache(root: Path, repo: str) -> Path:
    """The folder of a model in the hub's cache, as its library lays it out."""
    folder = root / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")
    return snapshot


def available(
    models_dir: Path,
    installed: Mapping[str, str | None] = INSTALLED,
    configured: Mapping[str, ModelSetting] | None = None,
    rules: tuple[BlockRule, ...] = (),
) -> dict[str, AvailableModel]:
    catalog = Catalog(models_dir, models_dir.parent / "hub", configured or {}, rules)
    found = catalog.available(installed)
    assert [model.id for model in found] == sorted(model.id for model in found)
    return {model.id: model for model in found}


def test_nothing_anywhere(tmp_path: Path) -> None:
    assert available(tmp_path / "nowhere") == {}


def test_every_place_and_what_is_there(models_dir: Path, tiny_gguf: Path, tiny_mlx: Path) -> None:
    shutil.copy(tiny_gguf, models_dir / "plain.gguf")
    write_tiny_gguf(models_dir / "split.gguf", tensors_per_part=16)
    shutil.copytree(tiny_mlx, models_dir / "org" / "mlx")
    (models_dir / "org" / "ggufs").mkdir()
    shutil.copy(tiny_gguf, models_dir / "org" / "ggufs" / "q4.gguf")
    (models_dir / "org" / "ggufs" / "config.json").write_text("{}")
    (models_dir / "echo.sim.json").write_text("{}")
    (models_dir / ".hidden.gguf").touch()
    write_tiny_bert(models_dir / "bert.gguf")
    hub = models_dir.parent / "hub"
    shutil.copytree(tiny_mlx, cache(hub, "far/mlx"), dirs_exist_ok=True)
    shutil.copy(tiny_gguf, cache(hub, "far/gguf") / "f16.gguf")
    given = write_tiny_gguf(models_dir.parent / "given.gguf")
    configured = {"mine": ModelSetting(path=str(given)), "later": ModelSetting(path="later")}
    found = available(models_dir, configured=configured)
    assert {name: model.source for name, model in found.items()} == {
        "bert": "models_dir",
        "far/gguf:f16": "hub_cache",
        "far/mlx": "hub_cache",
        "mine": "configured",
        "org/ggufs:q4": "models_dir",
        "org/mlx": "models_dir",
        "plain": "models_dir",
        "split": "models_dir",
    }
    for name, model in found.items():
        assert model.complete
        if model.source != "configured":
            assert modelfiles.find(name, models_dir, hub) == Path(model.path)
    plain, split = found["plain"], found["split"]
    assert plain.context_length == 2048
    assert plain.has_chat_template
    assert [(option.backend, option.usable) for option in plain.backends] == [("llama", True)]
    assert plain.parameters == split.parameters
    assert split.files is not None
    assert split.files > 1
    assert found["bert"].kind is ModelKind.EMBED
    assert found["org/mlx"].format == "mlx"
    assert "echo" in available(models_dir, {**INSTALLED, "simulated": "1"})


def test_a_configured_model_of_the_models_folder_is_listed_once(
    models_dir: Path, tiny_gguf: Path
) -> None:
    path = shutil.copy(tiny_gguf, models_dir / "file.gguf")
    assert list(available(models_dir, configured={"mine": ModelSetting(path=str(path))})) == [
        "mine"
    ]


def test_what_is_damaged_is_listed_with_what_is_wrong(models_dir: Path, tiny_gguf: Path) -> None:
    (models_dir / "cut.gguf").write_bytes(tiny_gguf.read_bytes()[:1000])
    (models_dir / "folder").mkdir()
    (models_dir / "folder" / "config.json").write_text('{"model_type": "llama"}')
    found = available(models_dir)
    assert not found["cut"].complete
    assert "truncated" in (found["cut"].problem or "") or "header" in (found["cut"].problem or "")
    assert "no weights" in (found["folder"].problem or "")


def test_why_not(models_dir: Path, tiny_gguf: Path, tiny_mlx: Path) -> None:
    shutil.copy(tiny_gguf, models_dir / "a.gguf")
    [option] = available(models_dir, {"llama": None})["a"].backends
    assert (option.usable, option.reason) == (False, "it is not installed")
    rule = BlockRule({"architecture": "llama"}, "llama", "", "it aborts")
    [option] = available(models_dir, rules=(rule,))["a"].backends
    assert (option.usable, option.reason) == (False, "it aborts")


def test_drafts_have_the_same_vocabulary_and_are_smaller(models_dir: Path, tiny_mlx: Path) -> None:
    from tests.support.tiny_mlx import write_tiny_mlx

    write_tiny_mlx(models_dir / "large", hidden=256, layers=8)
    write_tiny_mlx(models_dir / "small", hidden=64, layers=1)
    write_tiny_mlx(models_dir / "other", hidden=64, layers=1)
    tokenizer = models_dir / "other" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    found = available(models_dir)
    assert found["large"].drafts == ["small"]
    assert found["small"].drafts == []


def test_a_cache_that_is_none(models_dir: Path) -> None:
    hub = models_dir.parent / "hub"
    snapshot = cache(hub, "org/name")
    (hub / "models--org--name" / "refs" / "main").write_text("../../..")
    assert available(models_dir) == {}
    assert snapshot.is_dir()
    (hub / "models--org--broken").write_text("a file")
    assert available(models_dir) == {}


def test_a_repository_may_have_a_folder_for_each_quantisation(
    models_dir: Path, tiny_gguf: Path
) -> None:
    snapshot = cache(models_dir.parent / "hub", "far/many")
    (snapshot / "Q4").mkdir()
    shutil.copy(tiny_gguf, snapshot / "Q4" / "many-Q4.gguf")
    (snapshot / "1_Pooling").mkdir()
    (snapshot / "1_Pooling" / "config.json").write_text("{}")
    (model,) = available(models_dir).values()
    assert (model.id, model.complete) == ("far/many:many-Q4", True)
    found = modelfiles.find(model.id, models_dir, models_dir.parent / "hub")
    assert found == Path(model.path)


def test_where_the_hubs_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/x")
    assert hub_cache_dir() == Path("/home/x/.cache/huggingface/hub")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert hub_cache_dir() == Path("/c/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/hf")
    assert hub_cache_dir() == Path("/hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/hub")
    assert hub_cache_dir() == Path("/hub")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read(models_dir: Path) -> None:
    models_dir.chmod(0)
    try:
        assert available(models_dir) == {}
    finally:
        models_dir.chmod(0o700)

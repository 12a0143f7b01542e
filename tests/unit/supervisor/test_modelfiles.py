"""Finding models on disk, and what the gate learns of them."""

import json
from pathlib import Path

import pytest

from protocol.errors import CodedError, ErrorCode
from supervisor.modelfiles import default_id, find, inspect


def code_of(path: Path) -> ErrorCode:
    with pytest.raises(CodedError) as refusal:
        inspect(path)
    return refusal.value.code


def test_ids_of_local_paths() -> None:
    assert default_id(Path("/m/SmolLM2-135M.Q4_1.gguf")) == "SmolLM2-135M.Q4_1"
    assert default_id(Path("/m/Qwen3-4bit")) == "Qwen3-4bit"
    assert default_id(Path("/m/echo.sim.json")) == "echo"


@pytest.mark.parametrize(
    ("model_id", "place"),
    [
        ("plain", "plain.gguf"),
        ("org/name", "org/name"),
        ("org/name:file-stem", "org/name/file-stem.gguf"),
        ("echo", "echo.sim.json"),
        ("dotted.v1", "dotted.v1.gguf"),
        ("named.gguf", "named.gguf"),
    ],
)
def test_ids_are_found_in_the_models_folder(tmp_path: Path, model_id: str, place: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert find(model_id, tmp_path) == path


@pytest.mark.parametrize(
    "model_id",
    ["nothing", "../outside", "a/../../outside", "", "org/x:", ".", "./here", "here/", "x" * 300],
)
def test_other_ids_are_not_found(tmp_path: Path, model_id: str) -> None:
    (tmp_path / "outside.gguf").touch()
    models_dir = tmp_path / "models"
    models_dir.mkdir()
    (models_dir / "here.gguf").touch()
    with pytest.raises(CodedError) as refusal:
        find(model_id, models_dir)
    assert refusal.value.code is ErrorCode.MODEL_NOT_FOUND


def test_a_gguf(tiny_gguf: Path) -> None:
    files = inspect(tiny_gguf)
    assert (files.format, files.architecture) == ("gguf", "llama")
    assert files.size_bytes == tiny_gguf.stat().st_size


def test_an_mlx_folder(tiny_mlx: Path) -> None:
    files = inspect(tiny_mlx)
    assert (files.format, files.architecture, files.quantization) == ("mlx", "llama", "")


def test_the_digest_changes_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3_000_000))
    before = inspect(tmp_path).digest
    assert inspect(tmp_path).digest == before
    weights.write_bytes(bytes(2_999_999) + b"x")
    assert inspect(tmp_path).digest != before


def test_a_quantised_folder_says_so(tmp_path: Path) -> None:
    config = {"model_type": "qwen3", "quantization": {"bits": 4, "group_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inspect(tmp_path).quantization == "4bit"


def test_bad_paths(tmp_path: Path) -> None:
    assert code_of(tmp_path / "missing") is ErrorCode.MODEL_NOT_FOUND
    assert code_of(tmp_path) is ErrorCode.MODEL_INCOMPLETE
    for content in ("{", "[]", "", '{"model_type": 3}'):
        (tmp_path / "config.json").write_text(content)
        assert code_of(tmp_path) is ErrorCode.MODEL_INCOMPLETE

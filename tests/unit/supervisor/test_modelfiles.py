"""Finding models on disk, and what the gate learns of them."""

import shutil
from pathlib import Path

import pytest

from protocol.errors import CodedError, ErrorCode
from supervisor.modelfiles import default_id, find, inspect
from tests.support.tiny_gguf import write_tiny_gguf


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
    [
        "nothing",
        "x:/etc/passwd",
        "here:",
        "x:..",
        "x:a/b",
        ":here",
        "../outside",
        "a/../../outside",
        "",
        "org/x:",
        ".",
        "./here",
        "here/",
        "x" * 300,
    ],
)
def test_other_ids_are_not_found(tmp_path: Path, model_id: str) -> None:
    (tmp_path / "outside.gguf").touch()
    models_dir = tmp_path / "models"
    models_dir.mkdir()
    (models_dir / "here.gguf").touch()
    with pytest.raises(CodedError) as refusal:
        find(model_id, models_dir)
    assert refusal.value.code is ErrorCode.MODEL_NOT_FOUND


def test_a_split_model_is_found_by_its_first_part(tmp_path: Path) -> None:
    first = write_tiny_gguf(tmp_path / "tiny.gguf", tensors_per_part=16)
    assert default_id(first) == "tiny"
    assert find("tiny", tmp_path) == first
    files = inspect(first)
    assert files.path == first
    assert files.count > 1
    assert files.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_the_hubs_cache_comes_after_the_models_folder(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (snapshot / "q4.gguf").touch()
    models_dir = tmp_path / "models"
    assert find("org/name", models_dir, tmp_path / "hub") == snapshot
    assert find("org/name:q4", models_dir, tmp_path / "hub") == snapshot / "q4.gguf"
    for missing in ("org/name:q8", "org/other", "org--name", "org/name:../q4", "x:/q4"):
        with pytest.raises(CodedError):
            find(missing, models_dir, tmp_path / "hub")
    (models_dir / "org" / "name").mkdir(parents=True)
    assert find("org/name", models_dir, tmp_path / "hub") == models_dir / "org" / "name"


def test_a_gguf(tiny_gguf: Path) -> None:
    files = inspect(tiny_gguf)
    assert (files.format, files.traits.architecture) == ("gguf", "llama")
    assert files.size_bytes == tiny_gguf.stat().st_size


def test_an_mlx_folder(tiny_mlx: Path) -> None:
    files = inspect(tiny_mlx)
    assert (files.format, files.traits.architecture) == ("mlx", "llama")


def test_the_digest_changes_with_the_files(tiny_mlx: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_mlx, folder)
    before = inspect(folder)
    assert inspect(folder) == before
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = inspect(folder)
    assert after.digest != before.digest
    assert after.vocabulary == before.vocabulary != ""
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert inspect(folder).vocabulary != before.vocabulary


def test_bad_paths(tmp_path: Path) -> None:
    assert code_of(tmp_path / "missing") is ErrorCode.MODEL_NOT_FOUND
    assert code_of(tmp_path) is ErrorCode.MODEL_INCOMPLETE

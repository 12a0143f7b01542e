"""Checks of model directories, with files of a few bytes."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ErrorCode
from worker.backends.base import LoadRefused
from worker.backends.mlx_files import (
    check_model_directory,
    trained_context_length,
    vocab_size,
)


def write_safetensors(path: Path, data: bytes = b"\0" * 8, *, claimed: int | None = None) -> None:
    end = len(data) if claimed is None else claimed
    header = json.dumps(
        {
            "__metadata__": {"format": "mlx"},
            "w": {"dtype": "F32", "shape": [end // 4], "data_offsets": [0, end]},
        }
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_text("{}")
    write_safetensors(path / "model.safetensors")
    return path


def refusal(path: Path) -> LoadRefused:
    with pytest.raises(LoadRefused) as caught:
        check_model_directory(path)
    return caught.value


def write_index(model: Path, *shards: str) -> None:
    index = {"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def test_complete_directory_gives_its_config(model: Path) -> None:
    assert check_model_directory(model) == {"model_type": "llama"}


def test_missing_path_is_not_found(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing").code == ErrorCode.MODEL_NOT_FOUND


def test_file_is_another_format(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert refusal(tmp_path / "model.gguf").code == ErrorCode.MODEL_UNSUPPORTED_BACKEND


def test_weights_of_another_format_are_named(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused = refusal(model)
    assert refused.code == ErrorCode.MODEL_UNSUPPORTED_BACKEND
    assert "pytorch_model.bin" in refused.message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file_is_incomplete(model: Path, name: str) -> None:
    (model / name).unlink()
    assert refusal(model).code == ErrorCode.MODEL_INCOMPLETE


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_type": 3}', "\xff"])
def test_bad_config_is_incomplete(model: Path, content: str) -> None:
    (model / "config.json").write_text(content, encoding="latin-1")
    assert refusal(model).code == ErrorCode.MODEL_INCOMPLETE


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_cut_tokenizer_is_incomplete(model: Path, name: str) -> None:
    (model / name).write_text('{"model": {')
    assert refusal(model).code == ErrorCode.MODEL_INCOMPLETE


def test_missing_shards_are_named(model: Path) -> None:
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    (model / "model.safetensors").rename(model / names[0])
    write_index(model, *names)
    refused = refusal(model)
    assert refused.code == ErrorCode.MODEL_INCOMPLETE
    assert names[1] in refused.message
    assert names[2] in refused.message
    assert names[0] not in refused.message


def test_an_index_that_is_older_than_its_weights_is_no_hindrance(model: Path) -> None:
    write_index(model, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert check_model_directory(model) == {"model_type": "llama"}


def test_weights_that_the_library_does_not_look_for_are_none(model: Path) -> None:
    (model / "model.safetensors").rename(model / "consolidated.safetensors")
    refused = refusal(model)
    assert refused.code == ErrorCode.MODEL_INCOMPLETE
    assert "model*.safetensors" in refused.message


def test_all_that_is_missing_is_told_at_once(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "model.safetensors").write_bytes(b"")
    (model / "config.json").write_text("{}")
    message = refusal(model).message
    for part in ("no tokenizer", "model.safetensors: it is empty", "names no model_type"):
        assert part in message


def test_index_without_a_map_is_incomplete(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("{}")
    assert refusal(model).code == ErrorCode.MODEL_INCOMPLETE


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1])
def test_cut_weights_are_incomplete(model: Path, keep: int) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    refused = refusal(model)
    assert refused.code == ErrorCode.MODEL_INCOMPLETE
    assert "model.safetensors" in refused.message


def test_both_sizes_of_cut_weights_are_told(model: Path) -> None:
    weights = model / "model.safetensors"
    write_safetensors(weights, b"\0" * 8, claimed=800)
    size = weights.stat().st_size
    message = refusal(model).message
    assert f"{size} bytes" in message
    assert f"need {size + 792}" in message


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        struct.pack("<Q", 4) + b"[1]{",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"w": {}}',
        struct.pack("<Q", 8) + b'{"w": 1}',
    ],
)
def test_what_is_no_safetensors_file_is_incomplete(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    assert refusal(model).code == ErrorCode.MODEL_INCOMPLETE


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        # Qwen's way: the factor is not in the first number yet.
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        # Llama's way: it is.
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        ({"max_position_embeddings": 2048, "rope_scaling": {"factor": 2.0}}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, 2048),
    ],
)
def test_context_length_a_config_promises(config: dict[str, Any], expected: int | None) -> None:
    assert trained_context_length(config) == expected


def test_vocab_size_of_a_nested_config() -> None:
    assert vocab_size({"vocab_size": 5}) == 5
    assert vocab_size({"text_config": {"vocab_size": 6}}) == 6
    assert vocab_size({}) is None

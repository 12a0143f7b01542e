"""Every bad model is refused with the code that says what to do about it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ErrorCode
from protocol.messages import Load
from tests.support import bad_gguf
from tests.support.tiny_gguf import write_tiny_gguf
from worker.backends import create_backend
from worker.backends.base import LoadRefused


def refusal(name: str, path: Path, **options: Any) -> LoadRefused:
    backend = create_backend(name)
    with pytest.raises(LoadRefused) as caught:
        backend.load(Load(str(path), **options), lambda _fraction: None)
    backend.close()
    return caught.value


def test_unknown_backend() -> None:
    with pytest.raises(LoadRefused) as caught:
        create_backend("abacus")
    assert caught.value.code == ErrorCode.MODEL_UNSUPPORTED_BACKEND


# --- llama.cpp ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path, whole: bad_gguf.write_truncated(path, whole), "file bounds"),
        (lambda path, whole: bad_gguf.write_truncated(path, whole, keep=0.001), "read"),
        (lambda path, _: bad_gguf.write_truncated_header(path), "read"),
        (lambda path, _: bad_gguf.write_garbage(path), "magic"),
        (lambda path, _: bad_gguf.write_empty(path), "magic"),
        (lambda path, whole: bad_gguf.write_bad_tensor_count(path, whole), "tensors"),
        (lambda path, whole: bad_gguf.write_bad_metadata_count(path, whole), "key value pairs"),
    ],
)
def test_damaged_gguf_is_incomplete(
    write: Callable[[Path, Path], Path], reason: str, tiny_gguf: Path, tmp_path: Path
) -> None:
    refused = refusal("llama", write(tmp_path / "bad.gguf", tiny_gguf))
    assert refused.code == ErrorCode.MODEL_INCOMPLETE
    assert "bad.gguf" in refused.message
    assert reason in refused.message


def test_gguf_without_a_tensor_is_incomplete(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(tiny_gguf.read_bytes().replace(b"blk.3.ffn_up", b"blk.3.ffn_xx"))
    refused = refusal("llama", path)
    assert refused.code == ErrorCode.MODEL_INCOMPLETE
    assert "blk.3.ffn_up" in refused.message


def test_gguf_with_another_models_vocabulary_is_incomplete(tmp_path: Path) -> None:
    refused = refusal("llama", write_tiny_gguf(tmp_path / "bad.gguf", extra_embedding_rows=8))
    assert refused.code == ErrorCode.MODEL_INCOMPLETE
    assert "shape" in refused.message


def test_gguf_of_a_later_format_needs_another_backend(tiny_gguf: Path, tmp_path: Path) -> None:
    refused = refusal("llama", bad_gguf.write_future_version(tmp_path / "bad.gguf", tiny_gguf))
    assert refused.code == ErrorCode.MODEL_UNSUPPORTED_BACKEND
    assert "version 99" in refused.message


@pytest.mark.parametrize("architecture", ["nosucharch", "llada"])
def test_gguf_of_an_architecture_that_cannot_answer(architecture: str, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "bad.gguf", architecture=architecture)
    refused = refusal("llama", path)
    assert refused.code == ErrorCode.MODEL_UNSUPPORTED_ARCH
    assert architecture in refused.message


def test_gguf_of_an_encoder_without_its_tensors_is_incomplete(tmp_path: Path) -> None:
    refused = refusal("llama", write_tiny_gguf(tmp_path / "bad.gguf", architecture="bert"))
    assert refused.code == ErrorCode.MODEL_INCOMPLETE


def test_gguf_refusal_does_not_show_an_earlier_reason(tiny_gguf: Path, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "first.gguf", architecture="nosucharch")
    refusal("llama", tmp_path / "first.gguf")
    refused = refusal("llama", bad_gguf.write_truncated(tmp_path / "second.gguf", tiny_gguf))
    assert "nosucharch" not in refused.message


def test_gguf_path_must_be_a_file(tmp_path: Path) -> None:
    assert refusal("llama", tmp_path / "nothing.gguf").code == ErrorCode.MODEL_NOT_FOUND
    assert refusal("llama", tmp_path).code == ErrorCode.MODEL_UNSUPPORTED_BACKEND


def test_gguf_models_have_no_draft_model(tiny_gguf: Path) -> None:
    error = refusal("llama", tiny_gguf, draft_path=str(tiny_gguf))
    assert (error.code, error.param) == (ErrorCode.UNSUPPORTED_PARAMETER, "draft_model")


@pytest.mark.parametrize("max_sequences", [0, 257])
def test_gguf_sequences_are_bounded(tiny_gguf: Path, max_sequences: int) -> None:
    refused = refusal("llama", tiny_gguf, max_sequences=max_sequences)
    assert refused.code == ErrorCode.INVALID_VALUE
    assert refused.param == "max_sequences"


# --- mlx ----------------------------------------------------------------------


@pytest.fixture
def mlx_copy(tiny_mlx: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_mlx, tmp_path / "copy")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_mlx_path_must_be_a_directory(tiny_gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    assert refusal("mlx", tmp_path / "nothing").code == ErrorCode.MODEL_NOT_FOUND
    assert refusal("mlx", tiny_gguf).code == ErrorCode.MODEL_UNSUPPORTED_BACKEND


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_mlx_directory_without_a_file_is_incomplete(mlx_copy: Path, name: str) -> None:
    (mlx_copy / name).unlink()
    assert refusal("mlx", mlx_copy).code == ErrorCode.MODEL_INCOMPLETE


def test_mlx_missing_shard_is_named(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    from tests.support.tiny_mlx import write_tiny_mlx

    path = write_tiny_mlx(tmp_path / "sharded", shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    refused = refusal("mlx", path)
    assert refused.code == ErrorCode.MODEL_INCOMPLETE
    assert "model-00002-of-00003.safetensors" in refused.message


def test_mlx_missing_shard_without_an_index_is_incomplete(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    from tests.support.tiny_mlx import write_tiny_mlx

    path = write_tiny_mlx(tmp_path / "sharded", shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    (path / "model.safetensors.index.json").unlink()
    assert refusal("mlx", path).code == ErrorCode.MODEL_INCOMPLETE


def test_mlx_cut_weights_are_incomplete(mlx_copy: Path) -> None:
    weights = mlx_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refusal("mlx", mlx_copy).code == ErrorCode.MODEL_INCOMPLETE


def test_mlx_weights_of_another_shape_are_incomplete(mlx_copy: Path) -> None:
    edit(mlx_copy / "config.json", intermediate_size=100)
    assert refusal("mlx", mlx_copy).code == ErrorCode.MODEL_INCOMPLETE


@pytest.mark.parametrize("model_type", ["nosucharch", "cache", "../evil"])
def test_mlx_unknown_architecture(mlx_copy: Path, model_type: str) -> None:
    edit(mlx_copy / "config.json", model_type=model_type)
    refused = refusal("mlx", mlx_copy)
    assert refused.code == ErrorCode.MODEL_UNSUPPORTED_ARCH
    assert model_type in refused.message


def test_mlx_tokenizer_of_another_model_is_incomplete(mlx_copy: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(mlx_copy / "tokenizer.json"))
    rows = tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"<extra{i}>") for i in range(5)])
    tokenizer.save(str(mlx_copy / "tokenizer.json"))
    refused = refusal("mlx", mlx_copy)
    assert refused.code == ErrorCode.MODEL_INCOMPLETE
    assert str(rows) in refused.message
    assert str(rows + 4) in refused.message


def test_mlx_special_token_without_an_embedding_is_refused_in_a_prompt(mlx_copy: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    from worker.backends.base import PromptRefused

    tokenizer = Tokenizer.from_file(str(mlx_copy / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
    tokenizer.save(str(mlx_copy / "tokenizer.json"))
    backend = create_backend("mlx")
    backend.load(Load(str(mlx_copy)), lambda _fraction: None)
    assert backend.encode_text("text")
    with pytest.raises(PromptRefused, match="<image>"):
        backend.encode_text("an <image> here")
    backend.close()


def test_mlx_directory_runs_no_code_of_its_own(mlx_copy: Path, tmp_path: Path) -> None:
    (mlx_copy / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    edit(mlx_copy / "config.json", model_file="evil.py")
    refused = refusal("mlx", mlx_copy)
    assert refused.code == ErrorCode.MODEL_LOADER_CRASHED
    assert "trust_remote_code" in refused.message
    assert not (tmp_path / "pwned").exists()


def test_mlx_broken_tokenizer_names_the_librarys_reason(mlx_copy: Path) -> None:
    (mlx_copy / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    refused = refusal("mlx", mlx_copy)
    assert refused.code == ErrorCode.MODEL_LOADER_CRASHED
    assert "copy: " in refused.message

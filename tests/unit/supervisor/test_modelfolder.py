"""Model folders: what they say of their model, and all that is missing of it at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import CodedError, ErrorCode
from protocol.messages import ModelKind
from supervisor.modelfolder import read_model
from weights.folder import INDEX


def problems(path: Path) -> str:
    with pytest.raises(CodedError) as refusal:
        read_model(path)
    assert refusal.value.code is ErrorCode.MODEL_INCOMPLETE
    return refusal.value.message


@pytest.fixture
def folder(tiny_mlx: Path, tmp_path: Path) -> Path:
    """A model of two shards, whole."""
    from tests.support.tiny_mlx import write_tiny_mlx

    return write_tiny_mlx(tmp_path / "model", shards=2)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_whole_one(tiny_mlx: Path) -> None:
    traits, files = read_model(tiny_mlx)
    assert (traits.architecture, traits.quantization) == ("llama", "")
    assert traits.kind is ModelKind.GENERATE
    assert traits.context_length == 2048
    assert traits.has_chat_template
    assert 500_000 < traits.parameters < 3_000_000
    assert tiny_mlx / "config.json" in files


def test_a_quantised_one_has_as_many_parameters(tiny_mlx: Path, tmp_path: Path) -> None:
    from tests.support.tiny_mlx import write_tiny_mlx

    traits, _ = read_model(write_tiny_mlx(tmp_path / "q", quantised=True))
    assert traits.quantization == "4bit"
    assert traits.parameters == read_model(tiny_mlx)[0].parameters


def test_shards_are_one_model(folder: Path, tiny_mlx: Path) -> None:
    traits, files = read_model(folder)
    assert traits == read_model(tiny_mlx)[0]
    assert len([path for path in files if path.suffix == ".safetensors"]) == 2


def test_all_that_is_missing_is_told_at_once(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors.incomplete").touch()
    downloads = folder / ".cache" / "huggingface" / "download"
    downloads.mkdir(parents=True)
    (downloads / "abc.incomplete").touch()
    message = problems(folder)
    for part in (
        f"{first.name} is missing",
        f"{second.name}: it has",
        "truncated",
        "config.json is missing",
        "no tokenizer",
        "model.safetensors.incomplete has not been downloaded",
        "abc.incomplete",
    ):
        assert part in message


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "", ".", "a/b.safetensors", 7, ["x"]])
def test_an_index_names_files_of_the_folder_only(folder: Path, name: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    assert INDEX in problems(folder) or "is missing" in problems(folder)


def test_an_index_without_a_map(folder: Path) -> None:
    for content in ("{}", "[]", '{"weight_map": []}', "{", '{"weight_map": {}}'):
        (folder / INDEX).write_text(content)
        assert INDEX in problems(folder)


def test_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "no weights" in problems(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "", '{"model_type": 3}', "\x00"])
def test_a_config_that_is_none(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert "config.json" in problems(folder)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("LlamaForCausalLM", ModelKind.GENERATE),
        ("BertModel", ModelKind.EMBED),
        ("BertForSequenceClassification", ModelKind.RERANK),
    ],
)
def test_kinds(folder: Path, architecture: str, kind: ModelKind) -> None:
    change(folder / "config.json", architectures=[architecture])
    assert read_model(folder)[0].kind is kind


def test_odd_but_harmless_configs(folder: Path) -> None:
    change(
        folder / "config.json",
        architectures=[3],
        quantization=["x"],
        text_config={"max_position_embeddings": 77},
    )
    traits, _ = read_model(folder)
    assert (traits.kind, traits.quantization) == (ModelKind.GENERATE, "")
    assert traits.context_length == 77

"""Models in GGUF files, whole and split."""

from pathlib import Path

import pytest

from protocol.errors import CodedError, ErrorCode
from protocol.messages import ModelKind
from supervisor.gguf_model import find_first_part, is_later_part, parts_of, read_model, stem_of
from tests.support.tiny_bert import write_tiny_bert
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The first part of a model in several."""
    return write_tiny_gguf(tmp_path / "tiny.gguf", tensors_per_part=16)


def test_names() -> None:
    assert stem_of("a.gguf") == "a"
    assert stem_of("a-b-00002-of-00003.gguf") == "a-b"
    assert stem_of("a-0002-of-0003.gguf") == "a-0002-of-0003"
    assert is_later_part("a-00002-of-00003.gguf")
    assert not is_later_part("a-00001-of-00003.gguf")
    assert not is_later_part("a.gguf")
    whole = Path("/m/a-00002-of-00002.gguf")
    assert [path.name for path in parts_of(whole)] == [
        "a-00001-of-00002.gguf",
        "a-00002-of-00002.gguf",
    ]
    for name in ("a.gguf", "a-00001-of-00000.gguf", "a-00001-of-99999.gguf"):
        assert parts_of(Path(name)) == [Path(name)]


def test_traits(tiny_gguf: Path) -> None:
    traits, files = read_model(tiny_gguf)
    assert files == [tiny_gguf]
    assert (traits.architecture, traits.quantization) == ("llama", "F32")
    assert (traits.kind, traits.context_length) == (ModelKind.GENERATE, 2048)
    assert traits.has_chat_template
    assert 500_000 < traits.parameters < 3_000_000


def test_a_vocabulary_is_no_model(tiny_gguf: Path, tmp_path: Path) -> None:
    content = bytearray(tiny_gguf.read_bytes())
    content[8:16] = bytes(8)  # the number of tensors
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(content)
    with pytest.raises(CodedError, match="no tensors"):
        read_model(path)


def test_the_demo_model(demo_gguf: Path) -> None:
    traits, _ = read_model(demo_gguf)
    assert round(traits.parameters / 1e6) == 135
    assert traits.has_chat_template


def test_kinds(tmp_path: Path) -> None:
    for pooling, kind in (("mean", ModelKind.EMBED), ("rank", ModelKind.RERANK)):
        path = write_tiny_bert(tmp_path / "bert.gguf", pooling=pooling)  # type: ignore[arg-type]
        assert read_model(path)[0].kind is kind
    assert read_model(write_tiny_bert(tmp_path / "bert.gguf", pooling=None))[0].kind is (
        ModelKind.EMBED
    )
    path = write_tiny_gguf(tmp_path / "last.gguf", pooling="last")
    assert read_model(path)[0].kind is ModelKind.EMBED


def test_parts_are_one_model(first: Path, tiny_gguf: Path) -> None:
    traits, files = read_model(first)
    assert len(files) >= 3
    assert traits == read_model(tiny_gguf)[0]
    assert read_model(files[-1]) == (traits, files)
    assert find_first_part(first.parent, "tiny") == first
    assert find_first_part(first.parent, "other") is None
    assert find_first_part(first.parent / "nowhere", "tiny") is None


def test_all_that_is_missing_of_the_parts_is_told_at_once(first: Path) -> None:
    second, third, *_ = parts_of(first)[1:]
    second.unlink()
    third.write_bytes(third.read_bytes()[:-10])
    with pytest.raises(CodedError) as refusal:
        read_model(first)
    assert refusal.value.code is ErrorCode.MODEL_INCOMPLETE
    assert f"{second.name} is missing" in refusal.value.message
    assert f"{third.name} is incomplete" in refusal.value.message

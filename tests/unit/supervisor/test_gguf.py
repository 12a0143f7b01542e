"""GGUF headers: what is read from good ones, what is said of bad ones."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.errors import CodedError, ErrorCode
from supervisor.gguf import read_header
from tests.support import bad_gguf
from tests.support.tiny_gguf import write_tiny_gguf


def code_of(path: Path) -> ErrorCode:
    with pytest.raises(CodedError) as refusal:
        read_header(path)
    assert path.name in refusal.value.message
    return refusal.value.code


def test_a_good_header(tiny_gguf: Path) -> None:
    header = read_header(tiny_gguf)
    assert (header.architecture, header.quantization) == ("llama", "F32")


def test_the_demo_models_header(demo_gguf: Path) -> None:
    header = read_header(demo_gguf)
    assert (header.architecture, header.quantization) == ("llama", "Q4_1")


def test_any_architecture_is_only_a_name_here(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "odd.gguf", architecture="nosucharch")
    assert read_header(path).architecture == "nosucharch"


def test_cut_anywhere_it_is_incomplete(tiny_gguf: Path, tmp_path: Path) -> None:
    whole = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [0, 1, 3, 4, 7, 8, 20, 24, 100, 1000, len(whole) // 2, len(whole) - 40]:
        path.write_bytes(whole[:size])
        assert code_of(path) is ErrorCode.MODEL_INCOMPLETE, size


def test_garbage_is_not_a_gguf(tmp_path: Path) -> None:
    path = tmp_path / "garbage.gguf"
    bad_gguf.write_garbage(path)
    assert code_of(path) is ErrorCode.MODEL_UNSUPPORTED_BACKEND


def test_a_future_version_is_unsupported(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "future.gguf"
    content = bytearray(tiny_gguf.read_bytes())
    content[4:8] = (99).to_bytes(4, "little")
    path.write_bytes(content)
    assert code_of(path) is ErrorCode.MODEL_UNSUPPORTED_BACKEND


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_fuzzed_header_is_read_or_refused(
    data: st.DataObject, tiny_gguf: Path, tmp_path: Path
) -> None:
    content = bytearray(tiny_gguf.read_bytes()[:20_000])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, 400))
        content[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(content)
    with contextlib.suppress(CodedError):
        # Its tensors are not there, so it must claim to have none.
        assert read_header(path).parameters == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=300))
def test_any_bytes_after_the_magic_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.gguf"
    path.write_bytes(b"GGUF" + content)
    with pytest.raises(CodedError):
        read_header(path)

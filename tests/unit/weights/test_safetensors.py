"""Headers of safetensors files: what is read from good ones, what is said of bad ones."""

import contextlib
import json
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weights.safetensors import Damaged, read_header


def write(path: Path, header: object, data: int = 0) -> Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + bytes(data))
    return path


def tensor(*shape: int, end: int = 0) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}


def test_a_good_file(tmp_path: Path) -> None:
    header = {"a": tensor(2, 3, end=24), "b": tensor(end=4), "__metadata__": {"format": "mlx"}}
    found = read_header(write(tmp_path / "x", header, 24))
    assert found.elements == {"a": 6, "b": 1}
    assert found.parameters(None) == 7


def test_packed_weights_count_for_what_they_stand_for(tmp_path: Path) -> None:
    header = {
        **{"x.weight": tensor(4, 8), "x.scales": tensor(4, 2), "x.biases": tensor(4, 2)},
        "norm.weight": tensor(64),
    }
    found = read_header(write(tmp_path / "x", header))
    assert found.parameters(4) == 4 * 64 + 64
    assert found.parameters(None) == 32 + 8 + 8 + 64


def test_cut_anywhere_it_is_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"a": tensor(6, end=24)}, 24)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(Damaged):
            read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{",
        b'{"a": 1}',
        b"\xff" * 20,
        b"[" * 100_000,
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [9] * 1000, "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": tensor(1, end=2**70)},
    ],
)
def test_nonsense_is_damaged(tmp_path: Path, header: object) -> None:
    with pytest.raises(Damaged):
        read_header(write(tmp_path / "x", header))


def test_a_giant_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", 2**62))
    with pytest.raises(Damaged, match="no safetensors file"):
        read_header(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_any_bytes_are_read_or_damaged(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    with contextlib.suppress(Damaged):
        assert read_header(path).parameters(4) >= 0

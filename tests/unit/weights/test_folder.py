"""Model folders: which weights they should have, and what is said of those that are not there."""

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weights.folder import INDEX, Folder

HEADER = b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
WHOLE = struct.pack("<Q", len(HEADER)) + HEADER + bytes(8)


def write_index(path: Path, *shards: object) -> None:
    weight_map = {f"w{number}": shard for number, shard in enumerate(shards)}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_every_shard_that_the_index_names_is_read_once(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "left.safetensors"):
        (tmp_path / name).write_bytes(WHOLE)
    write_index(tmp_path, "a.safetensors", "b.safetensors", "a.safetensors")
    folder = Folder(tmp_path)
    assert [header.elements for header in folder.read_weights()] == [{"w": 2}] * 2
    assert folder.problems == []


def test_without_an_index_all_that_is_there_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(WHOLE)
    (tmp_path / "b.safetensors").write_bytes(WHOLE[:-1])
    folder = Folder(tmp_path)
    assert len(folder.read_weights()) == 1
    (problem,) = folder.problems
    assert problem.startswith("b.safetensors: it has")


def test_missing_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(WHOLE)
    write_index(tmp_path, "a.safetensors", "b.safetensors")
    folder = Folder(tmp_path)
    assert len(folder.read_weights()) == 1
    assert folder.problems == ["b.safetensors is missing"]


def test_an_index_that_names_nothing_of_what_is_there_is_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(WHOLE)
    write_index(tmp_path, "b.safetensors")
    folder = Folder(tmp_path)
    assert len(folder.read_weights()) == 1
    assert folder.problems == []


@pytest.mark.parametrize(
    "shards", [("../a",), ("/a",), ("",), (7,), [f"{number}.safetensors" for number in range(1001)]]
)
def test_an_index_that_cannot_be_one(tmp_path: Path, shards: tuple[object, ...]) -> None:
    write_index(tmp_path, *shards)
    folder = Folder(tmp_path)
    assert folder.read_weights() == []
    (problem,) = folder.problems
    assert problem.startswith(INDEX)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(st.binary(max_size=64), st.text(max_size=64).map(json.dumps).map(str.encode))
)
def test_whatever_an_index_holds_it_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX).write_bytes(content)
    folder = Folder(tmp_path)
    assert folder.read_weights() == []
    assert folder.problems


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    folder = Folder(tmp_path)
    assert folder.read_json("config.json") == {}
    assert folder.problems == ["config.json is missing"]


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "qwen.tiktoken"])
def test_any_tokenizer_will_do(tmp_path: Path, name: str) -> None:
    folder = Folder(tmp_path)
    folder.check_tokenizer()
    assert len(folder.problems) == 1
    (tmp_path / name).touch()
    folder.check_tokenizer()
    assert len(folder.problems) == 1

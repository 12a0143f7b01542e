"""State files: atomic, set aside when unreadable, written off the loop."""

import errno
import os
from pathlib import Path

import msgspec
import pytest

from supervisor import jsonfile


class Notes(msgspec.Struct):
    schema_version: int = 1
    notes: list[str] = []


def read(path: Path) -> Notes | None:
    return jsonfile.read(path, Notes, schema_version=1)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "notes.json"
    jsonfile.write(path, Notes(notes=["one"]))
    assert read(path) == Notes(notes=["one"])
    assert [p.name for p in path.parent.iterdir()] == ["notes.json"]


def test_an_absent_file_is_no_file(tmp_path: Path) -> None:
    assert read(tmp_path / "notes.json") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\x00" * 100,
        b"\xff\xfe",
        b"[]",
        b'{"notes": []}',
        b'{"schema_version": 1, "notes": 3}',
        b'{"schema_version": 2, "notes": []}',
    ],
)
def test_an_unreadable_file_is_set_aside_whole(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.json"
    path.write_bytes(content)
    assert read(path) is None
    (aside,) = tmp_path.iterdir()
    assert aside.name.startswith("notes.json.unreadable-")
    assert aside.read_bytes() == content


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notes.json"
    jsonfile.write(path, Notes(notes=["old"]))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        jsonfile.write(path, Notes(notes=["new"]))
    assert read(path) == Notes(notes=["old"])
    assert [p.name for p in tmp_path.iterdir()] == ["notes.json"]


async def test_the_writer_keeps_the_latest(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    writer = jsonfile.BackgroundWriter(path)
    for number in range(20):
        writer.save(Notes(notes=[str(number)]))
    await writer.flush()
    assert read(path) == Notes(notes=["19"])


async def test_a_failed_write_is_logged_and_the_next_one_tried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "folder" / "notes.json"
    path.parent.write_text("a file where the folder should be")
    writer = jsonfile.BackgroundWriter(path)
    writer.save(Notes())
    await writer.flush()
    assert "cannot write" in caplog.text
    path.parent.unlink()
    writer.save(Notes(notes=["later"]))
    await writer.flush()
    assert read(path) == Notes(notes=["later"])

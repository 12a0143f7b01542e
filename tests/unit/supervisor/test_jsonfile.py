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


def full_disk(handle: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


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
        b'{"schema_version": 1, "x": ' + b"[" * 100_000,
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

    monkeypatch.setattr(os, "fsync", full_disk)
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


async def test_a_flush_tries_again_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notes.json"
    writer = jsonfile.BackgroundWriter(path)
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full_disk)
        writer.save(Notes(notes=["last words"]))
        await writer.flush()
    assert read(path) is None
    await writer.flush()
    assert read(path) == Notes(notes=["last words"])


async def test_content_that_cannot_be_encoded_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "notes.json"
    writer = jsonfile.BackgroundWriter(path)
    writer.save(Notes(notes=["\udcff"]))
    await writer.flush()
    assert "cannot write" in caplog.text
    writer.save(Notes(notes=["whole"]))
    await writer.flush()
    assert read(path) == Notes(notes=["whole"])


async def test_what_could_not_be_read_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be a good file, behind a disk in trouble that refuses renames as well."""
    path = tmp_path / "notes.json"
    jsonfile.write(path, Notes(notes=["good"]))
    good = path.read_bytes()

    def trouble(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as disk:
        disk.setattr(Path, "read_bytes", trouble)
        disk.setattr(Path, "rename", trouble)
        content, writer = jsonfile.open_state(path, Notes, schema_version=1)
        assert content is None
        assert "cannot be set aside" in caplog.text
        writer.save(Notes(notes=["new"]))
        await writer.flush()
        assert "cannot write" in caplog.text
    assert path.read_bytes() == good
    # Once it can be renamed, there is a place for what is new.
    writer.save(Notes(notes=["newer"]))
    await writer.flush()
    assert read(path) == Notes(notes=["newer"])
    (aside,) = tmp_path.glob("*.unreadable-*")
    assert aside.read_bytes() == good


# --- state files of a later version ---

LATER = b'{"schema_version": 2, "notes": {"of": "another kind"}}'


async def test_a_later_versions_file_is_left_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "notes.json"
    path.write_bytes(LATER)
    content, writer = jsonfile.open_state(path, Notes, schema_version=1)
    assert content is None
    assert "schema version 2" in caplog.text
    writer.save(Notes(notes=["ours"]))
    await writer.flush()
    assert path.read_bytes() == LATER
    content, _ = jsonfile.open_state(path, Notes, schema_version=1)
    assert content == Notes(notes=["ours"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.json", "notes.v1.json"]


async def test_without_it_the_file_has_its_name_again(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    (tmp_path / "notes.v1.json").write_text('{"schema_version": 1, "notes": ["aside"]}')
    jsonfile.write(path, Notes(notes=["ours"]))
    content, writer = jsonfile.open_state(path, Notes, schema_version=1)
    assert content == Notes(notes=["ours"])
    writer.save(Notes(notes=["new"]))
    await writer.flush()
    assert read(path) == Notes(notes=["new"])


def test_only_what_is_ours_is_swept(tmp_path: Path) -> None:
    names = [".notes.json.abc123", ".notes.v1.json.abc123", ".notes", "notes.json.bak"]
    for name in names:
        (tmp_path / name).write_text("half")
    jsonfile.open_state(tmp_path / "notes.json", Notes, schema_version=1)
    assert {p.name for p in tmp_path.iterdir()} == set(names[1:])


def test_a_folder_that_cannot_be_read_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    content, _ = jsonfile.open_state(tmp_path / "home" / "notes.json", Notes, schema_version=1)
    assert content is None

"""Deleting models, from the hub's cache and from the models folder; and what is known there."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.errors import CodedError
from supervisor import modelfiles
from supervisor.downloads import local, removal
from supervisor.downloads.cache import RepoFolder, free_bytes
from supervisor.downloads.messages import Plan, PlannedFile
from supervisor.downloads.selection import wanted


class Places:
    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.models = folder / "models"
        self.models.mkdir()

    def put(self, repo: str, *names: str, revision: str = "r1") -> RepoFolder:
        folder = RepoFolder(self.cache, repo)
        planned = [
            PlannedFile(name, 10, f"of-{name.replace('/', '-')}", lfs=True) for name in names
        ]
        for file in planned:
            folder.blob(file.etag).parent.mkdir(parents=True, exist_ok=True)
            folder.blob(file.etag).write_bytes(b"0123456789")
        folder.publish(Plan(model_id=repo, repo=repo, revision=revision, files=planned))
        return folder

    def remove(self, model_id: str, **used: str) -> tuple[str, int]:
        paths = {Path(path): name for name, path in used.items()}
        return removal.remove(model_id, self.models, self.cache, paths)

    def has(self, model_id: str) -> bool:
        try:
            modelfiles.find(model_id, self.models, self.cache)
        except CodedError:
            return False
        return True


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path)


def code_of(places: Places, model_id: str, **used: str) -> str:
    with pytest.raises(CodedError) as caught:
        places.remove(model_id, **used)
    return caught.value.code


def test_one_quantisation_goes_and_the_other_stays(places: Places) -> None:
    folder = places.put("org/m", "m-Q4_0.gguf", "m-Q8_0.gguf")
    folder.incomplete("begun").write_bytes(b"123")
    assert places.remove("org/m:m-Q4_0")[0] == "org/m:m-Q4_0"
    assert not places.has("org/m:m-Q4_0")
    assert places.has("org/m:m-Q8_0")
    assert [blob.name for blob in (folder.path / "blobs").iterdir()] == ["of-m-Q8_0.gguf"]


def test_with_the_last_model_its_repository_goes(places: Places) -> None:
    folder = places.put("org/m", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    folder.lock("x").touch()
    # By the name that it was asked for.
    full_id, freed = places.remove("org/m")
    assert full_id == "org/m:m"
    assert freed >= 20
    assert not folder.path.exists()
    assert not list((places.cache / ".locks").iterdir())


def test_a_folder_goes_in_every_revision_and_its_ggufs_stay(places: Places) -> None:
    names = ("config.json", "model.safetensors")
    folder = places.put("org/m", *names, revision="r1")
    places.put("org/m", *names, "m.gguf", revision="r2")
    assert places.remove("org/m")[0] == "org/m"
    assert places.has("org/m:m")
    assert [blob.name for blob in (folder.path / "blobs").iterdir()] == ["of-m.gguf"]


def test_what_has_only_begun_to_come_can_be_deleted(places: Places) -> None:
    folder = RepoFolder(places.cache, "org/m")
    folder.incomplete("x").parent.mkdir(parents=True)
    folder.incomplete("x").write_bytes(b"12345")
    assert places.remove("org/m:m") == ("org/m:m", 5)
    assert not folder.path.exists()


def test_models_of_the_models_folder(places: Places) -> None:
    (places.models / "a.gguf").write_bytes(b"123")
    folder = places.models / "org" / "f"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "f-Q8_0.gguf").write_bytes(b"1234")
    assert places.remove("a") == ("a", 3)
    assert places.remove("org/f") == ("org/f", 2)
    assert places.remove("org/f:f-Q8_0") == ("org/f:f-Q8_0", 4)
    assert places.models.is_dir()
    assert not list(places.models.iterdir())


def test_of_a_link_only_the_link_goes(places: Places, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_bytes(b"{}")
    (places.models / "m").symlink_to(mine)
    places.remove("m")
    assert (mine / "config.json").exists()
    assert not places.has("m")


def test_what_is_not_deleted(places: Places, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere.gguf"
    path.touch()
    assert code_of(places, str(path)) == "invalid_value"
    assert path.exists()
    assert code_of(places, "org/m") == "model_not_found"
    assert code_of(places, "nobody") == "model_not_found"
    assert code_of(places, "../models") == "model_not_found"
    (places.models / "a.gguf").touch()
    used = str(places.models / "a.gguf")
    assert code_of(places, "a", other=used) == "model_conflict"
    assert places.has("a")


@pytest.mark.parametrize(
    ("names", "ask", "known"),
    [
        (("m-Q8_0.gguf",), "org/m", "org/m:m-Q8_0"),
        (("m-Q8_0.gguf",), "org/m:q8_0", "org/m:m-Q8_0"),
        (("m-Q8_0.gguf",), "org/m:m-Q8_0", None),
        (
            ("Q8/m-Q8_0-00001-of-00002.gguf", "Q8/m-Q8_0-00002-of-00002.gguf"),
            "org/m",
            "org/m:m-Q8_0",
        ),
        (("a-Q8_0.gguf", "b-Q8_0.gguf"), "org/m:Q8_0", None),
        (("m-Q8_0.gguf", "model.safetensors"), "org/m", None),
        ((), "org/m", None),
    ],
)
def test_a_model_is_known_by_its_short_names(
    places: Places, names: tuple[str, ...], ask: str, known: str | None
) -> None:
    if names:
        places.put("org/m", *names)
    parts = wanted(ask)
    assert parts is not None
    assert local.known_as(places.cache, parts) == known
    if known is not None:
        assert places.has(known)


def test_free_space_is_that_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") > 0


def test_a_cache_without_links_gets_the_content(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: str) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    places.put("org/m", "m.gguf")
    found = modelfiles.find("org/m:m", places.models, places.cache)
    assert (found.is_symlink(), found.read_bytes()) == (False, b"0123456789")

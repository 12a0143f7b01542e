"""The hub's cache on disk, in huggingface_hub's own layout, which other tools share.

``models--org--name/`` has ``blobs/ETAG`` (content), ``snapshots/REVISION/NAME`` (links to it)
and ``refs/main`` (the revision). ``blobs/ETAG.incomplete`` is content that has begun to come.
Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from supervisor import modelfiles
from supervisor.downloads.messages import Plan, PlannedFile

_INCOMPLETE = ".incomplete"


class RepoFolder:
    """One repository's part of a cache. Methods raise ``OSError``."""

    def __init__(self, cache: Path, repo: str) -> None:
        self.path = cache / modelfiles.cached_name(repo)
        self._locks = cache / ".locks" / self.path.name

    def blob(self, etag: str) -> Path:
        return self.path / "blobs" / etag

    def incomplete(self, etag: str) -> Path:
        return self.path / "blobs" / f"{etag}{_INCOMPLETE}"

    def lock(self, etag: str) -> Path:
        """Where huggingface_hub has the lock of a blob; its folder is there afterwards."""
        self._locks.mkdir(parents=True, exist_ok=True)
        return self._locks / f"{etag}.lock"

    def on_disk(self, file: PlannedFile) -> int:
        """Bytes of the file that are there, whole or begun."""
        if _size(self.blob(file.etag)) == file.size:
            return file.size
        begun = _size(self.incomplete(file.etag)) or 0
        return begun if begun <= file.size else 0

    def is_whole(self, file: PlannedFile) -> bool:
        return _size(self.blob(file.etag)) == file.size

    def publish(self, plan: Plan) -> None:
        """Make the plan's files the ones that ``main`` is: its blobs are there and verified."""
        snapshot = self.path / "snapshots" / plan.revision
        for file in (*filter(self.is_whole, plan.linked), *plan.files):
            self._link(snapshot, file)
        refs = self.path / "refs"
        refs.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a reader never finds half a revision.
        new = refs / f".main.{os.getpid()}"
        new.write_text(plan.revision)
        new.replace(refs / "main")

    def _link(self, snapshot: Path, file: PlannedFile) -> None:
        link = snapshot / file.name
        if _size(link) == file.size and (not link.is_symlink() or self._is_link_to(link, file)):
            return
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        blob = self.blob(file.etag)
        try:
            link.symlink_to(os.path.relpath(blob, link.parent))
        except OSError:
            # A file system without links: the content itself, as huggingface_hub does.
            shutil.copyfile(blob, link)

    def _is_link_to(self, link: Path, file: PlannedFile) -> bool:
        return link.resolve() == self.blob(file.etag).resolve()

    def delete(self, belongs: Callable[[str], bool]) -> tuple[int, bool]:
        """Delete the files whose names ``belongs`` takes, of every revision: the bytes freed,
        and whether there was anything.

        Content that other files are linked to stays; what has begun to come goes. Without
        any file left the repository's folder goes, too.
        """
        before = _bytes_below(self.path)
        links = [link for link in self._links() if belongs(link.name)]
        for link in links:
            link.unlink()
        used = {link.resolve() for link in self._links()}
        for blob in _files(self.path / "blobs"):
            if blob.resolve() not in used:
                blob.unlink(missing_ok=True)
        if not used:
            shutil.rmtree(self.path)
            shutil.rmtree(self._locks, ignore_errors=True)
        freed = before - _bytes_below(self.path)
        return freed, bool(links) or freed > 0

    def _links(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self.path / "snapshots"):
            yield from (Path(folder, name) for name in names)


def free_bytes(path: Path) -> int:
    """What the file system that ``path`` is on, or will be on, still takes."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _files(folder: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):
        return [path for path in folder.iterdir() if path.is_file()]
    return []


def _bytes_below(folder: Path) -> int:
    """Of contents, not of links to them."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total

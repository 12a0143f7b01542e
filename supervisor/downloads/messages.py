"""What an engine is told, and what it tells: a job on stdin, then JSON lines on stdout."""

from __future__ import annotations

import msgspec

from protocol.errors import ErrorCode


class PlannedFile(msgspec.Struct, frozen=True):
    """A file of a repository. ``etag`` is what the hub's cache calls its content: the SHA-256
    of a large file (``lfs``), the git blob id of a small one. ``on_disk``: bytes of it that
    were there when it was planned."""

    name: str
    size: int
    etag: str
    lfs: bool
    on_disk: int = 0


class Plan(msgspec.Struct, frozen=True, kw_only=True, tag="plan"):
    """What has to be fetched for a model, and what is there: ``model_id`` is its full id.

    ``linked``: files of the revision that are whole in the cache and belong to other models
    of the repository, which stay visible beside the new one.
    """

    model_id: str
    repo: str
    revision: str
    files: list[PlannedFile]
    linked: list[PlannedFile] = []

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def missing_bytes(self) -> int:
        return sum(file.size - file.on_disk for file in self.files)


class PlanJob(msgspec.Struct, frozen=True, kw_only=True, tag="plan"):
    """Ask the hub what ``model_id`` is. ``formats``: those that can be run here, best first."""

    model_id: str
    cache: str
    formats: list[str]


class FetchJob(msgspec.Struct, frozen=True, kw_only=True, tag="fetch"):
    """Fetch what a plan says, as it was consented to."""

    plan: Plan
    cache: str
    stall_s: float


Job = PlanJob | FetchJob


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """So many bytes of the plan's file number ``index`` are on disk now."""

    index: int
    bytes: int
    verifying: bool = False


class Note(msgspec.Struct, frozen=True, tag="note"):
    """What goes wrong and is tried again."""

    text: str


class Fetched(msgspec.Struct, frozen=True, tag="fetched"):
    """Everything is there, and is what the hub says it is."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    code: ErrorCode
    message: str


Report = Plan | Progress | Note | Fetched | Failed

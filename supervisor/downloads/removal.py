"""Deletes a model's files, from the models folder or from the hub's cache. Blocks: disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from protocol.errors import CodedError, ErrorCode
from supervisor import gguf_model, modelfiles
from supervisor.downloads import local, selection
from supervisor.downloads.cache import RepoFolder


def remove(
    model_id: str, models_dir: Path, cache: Path, used: Mapping[Path, str]
) -> tuple[str, int]:
    """Delete what the id stands for: its full id, and the bytes freed.

    Only what is below these two folders. ``used``: the paths of models that run, and their
    ids. Raises ``model_not_found``, ``invalid_value`` for a path, ``model_conflict`` for what
    is used, and ``internal_error`` with the reason when the disk refuses.
    """
    if Path(model_id).is_absolute():
        raise CodedError(
            ErrorCode.INVALID_VALUE,
            "only models of the models folder and of the hub's cache are deleted, by their ids",
            param="id",
        )
    ask = selection.wanted(model_id)
    if ask is not None and (known_as := local.known_as(cache, ask)) is not None:
        model_id, ask = known_as, selection.wanted(known_as)
    try:
        path = modelfiles.find(model_id, models_dir, cache)
    except CodedError:
        path = None
    if path is not None and path in used:
        raise CodedError(
            ErrorCode.MODEL_CONFLICT,
            f"its files are those of {used[path]!r}, which runs",
            param="id",
        )
    try:
        if path is not None and models_dir in path.parents:
            return model_id, _remove_below(path, models_dir)
        if ask is not None and (folder := RepoFolder(cache, ask.repo)).path.is_dir():
            freed, found = folder.delete(_belongs(ask.stem))
            if found:
                return model_id, freed
    except OSError as error:
        raise CodedError(
            ErrorCode.INTERNAL_ERROR, f"{model_id} cannot be deleted: {error.strerror or error}"
        ) from error
    raise CodedError(ErrorCode.MODEL_NOT_FOUND, f"no model {model_id!r} here", param="id")


def _belongs(stem: str | None) -> Callable[[str], bool]:
    """By name: whether a file is one of the model with this stem, or of the folder's."""
    if stem is None:
        return lambda name: not name.endswith(".gguf")
    return lambda name: name.endswith(".gguf") and gguf_model.stem_of(name) == stem


def _remove_below(path: Path, models_dir: Path) -> int:
    freed = 0
    if path.is_dir() and not path.is_symlink():
        kept = [each for each in path.iterdir() if each.name.endswith(".gguf")]
        if not kept:
            freed = sum(
                Path(folder, name).lstat().st_size
                for folder, _, names in os.walk(path)
                for name in names
            )
            shutil.rmtree(path)
            files: list[Path] = []
        else:
            files = [each for each in path.iterdir() if each.is_file() and each not in kept]
    else:
        files = [part for part in gguf_model.parts_of(path) if os.path.lexists(part)]
    for file in files:
        freed += file.lstat().st_size
        file.unlink()
    # The organisation's folder, when this was all that it had.
    parent = path.parent
    while parent != models_dir and models_dir in parent.parents and not any(parent.iterdir()):
        parent.rmdir()
        parent = parent.parent
    return freed

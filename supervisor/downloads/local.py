"""What the cache has of a repository. Blocks: disk."""

from __future__ import annotations

from pathlib import Path

from supervisor import gguf_model, modelfiles
from supervisor.downloads.selection import Wanted, match_stem


def known_as(cache: Path, ask: Wanted) -> str | None:
    """The id of the GGUF model that is meant, where there is one in the cache and it has another.

    Asked for without a stem: the only one of a repository that has nothing else. With one: by
    its quantisation.
    """
    snapshot = modelfiles.cached_snapshot(cache, ask.repo)
    if snapshot is None:
        return None
    files = [
        path
        for folder in modelfiles.gguf_folders(snapshot)
        for path in folder.glob("*.gguf")
        if not gguf_model.is_later_part(path.name)
    ]
    stems = sorted({gguf_model.stem_of(path.name) for path in files})
    if ask.stem is not None:
        stems = match_stem(ask.stem, stems)
    elif any(snapshot.glob("*.safetensors*")):
        return None
    if len(stems) != 1 or stems[0] == ask.stem:
        return None
    return f"{ask.repo}:{stems[0]}"

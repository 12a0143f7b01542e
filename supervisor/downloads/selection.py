"""Which files of a repository make the model that was asked for.

Pure. A repository of the hub may hold a model in its own format (safetensors), the same in
other formats that nobody here reads, and any number of quantisations as GGUF files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

from protocol.errors import CodedError, ErrorCode
from supervisor import gguf_model, modelfolder

#: Of one file, or the first of several, in the message that lists what there is.
_LISTED = 30

#: Beside a language model's weights: projectors of images, and statistics for quantising.
_NO_MODEL = re.compile(r"(^|[-_.])(mmproj|imatrix)", re.IGNORECASE)
#: The same weights once more, as their maker's own programs read them.
_OTHER_WEIGHTS = re.compile(r"consolidated|adapter_|training_args")


class RepoFile(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...


#: What loading a model reads, beside its weights.
_BESIDE_WEIGHTS = tuple(modelfolder.SUFFIXES - {".safetensors"})

F = TypeVar("F", bound=RepoFile)


class Wanted(NamedTuple):
    """An id of the hub in its parts; ``stem`` names one of several GGUF models."""

    repo: str
    stem: str | None


_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(:(?P<stem>[^/:]{1,200}))?",
    re.ASCII,
)


def wanted(model_id: str) -> Wanted | None:
    """What an id asks the hub for; None when it cannot be one of the hub's."""
    found = _HUB_ID.fullmatch(model_id)
    if found is None or ".." in found["repo"] or "--" in found["repo"]:
        return None
    if found["repo"].endswith((".git", ".", "-")):
        return None
    stem = found["stem"]
    return Wanted(found["repo"], None if stem is None else stem.removesuffix(".gguf"))


def select(ask: Wanted, files: Sequence[F], formats: Sequence[str]) -> tuple[str, list[F]]:
    """The full id and the files of the model. ``formats``: what can be run here, best first.

    Raises ``model_not_found`` for a stem that is not there, ``invalid_value`` with the stems
    to choose from, ``model_unsupported_backend`` and ``model_incomplete``.
    """
    ggufs = _ggufs(files)
    if ask.stem is not None:
        stem = _match(ask, ggufs)
        _need("gguf", formats, ask.repo)
        return f"{ask.repo}:{stem}", _whole(stem, ggufs[stem])
    folder = _folder(files)
    there = {"mlx": folder, "gguf": ggufs}
    usable = [name for name in formats if there.get(name)]
    if not usable:
        found = [name for name, some in there.items() if some]
        if not found:
            raise CodedError(
                ErrorCode.MODEL_UNSUPPORTED_BACKEND,
                f"{ask.repo} has neither safetensors nor GGUF files: nothing here can run it",
                param="model_id",
            )
        _need(found[0], formats, ask.repo)
    if usable[0] == "mlx":
        return ask.repo, folder
    if len(ggufs) > 1:
        raise _choose(ask.repo, ggufs, f"{ask.repo} has {len(ggufs)} GGUF models")
    (stem,) = ggufs
    return f"{ask.repo}:{stem}", _whole(stem, ggufs[stem])


def match_stem(stem: str, stems: Sequence[str]) -> list[str]:
    """The stems that one may stand for: itself, or all that end in that quantisation."""
    for same in (
        lambda each: each == stem,
        lambda each: each.lower() == stem.lower(),
        lambda each: re.search(rf"[-._]{re.escape(stem)}$", each, re.IGNORECASE) is not None,
    ):
        if found := [each for each in stems if same(each)]:
            return found
    return []


def _ggufs(files: Sequence[F]) -> dict[str, list[F]]:
    """GGUF models by stem. Of two folders with the same one, the first counts."""
    found: dict[str, dict[str, list[F]]] = {}
    for file in sorted(files, key=lambda file: (file.name.count("/"), file.name)):
        folder, _, name = file.name.rpartition("/")
        if name.endswith(".gguf") and not _NO_MODEL.search(name) and _depth(file) <= 1:
            found.setdefault(gguf_model.stem_of(name), {}).setdefault(folder, []).append(file)
    return {stem: next(iter(folders.values())) for stem, folders in found.items()}


def _folder(files: Sequence[F]) -> list[F]:
    """What a model in safetensors is loaded from; nothing where there are none."""
    top = [file for file in files if _depth(file) == 0]
    weights = [file for file in top if file.name.endswith(".safetensors")]
    own = [file for file in weights if not _OTHER_WEIGHTS.match(file.name)] or weights
    if not own:
        return []
    return own + [
        file
        for file in top
        if file.name.endswith(_BESIDE_WEIGHTS)
        and not file.name.startswith(".")
        and not _OTHER_WEIGHTS.match(file.name)
    ]


def _match(ask: Wanted, ggufs: dict[str, list[F]]) -> str:
    assert ask.stem is not None
    found = match_stem(ask.stem, list(ggufs))
    if not found:
        there = f"; there are: {_list(ggufs)}" if ggufs else ": it has no GGUF files"
        raise CodedError(
            ErrorCode.MODEL_NOT_FOUND, f"{ask.repo} has no {ask.stem!r}{there}", param="model_id"
        )
    if len(found) > 1:
        raise _choose(
            ask.repo,
            {stem: ggufs[stem] for stem in found},
            f"{ask.stem!r} may be one of {len(found)} GGUF models of {ask.repo}",
        )
    return found[0]


def _whole(stem: str, parts: list[F]) -> list[F]:
    names = {_base(part): part for part in parts}
    needed = gguf_model.names_of_parts(next(iter(names)))
    if missing := [name for name in needed if name not in names]:
        raise CodedError(
            ErrorCode.MODEL_INCOMPLETE,
            f"{stem} is not whole on the hub: {', '.join(missing[:3])} missing there",
        )
    return [names[name] for name in needed]


def _need(model_format: str, formats: Sequence[str], repo: str) -> None:
    if model_format not in formats:
        backend, files = {"gguf": ("llama", "GGUF"), "mlx": ("mlx", "safetensors")}[model_format]
        raise CodedError(
            ErrorCode.MODEL_UNSUPPORTED_BACKEND,
            f"{repo} has {files} files, which need backend {backend!r}: it is not asked for, or "
            f"not installed (pip install 'opta-lmx[{backend}]')",
        )


def _choose(repo: str, ggufs: dict[str, list[F]], what: str) -> CodedError:
    return CodedError(
        ErrorCode.INVALID_VALUE,
        f"{what}; ask for one of them, as {repo}:{next(iter(ggufs))}: {_list(ggufs)}",
        param="model_id",
    )


def _list(ggufs: dict[str, list[F]]) -> str:
    sizes = {stem: sum(file.size for file in files) for stem, files in ggufs.items()}
    names = [f"{stem} ({_size(size)})" for stem, size in sorted(sizes.items())]
    more = [] if len(names) <= _LISTED else [f"and {len(names) - _LISTED} more"]
    return ", ".join(names[:_LISTED] + more)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _base(file: RepoFile) -> str:
    return file.name.rpartition("/")[2]


def _depth(file: RepoFile) -> int:
    return file.name.count("/")

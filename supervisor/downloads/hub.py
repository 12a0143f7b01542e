"""What the hub knows of a model, asked through huggingface_hub. Imported by the engine only."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from protocol.errors import CodedError, ErrorCode
from supervisor.downloads import selection
from supervisor.downloads.cache import RepoFolder
from supervisor.downloads.messages import Plan, PlanJob, PlannedFile

T = TypeVar("T")

#: Of one look-up. Somebody waits for the answer.
_TIMEOUT_S = 15.0
_ATTEMPTS = 3
_WAIT_S = 0.3
_MAX_WAIT_S = 10.0
#: Checksums and revisions; they become names of files.
_HEX = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def plan(job: PlanJob) -> Plan:
    """Which files a model has, and which of them are here. Raises ``CodedError``."""
    ask = selection.wanted(job.model_id)
    if ask is None:
        raise CodedError(
            ErrorCode.MODEL_NOT_FOUND, f"{job.model_id!r} is not the name of a model on the hub"
        )
    api = HfApi()
    info = _ask(ask.repo, lambda: api.model_info(ask.repo, files_metadata=True, timeout=_TIMEOUT_S))
    if info.gated:
        # Everybody may see its files, not everybody may have them.
        _ask(ask.repo, lambda: api.auth_check(ask.repo))
    files = [_file(sibling) for sibling in info.siblings or () if _is_plain(sibling.rfilename)]
    summed = [file for file in files if _HEX.fullmatch(file.etag)]
    model_id, selected = selection.select(ask, files, job.formats)
    if info.sha is None or not _HEX.fullmatch(info.sha):
        raise _unavailable(ask.repo, "it does not say which revision it has")
    if nameless := [file.name for file in selected if file not in summed]:
        raise _unavailable(ask.repo, f"it names no checksum of {', '.join(nameless[:3])}")
    folder = RepoFolder(Path(job.cache), ask.repo)
    names = {file.name for file in selected}
    return Plan(
        model_id=model_id,
        repo=ask.repo,
        revision=info.sha,
        files=[
            PlannedFile(file.name, file.size, file.etag, file.lfs, folder.on_disk(file))
            for file in selected
        ],
        linked=[
            file
            for file in files
            if file.name not in names and _HEX.fullmatch(file.etag) and folder.is_whole(file)
        ],
    )


def denied(repo: str, endpoint: str) -> CodedError:
    """What to do where the hub gives nothing without a key, or with this one."""
    return CodedError(
        ErrorCode.HUB_ACCESS_DENIED,
        f"the hub does not give {repo} to you: accept its terms at {endpoint}/{repo}, and set "
        "HF_TOKEN, for the server, to a token of that account (or run: hf auth login)",
        param="model_id",
    )


def retry_after_s(header: str | None, most_s: float) -> float | None:
    """Seconds that the hub asks to wait; None where it names none, or a date."""
    return min(float(header), most_s) if header is not None and header.isdecimal() else None


def _file(sibling: Any) -> PlannedFile:
    lfs = sibling.lfs
    if lfs is not None:
        return PlannedFile(sibling.rfilename, lfs.size, lfs.sha256, lfs=True)
    return PlannedFile(sibling.rfilename, sibling.size or 0, sibling.blob_id or "", lfs=False)


def _is_plain(name: str) -> bool:
    """Whether a file stays where it belongs: what the hub says becomes a path here."""
    return name.isprintable() and {"", ".", ".."}.isdisjoint(name.split("/"))


def _ask(repo: str, question: Callable[[], T]) -> T:
    """Asks again while it may help. Raises ``CodedError``."""
    for attempt in range(1, _ATTEMPTS + 1):
        wait_s: float | None = None
        try:
            return question()
        except GatedRepoError as error:
            raise denied(repo, constants.ENDPOINT) from error
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            # Without a key the hub answers the same for what is private.
            raise CodedError(
                ErrorCode.MODEL_NOT_FOUND,
                f"no model {repo!r} here, nor on the hub ({constants.ENDPOINT}); if it is "
                "private there, set HF_TOKEN for the server",
                param="model_id",
            ) from error
        except OfflineModeIsEnabled as error:
            raise _unavailable(repo, "HF_HUB_OFFLINE is set") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise denied(repo, constants.ENDPOINT) from error
            if status != 429 and status < 500:
                raise _unavailable(repo, f"it answers {status}") from error
            wait_s = retry_after_s(error.response.headers.get("Retry-After"), _MAX_WAIT_S)
            what = "it asks for fewer requests (429)" if status == 429 else f"it answers {status}"
        except OSError as error:
            what = str(error)
        except ValueError as error:
            raise _unavailable(repo, "it does not answer as a hub does") from error
        except Exception as error:
            # The client library's own errors, which differ between versions of huggingface_hub.
            if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
                raise
            what = f"{type(error).__name__}: {error}"
        if attempt < _ATTEMPTS:
            sleep(wait_s if wait_s is not None else _WAIT_S * attempt)
    raise _unavailable(repo, what)


def _unavailable(repo: str, what: str) -> CodedError:
    return CodedError(
        ErrorCode.HUB_UNAVAILABLE,
        f"{repo} is not on this machine, and the hub ({constants.ENDPOINT}) cannot be asked "
        f"for it: {what}"[:600],
    )

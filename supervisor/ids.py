"""What a model may be called."""

from __future__ import annotations

import re

MAX_ID_CHARS = 256
MAX_PATH_CHARS = 4096

#: ``/admin/models/{id}`` has routes of these names.
RESERVED = frozenset(
    {
        *("available", "download", "downloads", "load", "load/confirm", "probe", "unload"),
        *("compatibility", "compatibility/recommendations", "compatibility/regressions"),
    }
)

#: So have downloads, below this.
_RESERVED_BELOW = "download/"

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def complaint_about_id(model_id: str) -> str | None:
    """Why this cannot be a model's id; None when it can."""
    if not model_id:
        return "must not be empty"
    if len(model_id) > MAX_ID_CHARS:
        return f"must not be longer than {MAX_ID_CHARS} characters"
    if _CONTROL.search(model_id):
        return "must not contain control characters"
    if "" in model_id.split("/"):
        return "must not begin or end with a slash, nor contain two in a row"
    if not {".", ".."}.isdisjoint(re.split("[/:]", model_id)):
        return "must not contain '.' or '..' as a path segment"
    if model_id in RESERVED:
        return f"must not be {model_id!r}, which is the name of a route"
    if model_id.startswith(_RESERVED_BELOW):
        return f"must not begin with {_RESERVED_BELOW!r}, where downloads have their routes"
    return None


def complaint_about_path(path: str) -> str | None:
    """Why this cannot be the path of a model; None when it can."""
    if len(path) > MAX_PATH_CHARS:
        return f"must not be longer than {MAX_PATH_CHARS} characters"
    if _CONTROL.search(path):
        return "must not contain control characters"
    return None

"""The gate before a load: which backend, and is this combination known to be bad.

Pure. The runtime blocklist is data (``data/runtime_blocklist.toml``): each rule
names a signature of the model, a backend, the versions concerned and a reason.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from protocol.errors import CodedError, ErrorCode

#: Backends by the model format they read, best first.
BACKENDS_BY_FORMAT: Mapping[str, Sequence[str]] = {
    "gguf": ("llama",),
    "mlx": ("mlx",),
    "simulated": ("simulated",),
}


@dataclass(frozen=True, slots=True)
class BlockRule:
    """``signature`` maps a trait (``format``, ``architecture``, ``quantization``,
    ``id``) to a shell pattern; all must match. ``versions`` is a PEP 440
    specifier of backend versions, empty for all."""

    signature: Mapping[str, str]
    backend: str
    versions: str
    reason: str


def find_block(
    rules: Sequence[BlockRule], traits: Mapping[str, str], backend: str, backend_version: str
) -> BlockRule | None:
    """The first rule that forbids this model on this backend version."""
    for rule in rules:
        if (
            rule.backend == backend
            and _version_matches(rule.versions, backend_version)
            and all(
                fnmatchcase(traits.get(trait, "").lower(), pattern.lower())
                for trait, pattern in rule.signature.items()
            )
        ):
            return rule
    return None


def choose_backend(
    model_format: str,
    requested: str | None,
    installed: Mapping[str, str | None],
    failing: Collection[str] = (),
) -> str:
    """Name the backend to use. ``installed`` maps known backends to versions or None.

    Unless one is requested, those that are ``failing`` on this model come last: when
    there is no other, one of them is tried all the same.

    Raises ``model_unsupported_backend`` for an unknown, unsuitable or missing one.
    """
    suitable = BACKENDS_BY_FORMAT.get(model_format, ())
    if requested is not None and requested not in installed:
        known = ", ".join(sorted(installed))
        raise _unsupported(f"unknown backend {requested!r}; known: {known}")
    if requested is not None and requested not in suitable:
        raise _unsupported(f"backend {requested!r} does not read {model_format} models")
    # Sorting is stable: it leaves the order of the others alone.
    by_record = sorted(suitable, key=lambda backend: backend in failing)
    candidates = by_record if requested is None else [requested]
    for backend in candidates:
        if installed.get(backend) is not None:
            return backend
    missing = " or ".join(repr(name) for name in candidates)
    raise _unsupported(
        f"a {model_format} model needs backend {missing}, which is not available here"
        + "".join(
            f"; install it with: pip install 'opta-lmx[{name}]'"
            for name in candidates
            if name != "simulated"
        )
    )


def check_blocklist(
    rules: Sequence[BlockRule], traits: Mapping[str, str], backend: str, backend_version: str
) -> None:
    """Raise ``model_unsupported_backend`` for a model that a rule forbids."""
    rule = find_block(rules, traits, backend, backend_version)
    if rule is not None:
        raise _unsupported(
            f"{backend} {backend_version} is known to fail on this model: {rule.reason} "
            "(allow_unsupported_runtime=true loads it all the same)"
        )


def _unsupported(message: str) -> CodedError:
    return CodedError(ErrorCode.MODEL_UNSUPPORTED_BACKEND, message)


def _version_matches(specifier: str, version: str) -> bool:
    if not specifier:
        return True
    try:
        return SpecifierSet(specifier).contains(Version(version), prereleases=True)
    except InvalidVersion:
        # A local build with an odd version: a rule that names versions cannot know it.
        return False

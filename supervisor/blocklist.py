"""Reads the runtime blocklist: the shipped rules, then the operator's own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import msgspec
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from supervisor.admission import BlockRule

OPERATOR_FILE = "runtime-blocklist.toml"


class BlocklistError(Exception):
    """A blocklist file cannot be used; the message says why."""


class _Rule(msgspec.Struct, forbid_unknown_fields=True):
    backend: str
    reason: str
    signature: dict[str, str]
    versions: str = ""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    rule: list[_Rule] = []


def load_blocklist(home: Path) -> tuple[BlockRule, ...]:
    """All rules. Raises ``BlocklistError``: an operator's typo must not lift a block."""
    shipped = resources.files("supervisor").joinpath("data/runtime_blocklist.toml")
    rules = _parse(shipped.read_bytes(), "the shipped runtime blocklist")
    own = home / OPERATOR_FILE
    if own.exists():
        rules += _parse(own.read_bytes(), str(own))
    return tuple(rules)


def _parse(content: bytes, source: str) -> list[BlockRule]:
    try:
        rules = msgspec.toml.decode(content, type=_File).rule
        for rule in rules:
            SpecifierSet(rule.versions)
    except (msgspec.MsgspecError, InvalidSpecifier, UnicodeDecodeError) as error:
        raise BlocklistError(f"{source}: {error}") from error
    return [BlockRule(r.signature, r.backend, r.versions, r.reason) for r in rules]

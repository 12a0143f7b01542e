"""What a model may be asked for by: aliases, presets, ``auto``, and what each stands for.

Every name is followed to the ids at its end when the settings are read, so that a request
costs one look into a table. A name that is not there is an id.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum, auto
from typing import NamedTuple

from supervisor.ids import complaint_about_id
from supervisor.presets import Preset

AUTO = "auto"
#: Among candidates: whatever model there is. No id is empty.
ANY = ""
#: A preset may be asked for with this before its name.
PRESET_PREFIX = "preset:"

#: Steps from a name to an id: nobody means more.
MAX_STEPS = 32

Targets = str | Sequence[str]


class NameConflict(ValueError):
    """A name cannot stand for what it is said to; the message begins with its table."""


class Route(NamedTuple):
    """What a name stands for: ids, of which the first that can serve does; or ``ANY``."""

    candidates: tuple[str, ...]
    preset: Preset | None = None


class Names(NamedTuple):
    """``routes`` by name, aliases before presets, these with ``PRESET_PREFIX`` as well;
    ``configured`` are the ids of the models that the settings name."""

    routes: Mapping[str, Route]
    configured: Collection[str]


def names(
    aliases: Mapping[str, Targets], presets: Mapping[str, Preset], ids: Collection[str]
) -> Names:
    """``AUTO`` is there unless one of ``ids``, the configured models, is called so.

    Raises ``NameConflict``.
    """
    for name in aliases:
        _check(f"aliases.{name}", name, ids)
        if name in presets:
            raise NameConflict(f"aliases.{name}: there is a preset of this name")
    for name in presets:
        _check(f"presets.{name}", name, ids)
    follow = _Follow(aliases, presets, ids)
    found = {name: follow.route(name, ()) for name in (*aliases, *presets)}
    found |= {f"{PRESET_PREFIX}{name}": found[name] for name in presets}
    if AUTO not in ids:
        found.setdefault(AUTO, Route((ANY,)))
    return Names(found, ids)


def _check(at: str, name: str, ids: Collection[str]) -> None:
    complaint = complaint_about_id(name)
    if complaint is None and name.startswith(PRESET_PREFIX):
        complaint = f"must not begin with {PRESET_PREFIX!r}, by which presets are asked for"
    if complaint is None and name in ids:
        complaint = "is the id of a configured model, which would not be reached any more"
    if complaint is not None:
        raise NameConflict(f"{at}: the name {complaint}")


class _Follow:
    """Goes from names to ids, each name once."""

    def __init__(
        self,
        aliases: Mapping[str, Targets],
        presets: Mapping[str, Preset],
        ids: Collection[str],
    ) -> None:
        self._aliases = aliases
        self._presets = presets
        self._ids = ids
        self._known: dict[str, Route] = {}

    def route(self, name: str, path: tuple[str, ...]) -> Route:
        """``path`` are the names that have led here."""
        preset = self._presets.get(name.removeprefix(PRESET_PREFIX))
        if preset is not None:
            name = name.removeprefix(PRESET_PREFIX)
        elif name not in self._aliases:
            return self._end(name, path)
        if name in path or len(path) >= MAX_STEPS:
            what = "leads back to itself" if name in path else f"takes more than {MAX_STEPS} steps"
            raise NameConflict(f"{self._at(path[0])}: {what}: {' → '.join((*path, name))}")
        if name not in self._known:
            targets = self._aliases[name] if preset is None else preset.model
            self._known[name] = self._join(name, targets, preset, (*path, name))
        return self._known[name]

    def _join(
        self, name: str, targets: Targets, preset: Preset | None, path: tuple[str, ...]
    ) -> Route:
        targets = [targets] if isinstance(targets, str) else targets
        if not targets:
            raise NameConflict(f"{self._at(name)}: stands for no model: the list is empty")
        parts = [self.route(target, path) for target in targets]
        others = [part.preset for part in parts if part.preset is not None]
        if others and preset is not None:
            raise NameConflict(f"{self._at(name)}: a preset's model cannot be another preset")
        if others and len(parts) > 1:
            # Which parameters a request gets must not depend on what has crashed.
            raise NameConflict(
                f"{self._at(name)}: a preset can only stand alone; "
                "a list of models belongs into the preset itself"
            )
        candidates = dict.fromkeys(each for part in parts for each in part.candidates)
        return Route(tuple(candidates), preset or (others[0] if others else None))

    def _end(self, name: str, path: tuple[str, ...]) -> Route:
        if name == AUTO and AUTO not in self._ids:
            return Route((ANY,))
        complaint = complaint_about_id(name)
        if complaint is None and name.startswith(PRESET_PREFIX):
            complaint = "is none of the presets"
        if complaint is not None:
            raise NameConflict(f"{self._at(path[-1])}: {name[:100]!r} {complaint}")
        return Route((name,))

    def _at(self, name: str) -> str:
        return f"{'aliases' if name in self._aliases else 'presets'}.{name}"


class Standing(Enum):
    """How a candidate is: it takes requests; it is on its way to that; neither is known."""

    ROUTABLE = auto()
    COMING = auto()
    OTHER = auto()


def next_of(left: Sequence[str], standing: Callable[[str], Standing]) -> str:
    """Which to try next: the first, but nobody waits for one that is on its way while another
    takes requests."""
    first, *others = left
    if others and standing(first) is Standing.COMING:
        return next((each for each in others if standing(each) is Standing.ROUTABLE), first)
    return first


class Known(NamedTuple):
    """A tracked model. ``suits``: it does what is asked for, as far as is known."""

    model_id: str
    standing: Standing
    suits: bool
    last_used_at: float | None
    configured: bool


def any_of(models: Sequence[Known]) -> list[str]:
    """What ``ANY`` means now: the one used last, then the configured ones, then others;
    those on their way only when there is nothing else."""
    suiting = [model for model in models if model.suits]
    for standing in (Standing.ROUTABLE, Standing.COMING):
        if found := [model for model in suiting if model.standing is standing]:
            return [model.model_id for model in sorted(found, key=_liking)]
    return []


def _liking(model: Known) -> tuple[bool, float, bool]:
    used = model.last_used_at
    return used is None, -(used or 0.0), not model.configured

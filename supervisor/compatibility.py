"""What the registry's records say: verdicts, and which backends to try last.

Pure. Records come oldest first, in the order they were learnt; that order counts,
not their timestamps, which a clock that is set back puts out of order. Everything in
``metadata`` may be of any type: the file is anybody's.

Every record is an outcome, pass or fail, unless its metadata names an ``event``.
Events (``quarantine``, ``release``) say nothing of their own about the model; they
are stored with outcome ``fail``, the schema having no third word, and are counted
apart. Events of a name unknown here change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
from packaging.version import Version

from protocol.errors import ErrorCode

Outcome = Literal["pass", "fail"]
Verdict = Literal["allow", "deny", "unproven"]
EventName = Literal["quarantine", "release"]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was learned. ``timestamp`` is epoch seconds."""

    model: str
    backend: str
    backend_version: str
    outcome: Outcome
    reason: str
    metadata: dict[str, object]
    timestamp: float

    @property
    def event(self) -> str | None:
        """Its name if this is an event, and no outcome."""
        return self.text("event")

    @property
    def digest(self) -> str | None:
        """Of the model's files; None when it does not say."""
        return self.text("digest")

    @property
    def is_probe(self) -> bool:
        """Whether this was a try only: the model took no traffic after it."""
        return self.metadata.get("probe") is True

    def text(self, name: str) -> str | None:
        """An entry of the metadata, if it is there and is text."""
        value = self.metadata.get(name)
        return value if isinstance(value, str) else None


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What a verdict rests on: outcomes of the model's newest file on this version.

    ``runtime_failures`` are those of the failures that befell a model in service;
    ``latest`` is the record that decided, None where nothing was learnt yet;
    ``last_good_version`` the newest version, not after this one if there is such,
    on which the model is allowed.
    """

    latest: Record | None
    passes: int = msgspec.field(name="pass")
    failures: int = msgspec.field(name="fail")
    runtime_failures: int
    last_good_version: str | None


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """Whether to run a model on one version of a backend.

    ``installed``: it is the version that is here now. ``code`` is the error code
    of a failure that denies.
    """

    model: str
    backend: str
    backend_version: str
    installed: bool
    verdict: Verdict
    code: str | None
    reason: str
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Standing:
    """How one file of a model stands on one version of a backend.

    ``latest`` is the newest outcome; ``decisive`` the record that the verdict rests on;
    ``crashes`` are the failures in service, after the canary had passed.
    """

    verdict: Verdict
    decisive: Record | None
    latest: Record | None
    passes: tuple[Record, ...]
    failures: int
    crashes: tuple[Record, ...]

    @property
    def starts(self) -> int:
        """How often it went into service: passes, but for those of probes."""
        return sum(not record.is_probe for record in self.passes)


def standing(records: Iterable[Record]) -> Standing:
    """Judge records of one model, file, backend and version.

    The latest outcome decides: a pass allows, a failure denies. From a quarantine on
    it is denied, whatever else happens, until a release; then it is unproven, unless
    it passed (on probation) after that quarantine.
    """
    passes: list[Record] = []
    crashes: list[Record] = []
    failures = 0
    latest: Record | None = None
    since_quarantine: Record | None = None
    quarantine: Record | None = None
    released: Record | None = None
    for record in records:
        if record.event is None:
            latest = since_quarantine = record
            released = None
            if record.outcome == "pass":
                passes.append(record)
            else:
                failures += 1
                if record.text("code") == ErrorCode.MODEL_CRASHED:
                    crashes.append(record)
        elif record.event == "quarantine":
            quarantine, since_quarantine, released = record, None, None
        elif record.event == "release":
            quarantine = None
            if since_quarantine is None or since_quarantine.outcome == "fail":
                released = record
    verdict: Verdict = "unproven"
    decisive = quarantine or released or latest
    if quarantine is not None:
        verdict = "deny"
    elif released is None and latest is not None:
        verdict = "allow" if latest.outcome == "pass" else "deny"
    return Standing(verdict, decisive, latest, tuple(passes), failures, tuple(crashes))


def recommendations(
    records: Iterable[Record], installed: Mapping[str, str | None]
) -> list[Recommendation]:
    """A verdict for every model, backend and version in the records, in this order.

    ``installed`` maps backends to the versions that are here now. A model that is
    known on a backend, but not on its installed version, is unproven there: the next
    canary decides. Only the file that the model has had last on this backend counts,
    whatever the version, and what names no file.
    """
    given = list(records)
    newest = _newest_files(given)
    of_newest = grouped(
        r for r in given if r.digest in (None, newest.get((r.model, r.backend), r.digest))
    )
    return [
        recommendation
        for (model, backend), versions in grouped(given).items()
        for recommendation in _recommend(
            model,
            backend,
            # A version that knows earlier files only has not proven this one.
            {version: of_newest.get((model, backend), {}).get(version, []) for version in versions},
            installed.get(backend),
        )
    ]


def _recommend(
    model: str, backend: str, versions: Mapping[str, Sequence[Record]], installed: str | None
) -> list[Recommendation]:
    standings = {version: standing(records) for version, records in versions.items()}
    good = [version for version, found in standings.items() if found.verdict == "allow"]
    if installed is not None and installed not in standings:
        standings[installed] = standing([])
    order = in_order(standings)
    found = []
    for version in order:
        here = standings[version]
        before = [v for v in good if order.index(v) <= order.index(version)]
        last_good = next(reversed(before or good), None)
        found.append(
            Recommendation(
                model=model,
                backend=backend,
                backend_version=version,
                installed=version == installed,
                verdict=here.verdict,
                code=_code(here),
                reason=_reason(here, backend, last_good),
                evidence=Evidence(
                    latest=here.decisive,
                    passes=len(here.passes),
                    failures=here.failures,
                    runtime_failures=len(here.crashes),
                    last_good_version=last_good,
                ),
            )
        )
    return found


def failing(
    records: Sequence[Record], *, model: str, digest: str, installed: Mapping[str, str | None]
) -> frozenset[str]:
    """The backends whose installed version is denied for this file of this model."""
    of_file = [r for r in records if r.model == model and r.digest in (None, digest)]
    return frozenset(
        backend
        for backend, version in installed.items()
        if standing(
            r for r in of_file if r.backend == backend and r.backend_version == version
        ).verdict
        == "deny"
    )


def grouped(records: Iterable[Record]) -> dict[tuple[str, str], dict[str, list[Record]]]:
    """Records by model and backend, sorted, then by version, oldest version first."""
    groups: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in records:
        versions = groups.setdefault((record.model, record.backend), {})
        versions.setdefault(record.backend_version, []).append(record)
    return {
        key: {version: groups[key][version] for version in in_order(groups[key])}
        for key in sorted(groups)
    }


def in_order(versions: Iterable[str]) -> list[str]:
    """Versions as PEP 440 orders them; if one of them is none, as they are given.

    What is given in the order of its first records falls back to time that way.
    Versions that PEP 440 calls equal also stay as they are given. No version at all, as
    that of a backend that is not installed, is before any other.
    """
    given = list(versions)
    try:
        parsed = {version: Version(version) for version in given if version}
    except ValueError:
        # InvalidVersion is one, and so is what a number of 5,000 digits raises.
        return given
    known = sorted(filter(None, given), key=parsed.__getitem__)
    return [*(version for version in given if not version), *known]


def _newest_files(records: Iterable[Record]) -> dict[tuple[str, str], str]:
    """The digest of the newest file of each model and backend, whatever the version."""
    # A release may be that of an older file, whose quarantine somebody cleared away.
    return {
        (record.model, record.backend): record.digest
        for record in records
        if record.digest and record.event != "release"
    }


def _code(here: Standing) -> str | None:
    if here.verdict != "deny" or here.decisive is None:
        return None
    return here.decisive.text("code")


def _reason(here: Standing, backend: str, last_good: str | None) -> str:
    if here.verdict != "unproven" and here.decisive is not None:
        return here.decisive.reason
    if here.decisive is not None and here.decisive.event == "release":
        return f"{here.decisive.reason}; the next canary decides"
    if last_good is not None:
        return f"was proven on {backend} {last_good}; the next canary decides"
    return "never proven; the next canary decides"

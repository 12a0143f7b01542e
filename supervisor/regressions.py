"""Regressions: what worked on an earlier version of a backend and is worse on a newer one.

Pure, over the registry's records. Only equal things are compared: records of the same
model, backend and model file (``metadata.digest``); outputs and speeds moreover only
of passes that asked the same (``metadata.canary``) and got an answer of the same length.

Looked at is the version in use: the installed one, or the newest on record when that
has no record yet, and every version after it. Each is compared with the earlier ones on
which this file is allowed, newest first; the first that was better is its last good one.

``fails``
    The newest outcome is a failure.
``crashes``
    It passes its canaries and fails in service: at least ``CRASHES_ENOUGH`` times, and
    more than ``MORE_CRASHES`` times as often for each pass, that is for each time it went
    into service, as on the earlier version. Half a failure and half a pass are added to
    the earlier ones, since a few passes prove little.
``output_changed``
    The earlier version gave one greedy output, always, and none of the newer
    version's passes gave it. An output that varies within the earlier version proves
    nothing.
``slower``
    By the medians of the last ``SAMPLES`` passes of either side: tokens/s below
    ``SLOWER_TOKENS`` times the earlier ones, or the first token after more than
    ``SLOWER_FIRST_TOKEN`` times the earlier time, and at least ``FIRST_TOKEN_FLOOR_S``
    later, since less is the machine's noise. With fewer than ``ENOUGH`` passes on
    either side a single cold start could decide, and the wider ``FEW_*`` limits hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Literal

import msgspec

from supervisor.compatibility import Record, Standing, grouped, standing

Kind = Literal["fails", "crashes", "output_changed", "slower"]
KINDS: tuple[Kind, ...] = ("fails", "crashes", "output_changed", "slower")

SAMPLES = 10
ENOUGH = 3
SLOWER_TOKENS, FEW_SLOWER_TOKENS = 0.7, 0.5
SLOWER_FIRST_TOKEN, FEW_SLOWER_FIRST_TOKEN = 1.5, 2.0
FIRST_TOKEN_FLOOR_S = 0.05
CRASHES_ENOUGH = 3
MORE_CRASHES = 2.0

#: No rate and no duration in seconds is larger; what is, is not one.
_LARGEST = 1e9


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a comparison: its newest record that speaks for the finding, the
    medians of its ``samples`` comparable passes (None without any), and how often it
    went into service and then failed there."""

    backend_version: str
    record: Record
    tokens_per_s: float | None
    time_to_first_token_s: float | None
    samples: int
    passes: int = msgspec.field(name="pass")
    runtime_failures: int


class Regression(msgspec.Struct, frozen=True, kw_only=True):
    """``installed``: the version that is worse is the one that is here now."""

    model: str
    backend: str
    backend_version: str
    installed: bool
    kind: Kind
    last_good_version: str
    reason: str
    before: Side
    after: Side


def regressions(records: Iterable[Record], installed: Mapping[str, str | None]) -> list[Regression]:
    """Everything that got worse, in the order of models, backends and versions.

    ``installed`` maps backends to the versions that are here now.
    """
    return [
        regression
        for (model, backend), versions in grouped(records).items()
        for regression in _compare_versions(model, backend, versions, installed.get(backend))
    ]


def _compare_versions(
    model: str, backend: str, versions: Mapping[str, Sequence[Record]], installed: str | None
) -> Iterator[Regression]:
    order = list(versions)
    current = order[-1] if installed is None or installed not in versions else installed
    for number in range(max(order.index(current), 1), len(order)):
        version = order[number]
        digest = _newest_digest(versions[version])
        if digest is None:
            continue
        after = _of_file(version, versions[version], digest)
        earlier = [_of_file(v, versions[v], digest) for v in reversed(order[:number])]
        pairs = [_Pair(before, after) for before in earlier if before.standing.verdict == "allow"]
        for kind in KINDS:
            worse = ((pair, reason) for pair in pairs if (reason := pair.worse(kind)) is not None)
            for pair, reason in islice(worse, 1):
                yield Regression(
                    model=model,
                    backend=backend,
                    backend_version=version,
                    installed=version == installed,
                    kind=kind,
                    last_good_version=pair.before.version,
                    reason=reason,
                    before=pair.side(pair.before, kind),
                    after=pair.side(after, kind),
                )


@dataclass(frozen=True, slots=True)
class _Version:
    """What is known of one model file on one version."""

    version: str
    standing: Standing

    def asked(self) -> list[tuple[object, object]]:
        """What its passes asked for, newest first."""
        return [key for p in reversed(self.standing.passes) if (key := _question(p)) is not None]

    def passes(self, question: tuple[object, object] | None) -> list[Record]:
        """The last passes that asked this."""
        if question is None:
            return []
        return [p for p in self.standing.passes if _question(p) == question][-SAMPLES:]


class _Pair:
    """Two versions and what can be compared between them."""

    def __init__(self, before: _Version, after: _Version) -> None:
        asked_before = before.asked()
        question = next((key for key in after.asked() if key in asked_before), None)
        self.before, self.after = before, after
        self._passes = {v.version: v.passes(question) for v in (before, after)}

    def worse(self, kind: Kind) -> str | None:
        """In which way the later one is worse; None when it is not, as far as is known."""
        match kind:
            case "fails":
                return self._fails()
            case "crashes":
                return self._crashes()
            case "output_changed":
                return self._output_changed()
            case "slower":
                return self._slower()

    def side(self, version: _Version, kind: Kind) -> Side:
        passes = self._passes[version.version]
        here = version.standing
        record = here.latest if kind == "fails" or not passes else passes[-1]
        if kind == "crashes" and here.crashes:
            record = here.crashes[-1]
        assert record is not None  # A finding rests on outcomes of both sides.
        return Side(
            backend_version=version.version,
            record=record,
            tokens_per_s=_median(passes, "tokens_per_s"),
            time_to_first_token_s=_median(passes, "time_to_first_token_s"),
            samples=len(passes),
            passes=here.starts,
            runtime_failures=len(here.crashes),
        )

    def _fails(self) -> str | None:
        latest = self.after.standing.latest
        if latest is None or latest.outcome != "fail":
            return None
        return f"passed on {self.before.version}, fails on {self.after.version}: {latest.reason}"

    def _crashes(self) -> str | None:
        before, after = self.before.standing, self.after.standing
        if len(after.crashes) < CRASHES_ENOUGH:
            return None
        assumed = (len(before.crashes) + 0.5) / (before.starts + 0.5)
        if len(after.crashes) <= MORE_CRASHES * assumed * after.starts:
            return None
        return (
            f"failed in service {len(after.crashes)} times in {after.starts} runs, "
            f"was {len(before.crashes)} in {before.starts} on {self.before.version}; "
            f"the last time: {after.crashes[-1].reason}"
        )

    def _output_changed(self) -> str | None:
        before, after = (
            {d for p in self._passes[v.version] if (d := p.text("output_digest")) is not None}
            for v in (self.before, self.after)
        )
        if len(before) != 1 or not after or before & after:
            return None
        return f"the greedy answer to the same canary differs from that of {self.before.version}"

    def _slower(self) -> str | None:
        complaints = []
        before, after, few = self._medians("tokens_per_s")
        limit = FEW_SLOWER_TOKENS if few else SLOWER_TOKENS
        if before and after and after < limit * before:
            complaints.append(f"{after:.1f} tokens/s, was {before:.1f}")
        before, after, few = self._medians("time_to_first_token_s")
        limit = FEW_SLOWER_FIRST_TOKEN if few else SLOWER_FIRST_TOKEN
        if before and after and after > max(limit * before, before + FIRST_TOKEN_FLOOR_S):
            complaints.append(f"first token after {after:.3f} s, was {before:.3f} s")
        return f"{'; '.join(complaints)} on {self.before.version}" if complaints else None

    def _medians(self, name: str) -> tuple[float | None, float | None, bool]:
        """Before, after, and whether either rests on few passes."""
        sides = [self._passes[v.version] for v in (self.before, self.after)]
        few = min(len(_numbers(side, name)) for side in sides) < ENOUGH
        return _median(sides[0], name), _median(sides[1], name), few


def _of_file(version: str, records: Sequence[Record], digest: str) -> _Version:
    return _Version(version, standing(r for r in records if r.digest == digest))


def _newest_digest(records: Sequence[Record]) -> str | None:
    """The file of the newest outcome that names one."""
    return next((r.digest for r in reversed(records) if r.digest and r.event is None), None)


def _question(record: Record) -> tuple[object, object] | None:
    """What a pass asked for and how long its answer was; None when that is not known."""
    canary = record.text("canary")
    tokens = record.metadata.get("completion_tokens")
    return None if canary is None or not isinstance(tokens, int) else (canary, tokens)


def _numbers(records: Sequence[Record], name: str) -> list[float]:
    values = (record.metadata.get(name) for record in records)
    return [
        float(value)
        for value in values
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LARGEST
    ]


def _median(records: Sequence[Record], name: str) -> float | None:
    numbers = _numbers(records, name)
    return median(numbers) if numbers else None

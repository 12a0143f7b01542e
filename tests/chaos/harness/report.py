"""Rows, and how they are shown."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path


@dataclasses.dataclass
class Row:
    """What one fault in one phase did. Times are seconds from the moment it struck.

    ``recovered_s`` is until the ``outcome`` was there: routable again, or the
    expected end. ``stall_s`` is the bystander's longest pause between two tokens,
    ``gap_p50_s`` and ``gap_p99_s`` are percentiles of all of them; ``calm_…`` is the
    same of the same bystander when nothing was broken. ``grown_mb`` is what the server
    and its bystanders have more in the end, ``parts_s`` where the time of the victim's
    last load went. None: does not apply.
    """

    fault: str
    phase: str
    victim: str = "simulated"
    detected_s: float | None = None
    recovered_s: float | None = None
    outcome: str = ""
    stall_s: float | None = None
    calm_s: float | None = None
    gap_p50_s: float | None = None
    gap_p99_s: float | None = None
    calm_p50_s: float | None = None
    calm_p99_s: float | None = None
    lost: int | None = None
    orphans: int = 0
    waiters: int = 0
    freed_mb: float | None = None
    grown_mb: float | None = None
    parts_s: dict[str, float] = dataclasses.field(default_factory=dict)
    breaches: list[str] = dataclasses.field(default_factory=list)
    skipped: str = ""

    def breach(self, what: str) -> None:
        self.breaches.append(what)

    @property
    def name(self) -> str:
        return f"{self.fault} in {self.phase} ({self.victim})"


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile; NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


#: The times of a row that are summed up, and what they are called there.
_TIMES = {
    "detected_s": "detected",
    "recovered_s": "recovered",
    "stall_s": "stall",
    "calm_s": "  calm",
    "gap_p50_s": "gap p50",
    "calm_p50_s": "  calm",
    "gap_p99_s": "gap p99",
    "calm_p99_s": "  calm",
}


def summary(rows: Iterable[Row]) -> dict[str, object]:
    """Percentiles of the times, and the totals of what must be zero."""
    ran = [row for row in rows if not row.skipped]
    found: dict[str, object] = {"cases": len(ran), "breached": sum(bool(r.breaches) for r in ran)}
    for name in _TIMES:
        values = [value for row in ran if (value := getattr(row, name)) is not None]
        found[name] = {
            "p50": percentile(values, 50),
            "p95": percentile(values, 95),
            "max": max(values, default=math.nan),
        }
    found["crash_to_routable"] = _recoveries(ran)
    for name in ("lost", "orphans", "waiters"):
        found[name] = sum(getattr(row, name) or 0 for row in ran)
    return found


def _recoveries(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """By victim: the medians of what is between a worker's end and the next one's traffic."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.parts_s and row.outcome == "recovered":
            times = {"detected": row.detected_s, **row.parts_s, "recovered": row.recovered_s}
            for part, seconds in times.items():
                if seconds is not None:
                    found.setdefault(row.victim, {}).setdefault(part, []).append(seconds)
    return {
        victim: {part: percentile(values, 50) for part, values in parts.items()}
        for victim, parts in found.items()
    }


_HEAD = (
    *("fault", "phase", "victim", "detected", "recovered", "outcome"),
    *("stall", "calm", "lost", "orph", "wait", "freed MB", ""),
)


def table(rows: Sequence[Row]) -> str:
    """A table to read, with a line per breach below it."""
    lines = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    numeric = {3, 4, 6, 7, 8, 9, 10, 11}
    text = [
        "  ".join(
            cell.rjust(width) if column in numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    text += [f"BREACH {row.name}: {breach}" for row in rows for breach in row.breaches]
    return "\n".join([*text, "", _summary_text(rows)])


def _cells(row: Row) -> tuple[str, ...]:
    mark = "skipped" if row.skipped else "BREACH" if row.breaches else "ok"
    return (
        *(row.fault, row.phase, row.victim),
        *(_seconds(row.detected_s), _seconds(row.recovered_s), row.skipped or row.outcome),
        *(_seconds(row.stall_s), _seconds(row.calm_s), _count(row.lost)),
        *("" if row.skipped else str(n) for n in (row.orphans, row.waiters)),
        *("" if row.freed_mb is None else f"{row.freed_mb:.0f}", mark),
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _summary_text(rows: Sequence[Row]) -> str:
    found = summary(rows)
    lines = [f"{'seconds':12}{'p50':>9}{'p95':>9}{'max':>9}"]
    for name, title in _TIMES.items():
        numbers = found[name]
        assert isinstance(numbers, dict)
        lines.append(f"{title:12}" + "".join(f"{number:9.3f}" for number in numbers.values()))
    recoveries = found["crash_to_routable"]
    assert isinstance(recoveries, dict)
    for victim, parts in recoveries.items():
        told = ", ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items())
        lines.append(f"crash to routable, {victim} (p50): {told}")
    lines.append(
        f"{found['cases']} cases, {found['breached']} breached; bystander tokens lost "
        f"{found['lost']}, orphans {found['orphans']}, waiters left {found['waiters']}"
    )
    return "\n".join(lines)


def write_json(path: Path, rows: Sequence[Row]) -> None:
    content = {"summary": summary(rows), "rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(_without_nan(content), indent=1) + "\n")


def _without_nan(value: object) -> object:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value

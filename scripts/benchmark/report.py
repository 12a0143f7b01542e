"""Tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmark.summary import Samples, Verdict, is_streams, verdicts
from benchmark.tables import NOTHING, Table, cell, verdict_table
from benchmark.workloads import Sample


class Results(msgspec.Struct):
    """A run as it is written to a file. ``missing`` says what was not compared, and why."""

    machine: dict[str, str]
    settings: dict[str, str]
    missing: dict[str, str]
    samples: list[Sample]
    verdicts: list[Verdict]


def results(
    machine: dict[str, str],
    settings: dict[str, str],
    missing: dict[str, str],
    samples: list[Sample],
) -> Results:
    return Results(machine, settings, missing, samples, verdicts(Samples(samples)))


def read(path: Path) -> Results:
    """What was measured; the promises are today's."""
    found = msgspec.json.decode(path.read_bytes(), type=Results)
    return msgspec.structs.replace(found, verdicts=verdicts(Samples(found.samples)))


def write_json(content: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")


def tables(found: Results) -> list[Table]:
    """What is shown: a table for each figure."""
    samples = Samples(found.samples)
    shown = [_facts("Machine", found.machine), _facts("Run", found.settings)]
    streams = [name for name in samples.workloads() if is_streams(name)]
    if streams:
        shown += [
            Table(
                f"{figure.title}: median (range)",
                ("", *streams),
                [
                    (contender, *(figure.cell(samples, contender, name) for name in streams))
                    for contender in samples.contenders()
                ],
            )
            for figure in _STREAM_FIGURES
        ]
    for title, prefix, figures in _OTHER_FIGURES:
        for workload in _named(samples, prefix):
            columns = ("", *(figure.title for figure in figures))
            rows = [
                (contender, *(figure.cell(samples, contender, workload) for figure in figures))
                for contender in samples.contenders()
            ]
            shown.append(Table(f"{title} ({workload}): median (range)", columns, rows))
    return [*shown, verdict_table(found.verdicts)._replace(notes=_notes(found, samples))]


def overview(found: Results) -> list[Table]:
    """For a page: all figures in one table, and the promises."""
    samples = Samples(found.samples)
    contenders = samples.contenders()
    rows = []
    for workload in samples.workloads():
        figures: Sequence[_Figure] = _STREAM_FIGURES if is_streams(workload) else ()
        for _, prefix, others in _OTHER_FIGURES:
            figures = others if workload.startswith(prefix) else figures
        for figure in figures:
            cells = [figure.cell(samples, contender, workload) for contender in contenders]
            if any(each != NOTHING for each in cells):
                rows.append((f"{workload}: {figure.title}", *cells))
    told = [*found.machine.items(), *found.settings.items()]
    facts = "; ".join(f"{name} {value}" for name, value in told)
    every = Table("All figures: median (range)", ("", *contenders), rows, [facts])
    return [every, verdict_table(found.verdicts)._replace(notes=_notes(found, samples))]


def _named(samples: Samples, prefix: str) -> list[str]:
    return [name for name in samples.workloads() if name.startswith(prefix)]


class _Figure(NamedTuple):
    """One or two metrics in a cell."""

    title: str
    metrics: Sequence[str]
    digits: int = 1

    def cell(self, samples: Samples, contender: str, workload: str) -> str:
        found = [samples.range(contender, workload, metric) for metric in self.metrics]
        if not any(found):
            return NOTHING
        return " / ".join(cell(each, self.digits) for each in found)


_STREAM_FIGURES = (
    _Figure("tokens/s, all streams together", ["tokens_per_s"]),
    _Figure("first token, ms: p50 / p95", ["first_token_p50_ms", "first_token_p95_ms"], 0),
    _Figure("between tokens, ms: p50 / p99", ["inter_token_p50_ms", "inter_token_p99_ms"]),
    _Figure("CPU of the gateway process alone, µs/token", ["gateway_us_per_token"]),
    _Figure("CPU of all its processes, µs/token", ["cpu_us_per_token"], 0),
    _Figure("peak memory of all its processes, MB", ["peak_mb"], 0),
)

_OTHER_FIGURES = (
    (
        "A chat's second turn",
        "second turn",
        (
            _Figure("prompt tokens", ["prompt_tokens"], 0),
            _Figure("first turn's first token, ms", ["first_turn_ms"], 0),
            _Figure("second turn's, ms", ["second_turn_ms"], 0),
            _Figure("second/first", ["second_to_first"], 3),
            _Figure("peak MB", ["peak_mb"], 0),
        ),
    ),
    (
        "A long prompt arrives while others run",
        "long prompt",
        (
            _Figure("prompt tokens", ["prompt_tokens"], 0),
            _Figure("longest stall of a stream, ms", ["longest_stall_ms"], 0),
            _Figure("usual gap, ms", ["undisturbed_ms"]),
            _Figure("long prompt's first token, ms", ["long_first_token_ms"], 0),
        ),
    ),
)


def _notes(found: Results, samples: Samples) -> list[str]:
    """What is missing, what failed, and where prompts were not the same tokens."""
    notes = [f"{contender}: {reason}" for contender, reason in found.missing.items()]
    for contender in samples.contenders():
        for workload in samples.workloads():
            if error := samples.error(contender, workload):
                notes.append(f"{contender}, {workload}: FAILED: {error}")
    for workload in samples.workloads():
        counts = {
            contender: count.median
            for contender in samples.contenders()
            if (count := samples.range(contender, workload, "prompt_tokens"))
        }
        if counts and max(counts.values()) - min(counts.values()) > 0.02 * max(counts.values()):
            told = ", ".join(f"{name} {count:.0f}" for name, count in counts.items())
            notes.append(f"{workload}: the prompts differ in tokens: {told}")
    return notes


def _facts(title: str, facts: Mapping[str, str]) -> Table:
    return Table(title, ("", ""), list(facts.items()))

"""Tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from benchmark.summary import Range, Samples, Verdict, verdicts
from benchmark.workloads import Sample

_NOTHING = "-"


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
    return msgspec.json.decode(path.read_bytes(), type=Results)


def write_json(content: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")


def show(found: Results, console: Console) -> None:
    samples = Samples(found.samples)
    print_table(console, "Machine", _facts(found.machine))
    print_table(console, "Run", _facts(found.settings))
    streams = [name for name in samples.workloads() if "stream" in name]
    for title, cell in _STREAM_FIGURES:
        if streams:
            print_table(console, title, _table(samples, streams, cell))
    for title, workload, columns in _OTHER_FIGURES:
        if workload in samples.workloads():
            print_table(console, title, _columns_table(samples, workload, columns))
    for contender, reason in found.missing.items():
        console.print(f"{contender}: {reason}", markup=False, highlight=False)
    for contender in samples.contenders():
        for workload in samples.workloads():
            if error := samples.error(contender, workload):
                console.print(
                    f"{contender}, {workload}: FAILED: {error}", markup=False, highlight=False
                )
    _warn_about_prompts(samples, console)
    title = "What is promised of opta-lmx: median (range)"
    print_table(console, title, _verdict_table(found.verdicts))


def print_table(console: Console, title: str, table: Table) -> None:
    """A table's own title would be wrapped to its width."""
    console.print(f"\n{title}", style="bold", markup=False, highlight=False)
    console.print(table)


_Cell = Callable[[Samples, str, str], str]


def _ranged(metric: str, digits: int = 1) -> _Cell:
    def cell(samples: Samples, contender: str, workload: str) -> str:
        return _format(samples.range(contender, workload, metric), digits)

    return cell


def _first_token(samples: Samples, contender: str, workload: str) -> str:
    p50 = samples.first_token_ms(contender, workload, 50)
    p95 = samples.first_token_ms(contender, workload, 95)
    return _NOTHING if p50 is None or p95 is None else f"{p50:.0f} / {p95:.0f}"


def _inter_token(samples: Samples, contender: str, workload: str) -> str:
    p50 = samples.range(contender, workload, "inter_token_p50_ms")
    p99 = samples.range(contender, workload, "inter_token_p99_ms")
    return _NOTHING if p50 is None or p99 is None else f"{p50.median:.1f} / {p99.median:.1f}"


_STREAM_FIGURES: Sequence[tuple[str, _Cell]] = (
    ("Tokens/s, all streams together: median (range)", _ranged("tokens_per_s")),
    ("First token, ms: p50 / p95", _first_token),
    ("Between tokens, ms: p50 / p99", _inter_token),
    ("CPU of the gateway process alone, µs/token", _ranged("gateway_us_per_token")),
    ("CPU of all its processes, µs/token", _ranged("cpu_us_per_token", 0)),
    ("Peak memory of all its processes, MB", _ranged("peak_mb", 0)),
)

_OTHER_FIGURES = (
    (
        "A chat's second turn: time to first token",
        "second turn",
        (
            ("prompt tokens", "prompt_tokens", 0),
            ("first turn, ms", "first_turn_ms", 0),
            ("second turn, ms", "second_turn_ms", 0),
            ("second/first", "second_to_first", 3),
            ("peak MB", "peak_mb", 0),
        ),
    ),
    (
        "A long prompt arrives while a stream runs",
        "long prompt",
        (
            ("prompt tokens", "prompt_tokens", 0),
            ("stream's longest stall, ms", "longest_stall_ms", 0),
            ("its usual gap, ms", "undisturbed_ms", 1),
            ("long prompt's first token, ms", "long_first_token_ms", 0),
        ),
    ),
)


def _table(samples: Samples, workloads: Sequence[str], cell: _Cell) -> Table:
    table = Table()
    table.add_column("")
    for workload in workloads:
        table.add_column(workload, justify="right")
    for contender in samples.contenders():
        table.add_row(contender, *(cell(samples, contender, name) for name in workloads))
    return table


def _columns_table(
    samples: Samples, workload: str, columns: Sequence[tuple[str, str, int]]
) -> Table:
    table = Table()
    table.add_column("")
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    for contender in samples.contenders():
        cells = (
            _format(samples.range(contender, workload, metric), digits)
            for _, metric, digits in columns
        )
        table.add_row(contender, *cells)
    return table


def _verdict_table(found: Sequence[Verdict]) -> Table:
    table = Table()
    table.add_column("")
    table.add_column("measured", justify="right")
    table.add_column("")
    for verdict in found:
        word = {None: "not measured", True: "ok", False: "SHORT"}[verdict.kept]
        table.add_row(verdict.promise, _format(verdict.value, 3), word)
    return table


def _warn_about_prompts(samples: Samples, console: Console) -> None:
    """The same messages are to be the same tokens everywhere."""
    for workload in samples.workloads():
        counts = {
            contender: found.median
            for contender in samples.contenders()
            if (found := samples.range(contender, workload, "prompt_tokens"))
        }
        if counts and max(counts.values()) - min(counts.values()) > 0.02 * max(counts.values()):
            told = ", ".join(f"{name} {count:.0f}" for name, count in counts.items())
            console.print(f"{workload}: the prompts differ in tokens: {told}", markup=False)


def _facts(facts: Mapping[str, str]) -> Table:
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _format(value: Range | None, digits: int) -> str:
    if value is None:
        return _NOTHING
    text = f"{value.median:.{digits}f}"
    if value.low == value.high:
        return text
    return f"{text} ({value.low:.{digits}f} to {value.high:.{digits}f})"

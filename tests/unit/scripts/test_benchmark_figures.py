"""From samples to figures, and from figures to what is said of the promises."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from benchmark import relay, report, scale
from benchmark.plan import Answer, Failed, Plan
from benchmark.probes import Memory
from benchmark.summary import Range, Samples, Verdict, judge, spread, verdicts
from benchmark.tables import Table, cell, markdown
from benchmark.workloads import LongPrompt, Sample, percentile
from hypothesis import given
from hypothesis import strategies as st

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


@given(NUMBERS, st.floats(0, 100))
def test_a_percentile_lies_between_two_neighbours(values: list[float], percent: float) -> None:
    found = percentile(values, percent)
    assert min(values) <= found <= max(values)
    assert percentile(values, 0) == min(values)
    assert percentile(values, 100) == max(values)
    assert percentile(values, 50) == pytest.approx(statistics.median(values), abs=1e-6)


def test_percentiles_of_a_known_list() -> None:
    assert percentile([], 50) == 0
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([10, 20], 95) == pytest.approx(19.5)


def test_a_spread_is_median_and_range() -> None:
    assert spread([]) is None
    assert spread([3, 1, 2, 9]) == Range(2.5, 1, 9)


def sample(
    contender: str, repetition: int, workload: str = "8 streams", **metrics: float
) -> Sample:
    return Sample(contender, workload, repetition, dict(metrics))


def test_ratios_are_formed_within_a_repetition() -> None:
    samples = Samples(
        [
            sample("opta-lmx", 0, x=10.0),
            sample("opta-lmx", 1, x=50.0),
            sample("opta-lmx", 2, x=7.0),
            sample("peer", 0, x=10.0),
            # The machine was five times as fast.
            sample("peer", 1, x=50.0),
            Sample("peer", "8 streams", 2, {"x": 1.0}, error="it broke"),
            sample("peer", 3, x=1.0),
        ]
    )
    assert samples.ratio("8 streams", "x", "peer") == Range(1.0, 1.0, 1.0)
    assert samples.ratio("8 streams", "y", "peer") is None
    assert samples.ratio("8 streams", "x", "nobody") is None


@pytest.mark.parametrize(
    ("median", "at_least", "kept"),
    [(0.96, True, False), (0.97, True, True), (0.97, False, True), (0.98, False, False)],
)
def test_a_promise_is_judged_by_the_median(median: float, at_least: bool, kept: bool) -> None:
    assert judge("p", Range(median, 0.0, 9.0), 0.97, at_least=at_least).kept is kept
    assert judge("p", None, 0.97).kept is None


def judged(samples: list[Sample]) -> dict[str, Verdict]:
    return {verdict.promise: verdict for verdict in verdicts(Samples(samples))}


def test_the_gateway_is_judged_by_itself_and_beside_the_router() -> None:
    samples = [
        sample("opta-lmx", 0, gateway_us_per_token=24.0),
        sample("llama-server router", 0, gateway_us_per_token=60.0),
    ]
    found = judged(samples)
    assert found["8 streams: gateway CPU ≤ 25 µs/token"].kept is True
    half = found["8 streams: gateway CPU ≤ half the router's"]
    assert (half.value, half.kept) == (Range(0.4, 0.4, 0.4), True)
    assert found["32 streams: gateway CPU ≤ half the router's"].kept is None
    samples[0].metrics["gateway_us_per_token"] = 31.0
    assert judged(samples)["8 streams: gateway CPU ≤ half the router's"].kept is False


def test_each_of_the_two_ways_to_run_the_peer_is_compared_with() -> None:
    found = judged(
        [
            sample("opta-lmx", 0, tokens_per_s=100.0),
            sample("llama-server", 0, tokens_per_s=99.0),
            sample("llama-server split", 0, tokens_per_s=110.0),
        ]
    )
    assert found["8 streams: tokens/s ≥ llama-server's"].kept is True
    assert found["8 streams: tokens/s ≥ llama-server split's"].kept is False


def test_the_relay_is_judged_at_its_own_pace_only() -> None:
    samples = [
        sample("opta-lmx", 0, "paced, 1 stream", gateway_us_per_token=39.0),
        sample("opta-lmx", 0, "paced, 8 streams", gateway_us_per_token=26.0),
        sample("opta-lmx", 0, "flat out, 32 streams", gateway_us_per_token=1.0),
    ]
    assert [verdict.kept for verdict in relay.verdicts(samples)] == [True, False, None]


def test_a_recorded_stream_is_set_beside_the_same_one_of_its_repetition() -> None:
    name = "paced, 1 stream"
    plain = [
        sample("opta-lmx", n, name, gateway_us_per_token=cost) for n, cost in ((0, 10.0), (1, 40.0))
    ]
    recorded = [
        sample("opta-lmx, recorded", n, name, gateway_us_per_token=cost)
        for n, cost in ((0, 15.0), (1, 50.0))
    ]
    short = sample("opta-lmx", 0, "short requests", gateway_us_per_request=1.0)
    titles = [table.title for table in relay.tables([*plain, short])]
    tables = {table.title: table for table in relay.tables([*plain, *recorded, short])}
    (added,) = tables.keys() - set(titles)
    ((told, _, _, ratio),) = tables[added].rows
    assert told == name
    # 1.5 and 1.25, not 65 over 50.
    assert ratio == "1.38 (1.25 to 1.50)"


def step(workers: int, start_ms: float, idle: float, request_us: float) -> scale.Step:
    def only(value: float) -> Range:
        return Range(value, value, value)

    memory = Memory(1.0, 1.0, 1.0)
    return scale.Step(
        workers,
        only(start_ms),
        only(idle),
        only(idle),
        only(1.0),
        only(request_us),
        memory,
        memory,
    )


def test_size_must_not_show() -> None:
    first = step(1, 500, 0.1, 800)
    kept = [v.kept for v in scale.verdicts([first, step(50, 600, 0.9, 900)])]
    assert kept == [True, True, True]
    kept = [v.kept for v in scale.verdicts([first, step(50, 700, 1.1, 1100)])]
    assert kept == [False, False, False]
    assert [v.kept for v in scale.verdicts([first])] == [True, None, None]
    assert scale.verdicts([]) == []


# --- what a long prompt does to streams that run ---


@dataclass
class Played:
    """An instance that has given these answers."""

    answers: list[Answer]
    gateway: list[int] = field(default_factory=list)
    workers: list[int] = field(default_factory=list)

    def play(self, plan: Plan) -> list[Answer]:
        assert plan.until == len(plan.requests) - 1
        return self.answers


def test_the_longest_stall_is_that_of_any_stream_while_the_prompt_is_read() -> None:
    steady = Answer(0.0, [0.1 * n for n in range(1, 40)], 400)
    stalled = Answer(0.0, [0.1, 0.2, 0.3, 1.3, 1.4, 2.0, 3.9], 400)
    long = Answer(0.25, [1.8], 4)
    measured = sample("x", 0)
    LongPrompt(4000, 8192, streams=2).measure(Played([steady, stalled, long]), 1, measured)
    assert measured.metrics["longest_stall_ms"] == pytest.approx(1000)
    assert measured.metrics["undisturbed_ms"] == pytest.approx(100)
    assert measured.metrics["long_first_token_ms"] == pytest.approx(1550)


def test_a_stream_that_is_cut_off_in_its_stall_counts() -> None:
    stopped = Answer(0.0, [0.1, 0.2], 2)
    measured = sample("x", 0)
    LongPrompt(4000, 8192).measure(Played([stopped, Answer(0.3, [5.2], 4)]), 1, measured)
    assert measured.metrics["longest_stall_ms"] == pytest.approx(5000)


def test_a_stream_that_had_ended_says_nothing() -> None:
    ended = Answer(0.0, [0.1, 0.2], 400)
    with pytest.raises(Failed, match="had ended"):
        LongPrompt(4000, 8192).measure(Played([ended, Answer(0.3, [5.2], 4)]), 1, sample("x", 0))


# --- for people ---


def test_cells_and_pages() -> None:
    assert cell(None) == "-"
    assert cell(Range(2, 2, 2), 0) == "2"
    assert cell(Range(1234.5, 1.0, 2000.0)) == "1,234.5 (1.0 to 2,000.0)"
    page = markdown(Table("T", ("", "a|b"), [("x", "1")], ["note"]))
    assert page == "**T**\n\n|  | a\\|b |\n| :-- | --: |\n| x | 1 |\n\nnote\n"


def test_a_page_has_every_figure_in_one_table(tmp_path: Path) -> None:
    samples = [
        sample("bare", 0, tokens_per_s=100.0),
        sample("opta-lmx", 0, tokens_per_s=99.0, gateway_us_per_token=20.0),
        sample("opta-lmx", 0, "long prompt, 4 streams", longest_stall_ms=80.0),
        sample("opta-lmx", 0, "second turn", second_to_first=0.05),
        Sample("bare", "second turn", 0, error="it broke"),
    ]
    found = report.results({"cores": "2"}, {"model": "m"}, {"peer": "not here"}, samples)
    path = tmp_path / "run.json"
    report.write_json(found, path)
    again = report.read(path)
    assert msgspec.to_builtins(again) == msgspec.to_builtins(found)
    every, promises = report.overview(again)
    assert every.columns == ("", "bare", "opta-lmx")
    assert [row[0] for row in every.rows] == [
        "8 streams: tokens/s, all streams together",
        "8 streams: CPU of the gateway process alone, µs/token",
        "long prompt, 4 streams: longest stall of a stream, ms",
        "second turn: second/first",
    ]
    assert every.rows[0][1:] == ("100.0", "99.0")
    assert promises.notes == ["peer: not here", "bare, second turn: FAILED: it broke"]
    titles = [table.title for table in report.tables(again)]
    assert len(titles) == len(set(titles))

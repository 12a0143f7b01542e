"""Medians and ranges over the repetitions, and the ratios the project promises."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from benchmark.workloads import Sample, percentile


class Range(msgspec.Struct, frozen=True):
    """Median, least and greatest of a figure's repetitions."""

    median: float
    low: float
    high: float


class Verdict(msgspec.Struct, frozen=True):
    """A promise and what came of it; ``value`` None: not measured."""

    promise: str
    value: Range | None
    kept: bool | None


class Samples:
    """All samples of a run, by contender and workload."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def contenders(self) -> list[str]:
        return list(dict.fromkeys(sample.contender for sample in self._samples))

    def workloads(self) -> list[str]:
        return list(dict.fromkeys(sample.workload for sample in self._samples))

    def of(self, contender: str, workload: str) -> list[Sample]:
        """Those without an error, by repetition."""
        return [
            sample
            for sample in self._samples
            if sample.contender == contender and sample.workload == workload and not sample.error
        ]

    def error(self, contender: str, workload: str) -> str | None:
        for sample in self._samples:
            if sample.contender == contender and sample.workload == workload and sample.error:
                return sample.error
        return None

    def range(self, contender: str, workload: str, metric: str) -> Range | None:
        samples = self.of(contender, workload)
        return spread([s.metrics[metric] for s in samples if metric in s.metrics])

    def first_token_ms(self, contender: str, workload: str, percent: float) -> float | None:
        """Over the streams of all repetitions together."""
        pool = [ms for sample in self.of(contender, workload) for ms in sample.first_tokens_ms]
        return percentile(pool, percent) if pool else None

    def ratio(self, workload: str, metric: str, over: str, of: str = "opta-lmx") -> Range | None:
        """One contender's figure over another's, repetition by repetition."""
        others = {sample.repetition: sample for sample in self.of(over, workload)}
        ratios = [
            sample.metrics[metric] / others[sample.repetition].metrics[metric]
            for sample in self.of(of, workload)
            if sample.repetition in others
            and metric in sample.metrics
            and others[sample.repetition].metrics.get(metric)
        ]
        return spread(ratios)


def spread(values: Sequence[float]) -> Range | None:
    if not values:
        return None
    return Range(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class _Promise:
    text: str
    workload: str
    value: Callable[[Samples, str], Range | None]
    limit: float
    at_least: bool = False


def _over(metric: str, other: str) -> Callable[[Samples, str], Range | None]:
    return lambda samples, workload: samples.ratio(workload, metric, other)


def _own(metric: str) -> Callable[[Samples, str], Range | None]:
    return lambda samples, workload: samples.range("opta-lmx", workload, metric)


_TOKENS, _FIRST, _GATEWAY = "tokens_per_s", "first_token_p50_ms", "gateway_us_per_token"
_PEER = "llama-server"

PROMISES = (
    _Promise("tokens/s ≥ 0.97 of bare's", "1 stream", _over(_TOKENS, "bare"), 0.97, True),
    _Promise("tokens/s ≥ llama-server's", "4 streams", _over(_TOKENS, _PEER), 1.0, True),
    _Promise("tokens/s ≥ llama-server's", "8 streams", _over(_TOKENS, _PEER), 1.0, True),
    _Promise("first token p50 ≤ llama-server's", "1 stream", _over(_FIRST, _PEER), 1.0),
    _Promise("first token p50 ≤ llama-server's", "4 streams", _over(_FIRST, _PEER), 1.0),
    _Promise("first token p50 ≤ llama-server's", "8 streams", _over(_FIRST, _PEER), 1.0),
    _Promise("first token p50 ≤ llama-server's", "32 streams", _over(_FIRST, _PEER), 1.0),
    _Promise("gateway CPU ≤ 40 µs/token", "1 stream", _own(_GATEWAY), 40.0),
    _Promise("gateway CPU ≤ 25 µs/token", "8 streams", _own(_GATEWAY), 25.0),
    _Promise("gateway CPU ≤ 25 µs/token", "32 streams", _own(_GATEWAY), 25.0),
    _Promise("first token ≤ 0.1 of the first turn's", "second turn", _own("second_to_first"), 0.1),
    _Promise(
        "longest stall ≤ 1.5 times llama-server's",
        "long prompt",
        _over("longest_stall_ms", _PEER),
        1.5,
    ),
)


def verdicts(samples: Samples) -> list[Verdict]:
    found = []
    for promise in PROMISES:
        value = promise.value(samples, promise.workload)
        kept = None
        if value is not None:
            kept = (
                value.median >= promise.limit if promise.at_least else value.median <= promise.limit
            )
        found.append(Verdict(f"{promise.workload}: {promise.text}", value, kept))
    return found

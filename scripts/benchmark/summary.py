"""Medians and ranges over the repetitions, and the ratios the project promises."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from benchmark.workloads import Sample


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


def is_streams(workload: str) -> bool:
    """Whether a workload's name is that of ``Streams``."""
    return workload.endswith((" stream", " streams")) and "," not in workload


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


def judge(promise: str, value: Range | None, limit: float, *, at_least: bool = False) -> Verdict:
    """By the median. ``value`` None: not measured, and so neither kept nor broken."""
    kept = None
    if value is not None:
        kept = value.median >= limit if at_least else value.median <= limit
    return Verdict(promise, value, kept)


def _over(metric: str, other: str) -> Callable[[Samples, str], Range | None]:
    return lambda samples, workload: samples.ratio(workload, metric, other)


def _own(metric: str) -> Callable[[Samples, str], Range | None]:
    return lambda samples, workload: samples.range("opta-lmx", workload, metric)


_TOKENS, _FIRST, GATEWAY = "tokens_per_s", "first_token_p50_ms", "gateway_us_per_token"
_PEER, _SPLIT, _ROUTER = "llama-server", "llama-server split", "llama-server router"

#: µs of the gateway's CPU time per token.
LIMIT_ONE_STREAM, LIMIT_MANY_STREAMS = 40.0, 25.0


def _promises() -> Iterator[_Promise]:
    yield _Promise("tokens/s ≥ 0.97 of bare's", "1 stream", _over(_TOKENS, "bare"), 0.97, True)
    for workload in ("4 streams", "8 streams"):
        for peer in (_PEER, _SPLIT):
            yield _Promise(f"tokens/s ≥ {peer}'s", workload, _over(_TOKENS, peer), 1.0, True)
    for workload in ("1 stream", "4 streams", "8 streams", "32 streams"):
        for peer in (_PEER, _SPLIT):
            text = f"first token p50 ≤ {peer}'s"
            yield _Promise(text, workload, _over(_FIRST, peer), 1.0)
    for workload, limit in (
        ("1 stream", LIMIT_ONE_STREAM),
        ("8 streams", LIMIT_MANY_STREAMS),
        ("32 streams", LIMIT_MANY_STREAMS),
    ):
        yield _Promise(f"gateway CPU ≤ {limit:.0f} µs/token", workload, _own(GATEWAY), limit)
        yield _Promise("gateway CPU ≤ half the router's", workload, _over(GATEWAY, _ROUTER), 0.5)
    text = "first token ≤ 0.1 of the first turn's"
    yield _Promise(text, "second turn", _own("second_to_first"), 0.1)
    for workload in ("long prompt", "long prompt, 4 streams"):
        for peer in (_PEER, _SPLIT):
            text = f"longest stall ≤ 1.5 times {peer}'s"
            yield _Promise(text, workload, _over("longest_stall_ms", peer), 1.5)


def verdicts(samples: Samples) -> list[Verdict]:
    return [
        judge(
            f"{promise.workload}: {promise.text}",
            promise.value(samples, promise.workload),
            promise.limit,
            at_least=promise.at_least,
        )
        for promise in _promises()
    ]

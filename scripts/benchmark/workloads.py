"""What is asked of every contender, and the figures that come of its answers."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import msgspec

from benchmark.contenders import Instance
from benchmark.plan import Answer, Failed, Plan, Request
from benchmark.probes import cpu_s, peak_mb

#: Short words that most vocabularies have as one token, so that words ≈ tokens.
_TEXT = (
    "the sea was old and the man who kept light on that rock knew each ship by name when "
    "night came he went up with oil for lamp then read from book his father had left him "
    "about wind stars salt fish boats storms while waves broke below against stone walls"
)
_WORDS = _TEXT.split()

PROMPT_WORDS = 64
#: Pieces of the running answer before the long prompt is sent.
_READS_BEFORE = 20
_TIMEOUT_S = 900.0


class Sample(msgspec.Struct):
    """One measurement of one contender. ``first_tokens_ms`` has one entry per stream."""

    contender: str
    workload: str
    repetition: int
    metrics: dict[str, float] = msgspec.field(default_factory=dict)
    first_tokens_ms: list[float] = msgspec.field(default_factory=list)
    error: str = ""


class Workload(Protocol):
    """``name`` is how it is reported; ``sequences`` of ``context`` tokens must fit."""

    @property
    def name(self) -> str: ...

    @property
    def sequences(self) -> int: ...

    @property
    def context(self) -> int: ...

    def measure(self, instance: Instance, seed: int, sample: Sample) -> None:
        """Fill in the sample. No two seeds give the same prompt. Raises ``Failed``."""


@dataclass(frozen=True)
class Streams:
    """Some answers at once, from prompts of about 64 words; ``recorded``: which their clients
    could come back to."""

    streams: int
    tokens: int
    total_context: int
    recorded: bool = False

    @property
    def name(self) -> str:
        return f"{self.streams} stream{'s' if self.streams > 1 else ''}"

    @property
    def sequences(self) -> int:
        return self.streams

    @property
    def context(self) -> int:
        needed = 2 * PROMPT_WORDS + 128 + self.tokens
        return max(self.total_context // self.streams, -(-needed // 256) * 256)

    def measure(self, instance: Instance, seed: int, sample: Sample) -> None:
        requests = [
            Request(
                _body(_prompt(seed + i, PROMPT_WORDS), self.tokens, seed + i),
                headers={"X-Conversation-Id": f"bench-{seed + i}"} if self.recorded else {},
            )
            for i in range(self.streams)
        ]
        gateway, workers = cpu_s(instance.gateway), cpu_s(instance.workers)
        answers = instance.play(Plan(requests, timeout_s=_TIMEOUT_S))
        gateway = cpu_s(instance.gateway) - gateway
        workers = cpu_s(instance.workers) - workers
        _check_whole(answers)
        tokens = sum(answer.tokens for answer in answers)
        began = min(answer.sent for answer in answers)
        ended = max(answer.pieces[-1] for answer in answers)
        gaps = [gap for answer in answers for gap in _gaps(answer.pieces)]
        sample.first_tokens_ms = [1e3 * (a.pieces[0] - a.sent) for a in answers]
        metrics = sample.metrics
        metrics["tokens_per_s"] = tokens / (ended - began)
        metrics["decode_tokens_per_s"] = statistics.median(
            (a.tokens - 1) / max(a.pieces[-1] - a.pieces[0], 1e-9) for a in answers
        )
        metrics["first_token_p50_ms"] = percentile(sample.first_tokens_ms, 50)
        metrics["first_token_p95_ms"] = percentile(sample.first_tokens_ms, 95)
        metrics["inter_token_p50_ms"] = 1e3 * percentile(gaps, 50)
        metrics["inter_token_p99_ms"] = 1e3 * percentile(gaps, 99)
        metrics["cpu_us_per_token"] = 1e6 * (gateway + workers) / tokens
        if instance.gateway:
            metrics["gateway_us_per_token"] = 1e6 * gateway / tokens
        metrics["tokens_per_piece"] = tokens / sum(len(a.pieces) for a in answers)
        _add_prompt_tokens(metrics, "prompt_tokens", answers[0])
        metrics["peak_mb"] = peak_mb([*instance.gateway, *instance.workers])


@dataclass(frozen=True)
class Turns:
    """A chat that is gone on with after a first prompt of so many words."""

    words: int
    context: int
    tokens: int = 32
    name: str = "second turn"
    sequences: int = 2

    def measure(self, instance: Instance, seed: int, sample: Sample) -> None:
        messages = _prompt(seed, self.words)
        first = self._ask(instance, messages, seed)
        messages += [
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "And what did he do then?"},
        ]
        second = self._ask(instance, messages, seed + 1)
        metrics = sample.metrics
        metrics["first_turn_ms"] = 1e3 * (first.pieces[0] - first.sent)
        metrics["second_turn_ms"] = 1e3 * (second.pieces[0] - second.sent)
        metrics["second_to_first"] = metrics["second_turn_ms"] / metrics["first_turn_ms"]
        _add_prompt_tokens(metrics, "prompt_tokens", first)
        metrics["peak_mb"] = peak_mb([*instance.gateway, *instance.workers])

    def _ask(self, instance: Instance, messages: list[dict[str, str]], seed: int) -> Answer:
        body = _body(messages, self.tokens, seed)
        plan = Plan([Request(body)], timeout_s=_TIMEOUT_S, want_text=True)
        answers = instance.play(plan)
        _check_whole(answers)
        return answers[0]


@dataclass(frozen=True)
class LongPrompt:
    """Some streams run; a prompt of so many words arrives: how long do the streams stall?"""

    words: int
    context: int
    streams: int = 1
    tokens: int = 400

    @property
    def name(self) -> str:
        return "long prompt" if self.streams == 1 else f"long prompt, {self.streams} streams"

    @property
    def sequences(self) -> int:
        return self.streams + 1

    def measure(self, instance: Instance, seed: int, sample: Sample) -> None:
        running = [
            Request(_body(_prompt(seed + i, PROMPT_WORDS), self.tokens, seed + i))
            for i in range(self.streams)
        ]
        seed += self.streams
        long = Request(_body(_prompt(seed, self.words), 4, seed), _READS_BEFORE)
        plan = Plan([*running, long], timeout_s=_TIMEOUT_S, until=self.streams)
        *streams, arrival = instance.play(plan)
        _check_whole([*streams, arrival])
        arrived, answered = arrival.sent, arrival.pieces[0]
        during, before = [], []
        for stream in streams:
            pairs = list(pairwise(stream.pieces))
            during += [b - a for a, b in pairs if b > arrived and a < answered]
            before += [b - a for a, b in pairs if b <= arrived]
            # It may be held up until the long prompt is through, and cut off then.
            if stream.pieces[-1] < answered and stream.tokens < self.tokens:
                during.append(answered - stream.pieces[-1])
        if not during or not before:
            raise Failed("the running answers had ended when the long prompt was read")
        metrics = sample.metrics
        metrics["longest_stall_ms"] = 1e3 * max(during)
        metrics["undisturbed_ms"] = 1e3 * statistics.median(before)
        metrics["long_first_token_ms"] = 1e3 * (answered - arrived)
        _add_prompt_tokens(metrics, "prompt_tokens", arrival)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _prompt(seed: int, words: int) -> list[dict[str, str]]:
    """Messages that differ from those of any other seed from the first words on."""
    chance = random.Random(seed)
    text = " ".join(chance.choice(_WORDS) for _ in range(words))
    return [
        {"role": "system", "content": f"{chance.getrandbits(64):x}. You are a storyteller."},
        {"role": "user", "content": f"{text}\nGo on with this story, and make it long."},
    ]


def _body(messages: list[dict[str, str]], tokens: int, seed: int) -> dict[str, Any]:
    """The same sampling for all; ``repeat_penalty`` is what some call it."""
    return {
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": tokens,
        "temperature": 0.7,
        "top_p": 0.95,
        "top_k": 40,
        "min_p": 0.05,
        "repeat_penalty": 1.0,
        "seed": seed,
    }


def _gaps(times: Sequence[float]) -> list[float]:
    return [b - a for a, b in pairwise(times)]


def _check_whole(answers: Sequence[Answer]) -> None:
    for answer in answers:
        if not answer.pieces:
            raise Failed("an answer without any text")


def _add_prompt_tokens(metrics: dict[str, float], name: str, answer: Answer) -> None:
    if answer.prompt_tokens is not None:
        metrics[name] = answer.prompt_tokens

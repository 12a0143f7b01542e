"""Runs every workload on every contender, in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmark.children import Player, running
from benchmark.contenders import Contender, Instance, Setup
from benchmark.workloads import Sample, Streams, Workload

#: Seeds of one repetition; more than a workload has requests.
_SEEDS = 1000

Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """What is to be measured."""

    model: Path
    threads: int
    context: int
    repetitions: int
    contenders: Sequence[Contender]
    workloads: Sequence[Workload]


def compare(run: Run, samples: list[Sample], say: Say) -> None:
    """Add the samples as they are made; one of a contender that failed has an error in it."""
    for workload in run.workloads:
        _measure_all(run, workload, samples, say)


def _measure_all(run: Run, workload: Workload, samples: list[Sample], say: Say) -> None:
    """One workload. All contenders are up meanwhile, and idle when it is not their turn."""
    setup = Setup(run.model, run.threads, workload.sequences, workload.context, run.context)

    def attempt(sample: Sample, act: Callable[[], None]) -> bool:
        # Whatever is wrong with one of them is a result, not the end of the run.
        try:
            act()
        except Exception as error:
            known = str(error) or repr(error)
            sample.error = f"{type(error).__name__}: {known}".removeprefix("Failed: ")
            samples.append(sample)
            say(f"{workload.name}: {sample.contender} failed: {sample.error}")
            return False
        return True

    with ExitStack() as stack:
        client = Player("client")
        stack.enter_context(running(client.child))
        instances: list[tuple[Contender, Instance]] = []
        for contender in run.contenders:
            say(f"{workload.name}: starting {contender.name}")

            def start(contender: Contender = contender) -> None:
                instance = stack.enter_context(contender.run(setup, client))
                _warm_up(instance)
                instances.append((contender, instance))

            attempt(Sample(contender.name, workload.name, 0), start)
        for repetition in range(run.repetitions):
            turn = repetition % max(1, len(instances))
            # Nobody always comes after the same one.
            for contender, instance in instances[turn:] + instances[:turn]:
                say(f"{workload.name}: {contender.name}, {repetition + 1} of {run.repetitions}")
                sample = Sample(contender.name, workload.name, repetition)

                def measure(instance: Instance = instance, sample: Sample = sample) -> None:
                    workload.measure(instance, (sample.repetition + 1) * _SEEDS, sample)

                if attempt(sample, measure):
                    samples.append(sample)


def _warm_up(instance: Instance) -> None:
    """The first answer of a process pays for what is made on first use."""
    Streams(1, tokens=8, total_context=0).measure(instance, 0, Sample("", "", 0))

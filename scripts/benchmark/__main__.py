"""``scripts/bench``: the command line."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from demo_model import demo_model
from rich.console import Console

from benchmark import compare, machine, plot, relay, report, scale, tables
from benchmark.contenders import Bare, Contender, OptaLmx
from benchmark.peers import LlamaCppPython, LlamaRouter, LlamaServer, LlamaSplit, MlxServer
from benchmark.plan import Failed
from benchmark.summary import Samples
from benchmark.workloads import LongPrompt, Sample, Streams, Turns, Workload

_out = Console(width=None if sys.stdout.isatty() else 120)
_err = Console(stderr=True)

_STOPS = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    # Children are stopped on the way out, whichever way that is.
    for number in _STOPS:
        signal.signal(number, _interrupted)
    arguments = _parse()
    try:
        if arguments.replay:
            _publish(report.read(arguments.replay), arguments)
        elif arguments.gateway:
            _gateway(arguments)
        elif arguments.scale:
            _scale(arguments)
        else:
            _compare(arguments)
    except Failed as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit("bench: interrupted; everything it had started is stopped")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Opta-LMX beside the bare backend and other servers, in turns, in one run.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="two or three minutes: less of everything")
    add("--model", type=Path, help="GGUF file or MLX folder (default: the demo model)")
    add("--llama-server", type=_program, metavar="PATH", help="llama.cpp's server, to compare with")
    add(
        "--peers-python",
        type=_program,
        metavar="PATH",
        default=Path(sys.executable),
        help="a Python with llama-cpp-python[server] or mlx-lm (default: ours)",
    )
    add("--only", type=_words, metavar="A,B", help="these contenders only")
    add("--workloads", type=_words, metavar="A,B", help="of: streams, turns, long (default: all)")
    add("--streams", type=_numbers, metavar="N,N", help="(default: 1,4,8,32)")
    add("--repetitions", type=_positive, help="(default: 5)")
    add("--tokens", type=_positive, help="per answer (default: 128)")
    add("--threads", type=_positive, default=_cores(), help="(default: all cores)")
    add("--context", type=_positive, default=8192, help="tokens in all (default: 8192)")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--markdown", type=Path, metavar="FILE", help="write the tables there, for a page")
    add("--plot", type=Path, metavar="FILE", help="write a chart there, as SVG")
    add("--replay", type=Path, metavar="FILE", help="show a --json file again, measure nothing")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--gateway", action="store_true", help="the relay alone, simulated worker")
    modes.add_argument("--scale", action="store_true", help="many idle workers on one supervisor")
    add("--recorded", action="store_true", help="with --gateway: also streams to come back to")
    add("--workers", type=_numbers, default=[1, 10, 25, 50], metavar="N,N", help="with --scale")
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.streams = arguments.streams or ([1, 8] if quick else [1, 4, 8, 32])
    arguments.repetitions = arguments.repetitions or (2 if quick else 5)
    arguments.tokens = arguments.tokens or (48 if quick else 128)
    return arguments


def _compare(arguments: argparse.Namespace) -> None:
    model = (arguments.model or demo_model()).absolute()
    if not model.exists():
        raise Failed(f"{model} does not exist")
    contenders, missing = _contenders(arguments, model)
    run = compare.Run(
        model=model,
        threads=arguments.threads,
        context=arguments.context,
        repetitions=arguments.repetitions,
        contenders=contenders,
        workloads=_workloads(arguments),
    )
    settings = {
        "model": model.name,
        "threads": str(run.threads),
        "repetitions": f"{run.repetitions}, in turns",
        "tokens per answer": str(arguments.tokens),
        "context": f"{arguments.context} tokens",
    }
    described = machine.describe()
    samples: list[Sample] = []
    try:
        compare.compare(run, samples, _say)
    finally:
        # Also what was measured before an interruption is worth seeing.
        order = [contender.name for contender in contenders]
        samples.sort(key=lambda sample: order.index(sample.contender))
        _publish(report.results(described, settings, missing, samples), arguments)


def _contenders(
    arguments: argparse.Namespace, model: Path
) -> tuple[list[Contender], dict[str, str]]:
    """Those that read the model's format; the missing ones with the reason."""
    known: list[Contender] = [Bare(), OptaLmx()]
    if model.is_dir():
        known.append(MlxServer(arguments.peers_python, model))
    else:
        known += [
            LlamaServer(arguments.llama_server),
            LlamaSplit(arguments.llama_server),
            LlamaRouter(arguments.llama_server),
            LlamaCppPython(arguments.peers_python, model),
        ]
    names = [contender.name for contender in known]
    if arguments.only and (unknown := set(arguments.only) - set(names)):
        raise Failed(f"--only: no {', '.join(sorted(unknown))} here; there are {', '.join(names)}")
    present, missing = [], {}
    for contender in known:
        if arguments.only and contender.name not in arguments.only:
            continue
        if reason := contender.missing():
            missing[contender.name] = reason
        else:
            present.append(contender)
    return present, missing


def _workloads(arguments: argparse.Namespace) -> list[Workload]:
    chosen = arguments.workloads or ["streams", "turns", "long"]
    if unknown := set(chosen) - {"streams", "turns", "long"}:
        raise Failed(f"--workloads: there is no {', '.join(sorted(unknown))}")
    workloads: list[Workload] = []
    if "streams" in chosen:
        workloads += [
            Streams(number, arguments.tokens, arguments.context) for number in arguments.streams
        ]
    if "turns" in chosen:
        workloads.append(Turns(1000 if arguments.quick else 2000, arguments.context))
    if "long" in chosen:
        words = 2000 if arguments.quick else 4000
        workloads += [LongPrompt(words, arguments.context, streams) for streams in (1, 4)]
    return workloads


def _publish(found: report.Results, arguments: argparse.Namespace) -> None:
    _write(report.tables(found), report.overview(found), found, arguments)
    if arguments.plot:
        told = (found.settings["model"], found.machine["processor"], found.machine["date"])
        plot.write(Samples(found.samples), " · ".join(told), arguments.plot)


def _gateway(arguments: argparse.Namespace) -> None:
    tokens = 2_000 if arguments.quick else 10_000
    samples = relay.measure(
        *(arguments.repetitions, arguments.streams, tokens, _say), recorded=arguments.recorded
    )
    content = {
        "machine": machine.describe(),
        "samples": samples,
        "verdicts": relay.verdicts(samples),
    }
    found = relay.tables(samples)
    _write(found, found, content, arguments)


def _scale(arguments: argparse.Namespace) -> None:
    model = (arguments.model or demo_model()).absolute()
    described = machine.describe()
    steps = scale.measure(sorted(arguments.workers), arguments.repetitions, _say)
    shared = scale.measure_shared(model, _say)
    content = scale.Scale(described, steps, shared, scale.verdicts(steps))
    found = scale.tables(content)
    _write(found, found, content, arguments)


def _write(
    shown: Sequence[tables.Table],
    page: Sequence[tables.Table],
    content: object,
    arguments: argparse.Namespace,
) -> None:
    tables.show(shown, _out)
    if arguments.json:
        report.write_json(content, arguments.json)
    if arguments.markdown:
        tables.write_markdown(page, arguments.markdown)


def _say(text: str) -> None:
    _err.print(text, markup=False, highlight=False)


def _interrupted(_signal: int, _frame: object) -> NoReturn:
    # A second one would cut the stopping of the children short.
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _program(text: str) -> Path:
    """A path, or a name on PATH. The link stays: a venv's Python is one."""
    return Path(shutil.which(text) or text).absolute()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _words(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    main()

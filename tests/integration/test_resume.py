"""An answer survives the death of its worker: what the client gets is what it would have got.

``RESUME_POSITIONS=all`` kills at every token instead of at some.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.interruption import Interruptible, serve_interruptible
from tests.support.server import write_script

LENGTH = 200
HERMES = "{% if tools %}<tool_call>{{ tool_call.name }}{% endif %}<think>{{ c.split('</think>') }}"
TOOL = {
    "type": "function",
    "function": {"name": "save", "parameters": {"type": "object", "properties": {}}},
}
#: Thinks, talks, and calls a tool: 199 tokens and the end.
SCRIPT = [
    *("<think>", *(f"t{n} " for n in range(40)), "</think>"),
    *(f"{n} " for n in range(63)),
    *(
        "<tool_call>",
        '{"name": "save", ',
        '"arguments": {"text": "',
        *(f"a{n} " for n in range(60)),
    ),
    *('é"', "}}", "</tool_call>"),
    *("<tool_call>", '{"name": "sa', 've", "arguments": {"n": [', *(f"{n}, " for n in range(22))),
    *("0]", "}}", "</tool_call>"),
]

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0, "logprobs": True, "top_logprobs": 2},
    {"temperature": 1.0, "seed": 11, "top_p": 0.95, "frequency_penalty": 0.2, "logprobs": True},
]
MODELS = ("simulated", "tiny-gguf", "tiny-mlx")


def positions() -> list[Any]:
    """Where to kill which model, with how many streams at once."""
    every = os.environ.get("RESUME_POSITIONS") == "all"
    cases = []
    for model in MODELS:
        step = 1 if every else {"simulated": 18, "tiny-gguf": 18, "tiny-mlx": 50}[model]
        for at in sorted({0, 1, *range(2, LENGTH, step), LENGTH - 1}):
            for streams in (1, 4):
                if every or (at % 4 == 2) == (streams == 4):
                    cases.append(pytest.param(model, at, streams, id=f"{model}-{at}-{streams}"))
    return cases


@pytest.fixture(scope="module")
def rig(
    tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path, tiny_mlx: Path
) -> Iterator[Interruptible]:
    folder = tmp_path_factory.mktemp("resume")
    models = folder / "models"
    models.mkdir()
    write_script(models, "simulated", tokens=SCRIPT, chat_template=HERMES)
    with serve_interruptible(
        folder,
        *("--models-dir", str(models), f"--model=simulated={models / 'simulated.sim.json'}"),
        *(f"--model=tiny-gguf={tiny_gguf}", f"--model=tiny-mlx={tiny_mlx}"),
    ) as rig:
        for model in MODELS:
            rig.server.await_tracked(model)
            rig.server.await_state(model, "routable")
        yield rig


def bodies(model: str, streams: int, first: int) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "messages": [{"role": "user", "content": f"Tell me about {'abcd'[number]}"}],
            "max_tokens": LENGTH,
            **({"tools": [TOOL]} if model == "simulated" else {"ignore_eos": True}),
            **SAMPLINGS[(first + number) % len(SAMPLINGS)],
        }
        for number in range(streams)
    ]


@pytest.fixture(scope="module")
def undisturbed(rig: Interruptible) -> dict[tuple[str, int, int], list[tuple[object, ...]]]:
    """What answers are without a crash; filled as they are asked for."""
    return {}


@pytest.mark.parametrize(("model", "at", "streams"), positions())
def test_whichever_token_the_worker_dies_at_the_answers_are_the_same(
    rig: Interruptible,
    undisturbed: dict[tuple[str, int, int], list[tuple[object, ...]]],
    model: str,
    at: int,
    streams: int,
) -> None:
    first = at % 2
    asked = bodies(model, streams, first)
    key = (model, streams, first)
    if key not in undisturbed:
        whole = rig.together(model, asked)
        assert not any(each.resumes for each in whole)
        undisturbed[key] = [each.content for each in whole]
    rig.arm(at)
    answers = rig.together(model, asked)
    assert not rig.armed
    assert [each.content for each in answers] == undisturbed[key]
    [usage] = answers[0].usage
    assert (answers[0].roles, answers[0].done, usage["completion_tokens"]) == (1, 1, LENGTH)
    assert answers[0].resumes == (1 if at else 0)
    rig.server.await_state(model, "routable")

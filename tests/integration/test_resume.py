"""An answer survives the death of its worker: what the client gets is what it would have got.

``RESUME_POSITIONS=all`` kills at every token instead of at some.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.interruption import Answer, Interruptible, gist, serve_interruptible, stream
from tests.support.server import NO_RESUME, Server, write_script

LENGTH = 200
HERMES = "{% if tools %}<tool_call>{{ tool_call.name }}{% endif %}<think>{{ c.split('</think>') }}"
SAVE: dict[str, Any] = {"name": "save", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": SAVE}
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
        step = 1 if every else {"simulated": 27, "tiny-gguf": 27, "tiny-mlx": 99}[model]
        ends = {0, 1, LENGTH - 1} if every or step < 50 else {LENGTH - 1}
        for at in sorted({*range(2, LENGTH, step), *ends}):
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
        OPTA_LMX_DECODE_STALL_S="3",
        OPTA_LMX_BEAT_INTERVAL_S="0.2",
        OPTA_LMX_SSE_KEEPALIVE_S="0.2",
    ) as rig:
        for model in MODELS:
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


ASK = [{"role": "user", "content": "Go"}]
MESSAGES_TOOL = {"name": "save", "input_schema": {"type": "object", "properties": {}}}
RESPONSES_TOOL = {"type": "function", **SAVE, "strict": False}
APIS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": ASK, "tools": [TOOL]},
    "/v1/completions": {"prompt": "Go", "echo": True},
    "/v1/responses": {"input": "Go", "tools": [RESPONSES_TOOL]},
    "/v1/messages": {"messages": ASK, "tools": [MESSAGES_TOOL], "max_tokens": 1000},
}


@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize("streaming", [True, False])
def test_every_api_says_the_same_as_without_a_crash(
    rig: Interruptible, path: str, streaming: bool
) -> None:
    http = rig.server.http
    body = {"model": "simulated", "stream": streaming, **APIS[path]}
    undisturbed = http.post(path, json=body)
    # In the midst of the arguments of a call.
    rig.arm(140)
    answer = http.post(path, json=body)
    assert not rig.armed
    assert (answer.status_code, gist(answer.text)) == (200, gist(undisturbed.text))
    assert ("\n: resumed 1\n" in answer.text) is streaming
    assert answer.headers.get("x-resumed") == (None if streaming else "1")
    numbers = [int(found) for found in re.findall(r'"sequence_number":(\d+)', answer.text)]
    assert numbers == list(range(len(numbers)))


def test_several_answers_of_a_request_all_go_on(rig: Interruptible) -> None:
    body = {"model": "tiny-gguf", "messages": ASK, "n": 3, "seed": 5, "max_tokens": 60}
    body |= {"ignore_eos": True, "logprobs": True}
    undisturbed = rig.server.http.post("/v1/chat/completions", json=body)
    rig.arm(30)
    answer = rig.server.http.post("/v1/chat/completions", json=body)
    assert gist(answer.text) == gist(undisturbed.text)
    assert len(answer.json()["choices"]) == 3
    assert answer.headers["x-resumed"] == "1"


@pytest.mark.parametrize(("model", "at"), [("tiny-gguf", 1), ("tiny-gguf", 15), ("tiny-mlx", 7)])
def test_a_constrained_answer_stays_within_its_schema(
    rig: Interruptible, model: str, at: int
) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 40, "maxLength": 60},
            "age": {"type": "integer", "minimum": 1, "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    body = {
        **{"model": model, "messages": ASK, "seed": 3, "max_tokens": 300},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": schema, "strict": True},
        },
    }
    undisturbed = stream(rig.server, body)
    rig.arm(at)
    answer = stream(rig.server, body)
    assert not rig.armed
    assert (answer.content, answer.resumes) == (undisturbed.content, 1)
    assert answer.finish == ["stop"]
    assert set(json.loads(answer.text)) == {"name", "age"}


COUNTING = [f"{n} " for n in range(100)]


def faulty(server: Server, name: str, *faults: dict[str, Any], **script: Any) -> None:
    """Load a model that counts to a hundred, with faults that a prompt of "die" sets off."""
    folder = Path(server.model("simulated")["path"]).parent
    armed = [{"at": "token", "prompt_contains": "die", **fault} for fault in faults]
    write_script(folder, name, **{"tokens": COUNTING, "faults": armed, **script})
    assert server.load(name).status_code == 200


def dying(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "die"}]}


def ended(answer: Answer, code: str) -> int:
    """How many tokens of the count there were before the one error, which says so itself.

    What a worker had not sent yet when it died is not among them.
    """
    [error] = answer.errors
    assert error["code"] == code
    assert answer.text == "".join(COUNTING[: error["tokens_sent"]])
    return int(error["tokens_sent"])


def test_a_hang_is_survived_as_well_and_its_client_hears_that_it_is_alive(
    rig: Interruptible,
) -> None:
    faulty(rig.server, "hangs", {"n": 20, "kind": "hang", "times": 1})
    answer = stream(rig.server, dying("hangs"))
    assert (answer.text, answer.resumes, answer.errors) == ("".join(COUNTING), 1, [])
    assert answer.comments.count(": keep-alive") >= 3
    assert answer.comments[-1] == ": resumed 1"
    assert rig.server.model("hangs")["generation"] == 2


def test_an_answer_goes_on_twice_at_most(rig: Interruptible) -> None:
    kills = [{"n": n, "kind": "kill", "times": 1} for n in (20, 40, 60)]
    faulty(rig.server, "twice", *kills[:2])
    answer = stream(rig.server, dying("twice"))
    assert (answer.text, answer.resumes, answer.errors) == ("".join(COUNTING), 2, [])
    faulty(rig.server, "thrice", *kills)
    answer = stream(rig.server, dying("thrice"))
    assert (answer.done, answer.finish) == (0, [])
    assert ended(answer, "model_crashed") in range(41, 61)
    metrics = rig.server.http.get("/metrics").text
    resumed = "opta_lmx_resumed_answers_total"
    assert f'{resumed}{{model="twice",outcome="completed"}} 1.0' in metrics
    assert f'{resumed}{{model="thrice",outcome="failed"}} 1.0' in metrics


def test_who_does_not_want_to_go_on_gets_the_error(rig: Interruptible) -> None:
    faulty(rig.server, "never", {"n": 20, "kind": "kill", "times": 1})
    answer = stream(rig.server, dying("never"), NO_RESUME)
    assert answer.done == 0
    assert ended(answer, "model_crashed") <= 20


def test_a_deadline_goes_on_while_the_model_is_down(rig: Interruptible) -> None:
    faulty(rig.server, "late", {"n": 20, "kind": "kill", "times": 1}, load_delay_s=1.2)
    answer = stream(rig.server, dying("late"), {"X-Request-Timeout": "0.6"})
    assert ended(answer, "request_timeout") <= 20
    rig.server.await_state("late", "routable", generation=2)


def test_a_quarantine_ends_what_would_have_gone_on(tmp_path: Path) -> None:
    kills = [{"n": n, "kind": "kill", "times": 1} for n in (20, 40)]
    write_script(tmp_path, "simulated")
    with serve_interruptible(
        tmp_path, "--models-dir", str(tmp_path), OPTA_LMX_FAILURE_THRESHOLD="2"
    ) as rig:
        assert rig.server.load("simulated").status_code == 200
        faulty(rig.server, "fragile", *kills)
        answer = stream(rig.server, dying("fragile"))
        assert ended(answer, "model_unstable") in range(21, 41)
        assert rig.server.model("fragile")["readiness"]["state"] == "quarantined"

"""Text that kills llama.cpp: what can be refused is, the rest costs the others a pause."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from tests.support.odd_tokenizers import add_cut_unigram, add_sentencepiece
from tests.support.server import Server, serve
from tests.support.tiny_gguf import add_tokenizer, write_tiny_gguf

pytest.importorskip("llama_cpp")

SETTINGS = {
    "OPTA_LMX_RESTART_DELAY_CAP_S": "0.05",
    "OPTA_LMX_FAILURE_THRESHOLD": "10",
    # Who comes while the model is restarted waits, as some of those that are sent at once may.
    "OPTA_LMX_LOAD_ON_DEMAND": "true",
}
#: How a model splits text, of the many whose way llama.cpp leaves to ``std::regex``: at
#: about 26,000 characters in one go that would overflow a stack of 8 MiB.
RECURSING = ("gpt-4o", "deepseek-coder")


def ask(server: Server, content: str, model: str = "unigram") -> dict[str, Any]:
    answer = server.chat(model, content, max_tokens=300, temperature=0)
    return {"status": answer.status_code, **answer.json()}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("odd")
    write_tiny_gguf(folder / "unigram.gguf", tokenizer=add_cut_unigram)
    write_tiny_gguf(folder / "pieces.gguf", tokenizer=add_sentencepiece)
    for pre in RECURSING:
        write_tiny_gguf(folder / f"{pre}.gguf", tokenizer=partial(add_tokenizer, pre=pre))
    names = ("unigram", "pieces", *RECURSING)
    return ["--max-sequences=8", *(f"--model={name}={folder / name}.gguf" for name in names)]


@pytest.fixture(scope="module")
def server(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("poison") / "home", *arguments, **SETTINGS) as running:
        for argument in arguments[1:]:
            name = argument.split("=")[1]
            running.await_state(name, "routable")
        yield running


def test_seven_finish_on_llama_cpp_and_one_is_convicted(server: Server) -> None:
    good = [f"Say hello to number {number}." for number in range(7)]
    contents = [*good[:3], "Say h\u00e9llo.", *good[3:]]
    with ThreadPoolExecutor(8) as pool:
        answers = dict(
            zip(contents, pool.map(lambda content: ask(server, content), contents), strict=True)
        )
    bad = answers.pop("Say h\u00e9llo.")
    for answer in answers.values():
        assert answer["status"] == 200, answer
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 300
    assert (bad["status"], bad["error"]["code"]) == (422, "request_poisoned")
    newest, first = server.http.get("/admin/incidents").json()["incidents"]
    assert (first["convicted"], newest["id"]) == (None, bad["error"]["incident_id"])
    details = server.http.get(f"/admin/incidents/{newest['id']}").json()
    assert details["in_flight"] == [details["convicted"]]
    assert "XCDA" in json.dumps(details)  # the library's own words
    # Refused at the door, without a crash.
    again = ask(server, "Say h\u00e9llo.")
    assert (again["status"], again["error"]["code"]) == (422, "request_poisoned")
    view = server.model("unigram")
    assert (view["generation"], view["readiness"]["crash_count"]) == (3, 2)
    assert ask(server, "another")["status"] == 200


def test_a_character_that_no_token_is_for_is_refused_by_name(server: Server) -> None:
    answer = ask(server, "Say hello in Chinese: \u4f60", "pieces")
    assert (answer["status"], answer["error"]["param"]) == (400, "messages")
    assert "no token for '\u4f60'" in answer["error"]["message"]
    assert ask(server, "Say hello.", "pieces")["status"] == 200
    assert server.model("pieces")["generation"] == 1


@pytest.mark.parametrize("model", RECURSING)
def test_what_has_no_break_is_tokenised_on_a_stack_that_it_fits(server: Server, model: str) -> None:
    for character in "a.\u4f60":
        # In one go, as the model's tokens have it.
        inquiry = {"model": model, "content": character * 100_000, "add_special": False}
        answer = server.http.post("/tokenize", json=inquiry)
        assert answer.status_code == 200, answer.text
    assert ask(server, "a" * 100_000, model)["error"]["code"] == "context_length_exceeded"
    assert server.model(model)["generation"] == 1


def test_what_was_only_asked_about_is_convicted_as_well(server: Server) -> None:
    before = server.await_state("unigram", "routable")["generation"]
    body = {"model": "unigram", "content": "h\u00e9 only counted"}
    first = server.http.post("/tokenize", json=body)
    assert (first.status_code, first.json()["error"]["code"]) == (422, "request_poisoned")
    assert server.await_state("unigram", "routable")["generation"] == before + 2
    again = server.http.post("/tokenize", json=body)
    assert again.status_code == 422
    assert again.json()["error"]["incident_id"] == first.json()["error"]["incident_id"]
    assert server.model("unigram")["generation"] == before + 2

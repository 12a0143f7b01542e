"""Whatever is sent, no answer is a 5xx: schemathesis over the whole of /openapi.json.

``FUZZ_EXAMPLES`` sets how many inputs each operation gets, valid and invalid ones
counted apart; the figures are printed (``pytest -s``).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from enum import Enum, auto
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from tests.support.server import Server, serve, write_script

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "8"))
TEMPLATE = "{% if tools %}<tool_call>{{ tool_call.name }}{% endif %}"

#: Fields that are refused, or nearly always wrong with what a schema knows of them.
REFUSED = (
    *("previous_response_id", "background", "conversation", "include", "text"),
    *("functions", "function_call", "modalities", "audio", "prediction", "verbosity"),
    *("web_search_options", "suffix", "best_of", "tools", "tool_choice", "response_format"),
    *("top_logprobs", "chat_template_kwargs"),
)


class Aim(Enum):
    ANYWHERE = auto()
    MODEL = auto()
    ANSWER = auto()


SETTINGS = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    write_script(folder, "m", tokens=["Hi", "!"], chat_template=TEMPLATE, context_length=512)
    # There is no hub here, which any id of the hub's kind would be told: a 502.
    offline = {"OPTA_LMX_DOWNLOADS_ENABLED": "false"}
    with serve(tmp_path_factory.mktemp("home"), "--models-dir", str(folder), **offline) as running:
        assert running.load("m").status_code == 200
        yield running


def test_no_input_is_a_server_error(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: Counter[tuple[str, int]] = Counter()
    failures: list[str] = []
    with requests.Session() as session:
        for found in schema.get_all_operations():
            assert isinstance(found, Ok)
            operation = found.ok()
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                try:
                    cases = operation.as_strategy(generation_mode=mode)
                    fuzz(cases, session, statuses, failures)
                except hypothesis.errors.Unsatisfiable:
                    # An operation without parameters has no invalid input.
                    continue
    seen: Counter[int] = Counter()
    for (_, status), count in statuses.items():
        seen[status] += count
    print(f"\n{seen.total()} inputs: {dict(sorted(seen.items()))}")
    print("answered:", {path: count for (path, status), count in statuses.items() if status == 200})
    assert failures == []
    # Valid ones have come as far as the model, invalid ones not.
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert statuses[path, 200] > 0
        assert statuses[path, 400] > 0
    # Whatever it was asked, the server and its model are as they were.
    assert server.chat("m").status_code == 200


def fuzz(
    cases: Any,
    session: requests.Session,
    statuses: Counter[tuple[str, int]],
    failures: list[str],
) -> None:
    @SETTINGS
    @hypothesis.given(case=cases, aim=hypothesis.strategies.sampled_from(Aim))
    def send(case: Any, aim: Aim) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            take_aim(case.body, aim)
        if case.path == "/admin/events":
            # Else it never ends.
            case.query = {**(case.query or {}), "follow": "false"}
        answer = case.call(session=session, timeout=30)
        statuses[case.path, answer.status_code] += 1
        if answer.status_code >= 500:
            failures.append(f"{answer.status_code} {case.method} {case.path} {case.body!r}")

    send()


def take_aim(body: dict[str, Any], aim: Aim) -> None:
    """Let a request come further: nearly all would end at a model that nobody knows, or at
    a field that is known and refused whatever is in it."""
    if aim is Aim.ANYWHERE:
        return
    body["model"] = "m"
    if aim is Aim.MODEL:
        return
    for name in REFUSED:
        body.pop(name, None)
    if "input" in body:
        body.pop("prompt", None)
    for name in ("prompt", "input"):
        if name in body:
            body[name] = "Hi"
    if "messages" in body:
        body["messages"] = [{"role": "user", "content": "Hi"}]

"""Memory that always fits: plans, evictions and refusals, with real processes."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from supervisor import modelfiles
from supervisor.memory_plan import Terms, plan_memory
from tests.support.memory_cgroup import NotAllowed, memory_cgroup
from tests.support.server import Server, polls, serve, text_of, write_script
from tests.support.tiny_gguf import write_tiny_gguf

LONG = [f" {number}" for number in range(100)]
#: Of an endless context; one for each of its tokens would take a gigabyte.
ENDLESS = 1_000_000


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("a", "b", "c"):
        shutil.copy(tiny_gguf, folder / f"{name}.gguf")
    write_tiny_gguf(folder / "endless.gguf", context_length=ENDLESS)
    write_script(folder, "talker", tokens=LONG, repeat=True, step_delay_s=0.01)
    return folder


@pytest.fixture(scope="module")
def budget(tiny_gguf: Path) -> int:
    """Memory for two of the tiny models, and not for three."""
    files = modelfiles.inspect(tiny_gguf)
    return int(2.1 * plan_memory(files, Terms("llama", None, 4)).required)


@pytest.fixture
def server(tmp_path: Path, models_dir: Path, budget: int) -> Iterator[Server]:
    settings = {"OPTA_LMX_MEMORY_BUDGET_BYTES": str(budget), "OPTA_LMX_LOAD_ON_DEMAND": "true"}
    with serve(
        tmp_path / "home", "--models-dir", str(models_dir), "--enable-simulated", **settings
    ) as running:
        yield running


def tracked(server: Server) -> set[str]:
    return {model["id"] for model in server.http.get("/admin/models").json()["models"]}


def used(server: Server, *names: str) -> None:
    for name in names:
        assert server.chat(name, max_tokens=2).status_code == 200


def plan_of(server: Server, model_id: str, **options: object) -> dict[str, Any]:
    answer = server.load(model_id, dry_run=True, **options)
    assert answer.status_code == 200, answer.text
    plan: dict[str, Any] = answer.json()
    return plan


def test_the_least_recently_used_makes_room(server: Server) -> None:
    used(server, "a", "b", "a")
    plan = plan_of(server, "c")
    assert plan["fits"]
    assert plan["would_unload"] == ["b"]
    assert tracked(server) == {"a", "b"}
    used(server, "c")
    assert tracked(server) == {"a", "c"}
    server.await_text("b: unloaded to make room for c")
    # As good as ever, when it is asked for again.
    used(server, "b")
    assert server.model("b")["readiness"]["crash_count"] == 0


def test_who_is_busy_or_pinned_stays(server: Server) -> None:
    assert server.load("a", pinned=True).status_code == 200
    used(server, "a", "b")
    assert server.model("a")["pinned"] is True
    more = server.stream("b", max_tokens=500, ignore_eos=True)
    next(more)
    answer = server.load("c")
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "insufficient_memory")
    message = answer.json()["error"]["message"]
    assert "busy, pinned or not to be unloaded for this: 'a', 'b'" in message
    assert int(answer.headers["retry-after"]) >= 1
    assert list(more)[-1] == "[DONE]"
    assert tracked(server) == {"a", "b"}
    used(server, "c")
    assert tracked(server) == {"a", "c"}


def test_a_model_of_the_start_makes_room_for_itself_when_it_is_asked_for_again(
    tmp_path: Path, models_dir: Path, budget: int
) -> None:
    settings = {"OPTA_LMX_MEMORY_BUDGET_BYTES": str(budget), "OPTA_LMX_LOAD_ON_DEMAND": "true"}
    with serve(
        tmp_path / "home", "--models-dir", str(models_dir), "--model", "a", **settings
    ) as server:
        server.await_state("a", "routable")
        used(server, "a", "b", "c")
        assert tracked(server) == {"b", "c"}
        used(server, "a")
        assert tracked(server) == {"a", "c"}


def test_what_is_refused_for_another_reason_costs_nobody_anything(
    tmp_path: Path, tiny_gguf: Path
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(tiny_gguf, folder / "short.gguf")
    write_script(folder, "good", tokens=LONG)
    write_script(folder, "bad", tokens=LONG, faults=[{"at": "loaded", "kind": "segfault"}])
    settings = {
        # For one of them.
        "OPTA_LMX_MEMORY_BUDGET_BYTES": str(43_000_000),
        "OPTA_LMX_RESTART_DELAY_CAP_S": "0.05",
    }
    arguments = ("--models-dir", str(folder), "--enable-simulated")
    with serve(tmp_path / "home", *arguments, **settings) as server:
        server.load("bad", wait=False)
        server.await_state("bad", "quarantined")
        assert server.load("good").status_code == 200
        assert server.chat("good", max_tokens=2).status_code == 200
        refused = server.load("bad")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_unstable")
        too_long = server.load("short", context_length=1_000_000)
        assert (too_long.status_code, too_long.json()["error"]["param"]) == (400, "context_length")
        assert server.model("good")["readiness"]["state"] == "routable"
        # The operator's word goes for the options of that load, too.
        again = server.load("bad", allow_unsupported_runtime=True, pinned=True, keep_alive_sec=77)
        assert again.status_code != 507, again.text
        assert server.model("bad")["keep_alive_sec"] == 77


def test_what_never_fits_costs_nobody_anything(server: Server) -> None:
    used(server, "a")
    answer = server.load("endless", context_length=ENDLESS)
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "insufficient_memory")
    assert "KV cache 1.02 GB for a context of 1000000 tokens" in answer.json()["error"]["message"]
    assert tracked(server) == {"a"}
    plan = plan_of(server, "endless", context_length=ENDLESS)
    assert not plan["fits"]
    fitting = plan["fitting_context_length"]
    assert f"with a context_length of {fitting} it would fit" in plan["message"]
    loaded = server.load("endless", context_length=fitting)
    assert loaded.status_code == 200, loaded.text
    used(server, "endless")
    # Which took the place of the other.
    assert tracked(server) == {"endless"}


def test_what_a_model_takes_is_learned(server: Server, tmp_path: Path, models_dir: Path) -> None:
    before = plan_of(server, "a")["plan"]
    assert before["correction"] == 0
    used(server, "a")
    parts = ("weights", "kv", "compute", "overhead", "prompt_cache")
    planned = sum(before[part] for part in parts)
    assert server.model("a")["memory_planned_gb"] == pytest.approx(planned / 1e9)
    lessons = tmp_path / "home" / "memory.json"
    for _ in polls():
        if lessons.exists():
            break
    server.stop()
    [lesson] = json.loads(lessons.read_text())["lessons"]
    assert lesson["key"]["model"] == "a"
    with serve(tmp_path / "home", "--models-dir", str(models_dir)) as again:
        assert plan_of(again, "a")["plan"]["correction"] == lesson["correction"]
        assert plan_of(again, "b")["plan"]["correction"] == 0


def test_a_model_is_not_unloaded_before_its_requests_have_ended(server: Server) -> None:
    assert server.load("talker").status_code == 200
    answer: list[str] = []
    begun = threading.Event()

    def listen() -> None:
        for payload in server.stream("talker", max_tokens=100):
            answer.append(payload)
            begun.set()

    with ThreadPoolExecutor(2) as pool:
        listening = pool.submit(listen)
        assert begun.wait(10)
        unloading = pool.submit(
            server.http.post, "/admin/models/unload", json={"model_id": "talker"}
        )
        for _ in polls():
            if "talker" not in tracked(server) or server.model("talker")["unloading"]:
                break
        assert not listening.done()
        assert unloading.result().status_code == 200
        listening.result()
    assert answer[-1] == "[DONE]"
    assert text_of(answer) == "".join(LONG)
    assert tracked(server) == set()


def test_a_drain_has_an_end(server: Server) -> None:
    assert server.load("talker").status_code == 200
    more = server.stream("talker", max_tokens=100_000)
    next(more)
    body = {"model_id": "talker", "drain_timeout_sec": 0}
    assert server.http.post("/admin/models/unload", json=body).status_code == 200
    assert json.loads(list(more)[-1])["error"]["code"] == "model_unloaded"


def test_loads_evictions_and_requests_at_once(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("many")
    names = [f"m{number}" for number in range(5)]
    for name in names:
        write_script(folder, name, tokens=LONG[:5], step_delay_s=0.01)
    settings = {
        # An idle one takes half of what is planned: two, or three of them.
        "OPTA_LMX_MEMORY_BUDGET_BYTES": str(100 * 1024 * 1024),
        "OPTA_LMX_LOAD_ON_DEMAND": "true",
    }
    most: list[int] = []
    over = threading.Event()
    with serve(
        tmp_path / "home", "--models-dir", str(folder), "--enable-simulated", **settings
    ) as server:

        def ask(seed: int) -> list[int]:
            dice = random.Random(seed)
            found = []
            for _ in range(6):
                name = dice.choice(names)
                for _ in polls(30):
                    answer = server.chat(name)
                    found.append(answer.status_code)
                    if answer.status_code == 200:
                        text = answer.json()["choices"][0]["message"]["content"]
                        assert text == "".join(LONG[:5])
                        break
                else:
                    raise AssertionError(f"{name} is never served: {answer.text}")
            return found

        def watch() -> None:
            while not over.wait(0.05):
                most.append(len(server.workers()))

        with ThreadPoolExecutor(6) as pool:
            watching = pool.submit(watch)
            try:
                codes = {code for found in pool.map(ask, range(5)) for code in found}
            finally:
                over.set()
            watching.result()
        assert codes <= {200, 507}
        assert max(most) <= 4  # one of them on its way out
        models = server.http.get("/admin/models").json()["models"]
        assert all(model["readiness"]["crash_count"] == 0 for model in models)


def test_the_limit_of_a_group_above_counts(tmp_path: Path, models_dir: Path) -> None:
    limit = 500 * 1024 * 1024
    with contextlib.ExitStack() as stack:
        try:
            cgroup = stack.enter_context(memory_cgroup(limit, below=True))
        except NotAllowed as reason:
            pytest.skip(f"no cgroup: {reason}")
        into = f"open({str(cgroup / 'cgroup.procs')!r}, 'w').write('0')"
        server = stack.enter_context(
            serve(
                tmp_path / "home",
                *("--models-dir", str(models_dir)),
                patch=into,
                OPTA_LMX_MEMORY_LOW_WATER_BYTES="0",
            )
        )
        assert plan_of(server, "a")["available_bytes"] <= limit
        refused = server.load("endless", context_length=ENDLESS)
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            507,
            "insufficient_memory",
        )
        assert server.load("a").status_code == 200

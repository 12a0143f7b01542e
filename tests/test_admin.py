"""The admin API as operators and their scripts use it, on real models."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server, await_gone, polls, serve, start, write_script

MODEL_KEYS = {
    "id",
    "path",
    "backend",
    "backend_version",
    "pid",
    "generation",
    "readiness",
    "unloading",
    "memory_gb",
    "memory_planned_gb",
    "loaded_at",
    "context_length",
    "request_count",
    "in_flight",
    "queued",
    "last_used_at",
    "keep_alive_sec",
    "pinned",
    "last_incident_id",
    "isolating",
    "kind",
    "dimensions",
    "has_chat_template",
    "tool_format",
    "reasoning_format",
}


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path, tiny_mlx: Path) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(tiny_gguf, folder / "tiny.gguf")
    shutil.copytree(tiny_mlx, folder / "org" / "tiny-mlx")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("admin") / "home"
    with serve(home, "--models-dir", str(models_dir)) as running:
        yield running


def unload(server: Server, model_id: str) -> None:
    answer = server.http.post("/admin/models/unload", json={"model_id": model_id})
    assert answer.status_code == 200, answer.text


def error_of(server: Server, model_id: str, **options: object) -> tuple[int, str]:
    answer = server.load(model_id, **options)
    return answer.status_code, answer.json()["error"]["code"]


def test_load_use_unload_on_each_backend(server: Server) -> None:
    for model_id, backend in (("tiny", "llama"), ("org/tiny-mlx", "mlx")):
        loaded = server.load(model_id)
        assert loaded.status_code == 200, loaded.text
        body = loaded.json()
        assert body["success"] is True
        assert body["model_id"] == model_id
        assert body["memory_after_load_gb"] > 0.01
        assert body["time_to_load_ms"] > 0
        assert body["readiness"]["state"] == "routable"
        view = server.model(model_id)
        assert set(view) >= MODEL_KEYS
        assert view["backend"] == backend
        assert server.chat(model_id, max_tokens=3).status_code == 200
        pid = view["pid"]
        unload(server, model_id)
        await_gone([pid])
        assert server.http.get(f"/admin/models/{model_id}").status_code == 404
        assert server.chat(model_id).json()["error"]["code"] == "model_not_found"


def test_ids_with_slashes_work_raw_and_encoded(server: Server) -> None:
    assert server.load("org/tiny-mlx").status_code == 200
    for path in ("org/tiny-mlx", "org%2Ftiny-mlx"):
        assert server.http.get(f"/admin/models/{path}").json()["id"] == "org/tiny-mlx"
        assert server.http.get(f"/v1/models/{path}").json()["id"] == "org/tiny-mlx"
    assert server.http.post("/admin/models/org%2Ftiny-mlx/release").status_code == 409
    unload(server, "org/tiny-mlx")


def test_lists_have_every_tracked_model_and_the_loaded_ones(
    server: Server, models_dir: Path
) -> None:
    write_script(models_dir, "loading", load_delay_s=30)
    server.load("tiny")
    started = server.load("loading", wait=False)
    assert started.status_code == 202
    assert started.json()["status"] == "loading"
    body = server.http.get("/admin/models").json()
    assert [view["id"] for view in body["models"]] == ["loading", "tiny"]
    assert [view["id"] for view in body["loaded"]] == ["tiny"]
    assert body["count"] == 2
    refused = server.chat("loading")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_not_ready")
    assert int(refused.headers["retry-after"]) >= 1
    unload(server, "loading")
    unload(server, "tiny")


def test_a_second_load_of_the_same_model_joins_the_first(server: Server, models_dir: Path) -> None:
    write_script(models_dir, "joined", load_delay_s=0.5)
    assert server.load("joined", wait=False).status_code == 202
    assert server.load("joined").status_code == 200
    assert server.model("joined")["generation"] == 1
    assert server.load("joined").status_code == 200
    unload(server, "joined")


def test_an_unload_answers_a_load_that_waits(server: Server, models_dir: Path) -> None:
    write_script(models_dir, "endless", load_delay_s=60)
    answers: list[tuple[int, str]] = []
    waiting = threading.Thread(target=lambda: answers.append(error_of(server, "endless")))
    waiting.start()
    server.await_tracked("endless")
    unload(server, "endless")
    waiting.join(20)
    assert answers == [(409, "model_unloaded")]


@pytest.mark.parametrize(
    ("model_id", "options", "expected"),
    [
        ("absent", {}, (404, "model_not_found")),
        ("../tiny", {}, (400, "invalid_value")),
        ("tiny", {"backend": "mlx"}, (422, "model_unsupported_backend")),
        ("tiny", {"backend": "vllm"}, (422, "model_unsupported_backend")),
        ("tiny", {"context_length": 10_000_000}, (400, "invalid_value")),
        ("tiny", {"context_length": -1}, (400, "invalid_value")),
        ("tiny", {"context_length": "long"}, (400, "invalid_type")),
        ("tiny", {"draft_model": "absent"}, (400, "invalid_value")),
        ("tiny", {"draft_model": "tiny"}, (400, "unsupported_parameter")),
        ("tiny", {"wait": 1}, (400, "invalid_type")),
    ],
)
def test_loads_that_cannot_be(
    server: Server, model_id: str, options: dict[str, object], expected: tuple[int, str]
) -> None:
    assert error_of(server, model_id, **options) == expected
    for _ in polls(5):
        if not server.workers():
            break
    assert not server.workers()


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"context_length": 128}, "context_length"),
        ({"backend": "mlx"}, "backend"),
        ({"draft_model": "tiny"}, "draft_model"),
        ({"path": "/nowhere/else.gguf"}, "path"),
    ],
)
def test_a_load_that_contradicts_what_runs_is_refused(
    server: Server, options: dict[str, Any], param: str
) -> None:
    server.load("tiny")
    answer = server.load("tiny", **options)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "model_conflict")
    assert answer.json()["error"]["param"] == param
    assert server.load("tiny.gguf").json()["model_id"] == "tiny"
    unload(server, "tiny")


def test_a_context_without_room_is_the_requests_fault(server: Server) -> None:
    assert error_of(server, "tiny", context_length=2) == (400, "invalid_value")
    assert server.load("tiny").status_code == 200
    assert server.model("tiny")["readiness"]["crash_count"] == 0
    unload(server, "tiny")


def test_a_model_by_path(server: Server, tiny_gguf: Path) -> None:
    loaded = server.load(str(tiny_gguf))
    assert loaded.json()["model_id"] == tiny_gguf.stem
    unload(server, tiny_gguf.stem)


def test_what_is_on_this_machine(server: Server, models_dir: Path) -> None:
    answer = server.http.get("/admin/models/available").json()
    found = {model["id"]: model for model in answer["models"]}
    assert answer["count"] == len(found)
    assert {"tiny", "org/tiny-mlx"} <= found.keys()
    for name, backend in (("tiny", "llama"), ("org/tiny-mlx", "mlx")):
        model = found[name]
        assert model["complete"]
        assert [option["backend"] for option in model["backends"] if option["usable"]] == [backend]
        assert Path(model["path"]).is_relative_to(models_dir)
        assert server.load(name).status_code == 200
        assert server.model(name)["context_length"] == model["context_length"]
        unload(server, name)


def test_a_model_in_the_hubs_cache_is_loaded_by_its_name(tmp_path: Path, tiny_gguf: Path) -> None:
    repo = tmp_path / "hub" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0a1b")
    blob = repo / "blobs" / "f00d"
    blob.parent.mkdir()
    shutil.copy(tiny_gguf, blob)
    (repo / "snapshots" / "0a1b").mkdir(parents=True)
    (repo / "snapshots" / "0a1b" / "f32.gguf").symlink_to(blob)
    with serve(tmp_path / "home", HF_HUB_CACHE=str(tmp_path / "hub")) as server:
        [model] = server.http.get("/admin/models/available").json()["models"]
        assert (model["id"], model["source"]) == ("org/name:f32", "hub_cache")
        assert server.load("org/name:f32").status_code == 200
        assert server.chat("org/name:f32", max_tokens=2).status_code == 200


def test_compatibility_remembers_passes_and_failures(server: Server, models_dir: Path) -> None:
    server.load("tiny")
    unload(server, "tiny")
    write_script(models_dir, "unsound", tokens=["!"])
    server.load("unsound")
    page = server.http.get("/admin/models/compatibility", params={"model": "tiny"}).json()
    record = page["records"][0]
    assert (record["outcome"], record["backend"]) == ("pass", "llama")
    assert record["metadata"]["tokens_per_s"] > 0
    assert record["metadata"]["time_to_first_token_s"] > 0
    assert len(record["metadata"]["output_digest"]) == 64
    failures = server.http.get("/admin/models/compatibility", params={"outcome": "fail"}).json()
    assert {r["model"] for r in failures["records"]} >= {"unsound"}
    assert failures["total"] == len(failures["records"])
    limited = server.http.get("/admin/models/compatibility", params={"limit": 1}).json()
    assert len(limited["records"]) == 1
    assert limited["total"] > 1
    bad = server.http.get("/admin/models/compatibility", params={"outcome": "maybe"})
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "invalid_value")


def test_release_needs_a_quarantine(server: Server) -> None:
    server.load("tiny")
    answer = server.http.post("/admin/models/tiny/release")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "model_conflict")
    unload(server, "tiny")
    assert server.http.post("/admin/models/tiny/release").status_code == 404


def test_keys_open_their_side_only(tmp_path: Path, tiny_gguf: Path) -> None:
    environment = {"OPTA_LMX_ADMIN_KEY": "boss", "OPTA_LMX_API_KEY": "guest"}
    with serve(tmp_path / "home", f"--model=tiny={tiny_gguf}", **environment) as server:
        http = server.http
        admin, guest = {"X-Admin-Key": "boss"}, {"Authorization": "Bearer guest"}
        assert http.get("/healthz").status_code == 200
        for headers in ({}, guest, {"X-Admin-Key": "guess"}):
            refused = http.get("/admin/models", headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                403,
                "invalid_admin_key",
            )
        assert http.get("/admin/models", headers=admin).status_code == 200
        assert http.get("/admin/models", headers={"Authorization": "Bearer boss"}).is_success
        for headers in ({}, admin, {"Authorization": "Bearer guess"}):
            refused = http.get("/v1/models", headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                401,
                "invalid_api_key",
            )
        assert http.get("/v1/models", headers=guest).status_code == 200
        assert http.get("/v1/models", headers={"X-Api-Key": "guest"}).status_code == 200


def test_the_blocklist_refuses_and_the_override_passes(tmp_path: Path, tiny_gguf: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "runtime-blocklist.toml").write_text(
        '[[rule]]\nbackend = "llama"\nversions = ">=0.1"\n'
        'signature = { architecture = "llama" }\nreason = "known to crash"\n'
    )
    with serve(home) as server:
        answer = server.load(str(tiny_gguf))
        assert answer.status_code == 422
        assert answer.json()["error"]["code"] == "model_unsupported_backend"
        assert "known to crash" in answer.json()["error"]["message"]
        assert not server.workers()
        assert server.load(str(tiny_gguf), allow_unsupported_runtime=True).status_code == 200
        records = server.http.get("/admin/models/compatibility").json()["records"]
        assert [record["outcome"] for record in records] == ["pass", "fail"]


def test_the_registry_is_where_the_runbook_looks(tmp_path: Path, tiny_gguf: Path) -> None:
    home = tmp_path / "home"
    with serve(home) as server:
        server.load(str(tiny_gguf))
    file = json.loads((home / "compatibility-registry.json").read_text())
    assert file["schema_version"] == 1
    assert [record["outcome"] for record in file["records"]] == ["pass"]


def compatibility(server: Server, what: str, **filters: str) -> list[dict[str, Any]]:
    answer = server.http.get(f"/admin/models/compatibility/{what}", params=filters)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()[what]
    assert answer.json()["count"] == len(found)
    return found


def test_an_upgrade_of_a_backend_shows_in_the_registry(tmp_path: Path) -> None:
    """The record of a faster backend version with another output, then the model's canary here."""
    home = tmp_path / "home"
    script = write_script(tmp_path, "sim", step_delay_s=0.01)
    with serve(home) as server:
        assert server.load(str(script)).status_code == 200
        assert [r["verdict"] for r in compatibility(server, "recommendations")] == ["allow"]
    registry = home / "compatibility-registry.json"
    file = json.loads(registry.read_text())
    (record,) = file["records"]
    version = record["backend_version"]
    older = {**record, "backend_version": "0.9"}
    older["metadata"] = {**record["metadata"], "output_digest": "0" * 64, "tokens_per_s": 1e6}
    file["records"] = [older] * 3
    registry.write_text(json.dumps(file))

    with serve(home) as server:
        before, now = compatibility(server, "recommendations")
        assert (before["backend_version"], before["verdict"]) == ("0.9", "allow")
        assert (now["backend_version"], now["verdict"]) == (version, "unproven")
        assert "proven on simulated 0.9" in now["reason"]
        assert now["installed"]
        assert not before["installed"]
        assert compatibility(server, "regressions") == []
        assert server.load(str(script)).status_code == 200
        before, now = compatibility(server, "recommendations", model="sim")
        assert (now["verdict"], now["evidence"]["pass"]) == ("allow", 1)
        changed, slower = compatibility(server, "regressions", backend="simulated")
        assert [changed["kind"], slower["kind"]] == ["output_changed", "slower"]
        for regression in (changed, slower):
            assert regression["last_good_version"] == "0.9"
            assert regression["backend_version"] == version
            assert regression["installed"]
        assert changed["before"]["record"]["metadata"]["output_digest"] == "0" * 64
        assert slower["before"]["tokens_per_s"] == 1e6
        assert slower["after"]["tokens_per_s"] < 1000
        assert compatibility(server, "regressions", model="another") == []


def test_a_quarantine_and_its_release_are_on_record(tmp_path: Path) -> None:
    script = write_script(tmp_path, "unsound", tokens=["!"])
    with serve(tmp_path / "home") as server:
        assert server.load(str(script)).status_code == 409
        server.await_state("unsound", "quarantined")
        (denied,) = compatibility(server, "recommendations")
        assert denied["verdict"] == "deny"
        assert denied["reason"].startswith("quarantined: canary: ")
        assert denied["evidence"]["fail"] == 3
        for _ in polls():
            if server.http.post("/admin/models/unsound/release").is_success:
                break
        (released,) = compatibility(server, "recommendations")
        assert released["verdict"] == "unproven"
        assert "released by the operator" in released["reason"]
        page = server.http.get("/admin/models/compatibility").json()
        events = [record["metadata"].get("event") for record in page["records"]]
        assert events.count("quarantine") == events.count("release") == 1
        (summary,) = page["summary"]
        assert (summary["fail"], summary["events"], page["total"]) == (3, 2, 5)


def test_an_open_bind_without_keys_is_refused(tmp_path: Path) -> None:
    process = start(tmp_path / "home", "--host", "0.0.0.0")
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "--allow-unauthenticated" in output


def test_a_draft_model_is_not_deleted_while_it_guesses(
    server: Server, models_dir: Path, tiny_mlx: Path
) -> None:
    shutil.copytree(tiny_mlx, models_dir / "guesser")
    loaded = server.load("org/tiny-mlx", draft_model="guesser")
    assert loaded.status_code == 200, loaded.text
    refused = server.http.delete("/admin/models/guesser")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_conflict")
    assert "org/tiny-mlx" in refused.json()["error"]["message"]
    unload(server, "org/tiny-mlx")
    assert server.http.delete("/admin/models/guesser").status_code == 200
    assert not (models_dir / "guesser").exists()

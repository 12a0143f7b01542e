"""A server that dies again and again comes up without its models."""

import signal
from pathlib import Path

from tests.support.server import Server, await_gone, serve, start, write_script


def test_after_three_deaths_the_models_are_left_alone(tmp_path: Path) -> None:
    model = write_script(tmp_path, "m", tokens=["Hel", "lo"])
    home = tmp_path / "home"
    for _ in range(3):
        server = Server(start(home, f"--model={model}"))
        server.await_state("m", "routable")
        pids = [worker.pid for worker in server.workers()]
        server.stop(signal.SIGKILL)
        await_gone(pids)
    with serve(home, f"--model={model}") as server:
        answer = server.http.get("/readyz")
        assert answer.status_code == 503
        assert "safe start: the last 3 starts" in answer.json()["reason"]
        assert server.http.get("/admin/models").json()["models"] == []
        assert server.load("m", path=str(model)).status_code == 200
        assert server.http.get("/readyz").status_code == 200
        server.await_text("m failed to load: safe start")
    # It was stopped as it should be.
    with serve(home, f"--model={model}") as server:
        server.await_state("m", "routable")

"""An unload that is called off while it waits for requests, and a stop that goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from protocol.messages import Generate, Sampling
from supervisor.fleet import Fleet
from supervisor.gate import LoadSpec
from supervisor.metrics import Metrics
from supervisor.settings import Settings
from tests.support.server import await_gone, serve, write_script


async def test_a_drain_that_is_called_off_leaves_the_model_usable(tmp_path: Path) -> None:
    write_script(tmp_path, "talker", repeat=True, step_delay_s=0.01)
    settings = Settings(
        home=tmp_path / "home", models_dir=tmp_path, enable_simulated=True, load_on_demand=True
    )
    fleet = Fleet(settings, Metrics(), [], on_autoload=lambda *_: None)
    try:
        await fleet.load(LoadSpec(model_id="talker"))
        generate = Generate(0, prompt="Hi", sampling=Sampling(), max_tokens=100_000)
        running = fleet.submit("talker", generate, streaming=True)
        await running.accepted()
        unloading = asyncio.create_task(fleet.unload("talker", 60.0))
        # It waits for the model to be gone, and would load it again then.
        loading = asyncio.create_task(fleet.load(LoadSpec(model_id="talker")))
        for _ in range(5):
            await asyncio.sleep(0)
        assert fleet.model("talker").unloading
        assert not loading.done()
        unloading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await unloading
        async with asyncio.timeout(10):
            await loading
        assert fleet.model("talker").generation == 1
        another = fleet.submit("talker", generate, streaming=True)
        async with asyncio.timeout(10):
            await another.next()
        for stream in (running, another):
            stream.close()
    finally:
        await fleet.stop()


def test_workers_are_stopped_although_something_else_fails(tmp_path: Path) -> None:
    write_script(tmp_path, "talker", tokens=["Hel", "lo"])
    patch = """
from supervisor.downloads.downloads import Downloads
async def stop(self):
    raise OSError("no more disk")
Downloads.stop = stop
"""
    with serve(tmp_path / "home", "--models-dir", str(tmp_path), patch=patch) as server:
        assert server.load("talker").status_code == 200
        workers = [worker.pid for worker in server.workers()]
        assert len(workers) == 1
        assert server.stop() == 0
        await_gone(workers)
    assert "talker: routable -> untracked" in server.text
    assert "while stopping: downloads" in server.text

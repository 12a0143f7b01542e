"""Sets the memory plan of models against what their workers take: loaded, and used.

PYTHONPATH=. .venv/bin/python scripts/memory_plan.py MODEL [MODEL ...] [--context-length N]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from supervisor.footprint import footprint_bytes
from tests.support.server import Server, serve

#: A word is a token or more; the prompt leaves room for an answer.
PROMPT_SHARE = 1 / 4
SETTLE_S = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--context-length", type=int)
    arguments = parser.parse_args()
    print(f"{'model':44} {'context':>7} {'plan':>8} {'at load':>8} {'measured':>8} {'used':>8}")
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as home, serve(Path(home) / "home") as server:
            compare(server, model.absolute(), arguments.context_length)


def compare(server: Server, model: Path, context_length: int | None) -> None:
    """Print a line: MB planned in all and at the load, measured after it and after a prompt."""
    options: dict[str, object] = {"path": str(model), "context_length": context_length}
    answer = server.load("m", dry_run=True, **options)
    plan = answer.raise_for_status().json()["plan"]
    server.load("m", **options).raise_for_status()
    pid = server.model("m")["pid"]
    time.sleep(SETTLE_S)
    loaded = footprint_bytes(pid) or 0
    words = int(plan["context_length"] * PROMPT_SHARE)
    server.http.timeout = None
    for _ in range(plan["sequences"]):
        server.chat("m", "word " * words, max_tokens=8)
    used = footprint_bytes(pid) or 0
    at_load = plan["weights"] + plan["overhead"] + plan["kv"] * plan["kv_at_once"]
    growth = plan["compute"] + plan["prompt_cache"] + plan["kv"] * (not plan["kv_at_once"])
    sizes = (at_load + growth, at_load, loaded, used)
    columns = " ".join(f"{size / 1e6:8.1f}" for size in sizes)
    print(f"{model.name:44.44} {plan['context_length']:7} {columns}", flush=True)


if __name__ == "__main__":
    main()

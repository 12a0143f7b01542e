"""What a process costs, and whose end the OOM killer was."""

import os
from pathlib import Path

from supervisor.footprint import FootprintMeter, OomKills


def write_count(path: Path, count: int) -> None:
    path.write_text(f"pgfault 12\noom_kill {count}\ndrop_pagecache 0\n")


def test_a_kill_counts_until_the_second_refresh_after_it(tmp_path: Path) -> None:
    source = tmp_path / "vmstat"
    write_count(source, 4)
    kills = OomKills(source)
    kills.refresh()
    assert not kills.have_grown()
    write_count(source, 5)
    assert kills.have_grown()
    # A refresh between the kill and the news of the worker's end must not hide it.
    kills.refresh()
    assert kills.have_grown()
    kills.refresh()
    assert not kills.have_grown()


def test_where_nobody_counts_nothing_was_a_kill(tmp_path: Path) -> None:
    assert not OomKills(tmp_path / "none").have_grown()
    (tmp_path / "vmstat").write_text("pgfault 12\n")
    assert not OomKills(tmp_path / "vmstat").have_grown()


def test_a_process_is_measured_again_and_again_and_then_gone() -> None:
    meter = FootprintMeter()
    first = meter.measure([os.getpid()])
    assert first[os.getpid()] > 1_000_000
    assert meter.measure([os.getpid(), 2**22 + 1]) == meter.measure([os.getpid()])

"""A kill by the out-of-memory killer explains one death, for as long as dying takes."""

from pathlib import Path

import pytest

from supervisor.oom_kills import DYING_S, OomKills


class Host:
    """Its clock, and its counter of kills."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 100.0
        self.killed(4)
        self.kills = OomKills([path / "missing", path / "vmstat"], lambda: self.now)

    def killed(self, count: int) -> None:
        (self.path / "vmstat").write_text(f"pgfault 12\noom_kill {count}\ndrop_pagecache 0\n")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_kill_explains_one_death(host: Host) -> None:
    assert not host.kills.claim(0.0)
    host.killed(6)
    assert [host.kills.claim(0.0) for _ in range(3)] == [True, True, False]


def test_a_large_process_takes_its_time_to_die(host: Host) -> None:
    host.killed(5)
    for _ in range(int(DYING_S) - 1):
        host.kills.refresh()
        host.now += 1.0
    assert host.kills.claim(0.0)


def test_an_old_kill_explains_nothing(host: Host) -> None:
    host.killed(5)
    host.kills.refresh()
    host.now += DYING_S + 1.0
    assert not host.kills.claim(0.0)


def test_nor_does_one_from_before_the_spawn(host: Host) -> None:
    host.killed(5)
    host.kills.refresh()
    host.now += 1.0
    assert not host.kills.claim(host.now)
    host.killed(6)
    assert host.kills.claim(host.now)
    assert host.kills.claim(0.0)


def test_the_first_source_that_tells_counts(tmp_path: Path) -> None:
    (tmp_path / "events").write_text("low 0\noom 3\noom_kill 1\noom_group_kill 0\n")
    (tmp_path / "vmstat").write_text("oom_kill 7\n")
    kills = OomKills([tmp_path / "events", tmp_path / "vmstat"])
    (tmp_path / "vmstat").write_text("oom_kill 8\n")  # in somebody else's container
    assert not kills.claim(0.0)
    (tmp_path / "events").write_text("low 0\noom 4\noom_kill 2\noom_group_kill 0\n")
    assert kills.claim(0.0)


def test_where_nobody_counts_nothing_was_a_kill(tmp_path: Path) -> None:
    assert not OomKills([tmp_path / "none"]).claim(0.0)
    (tmp_path / "vmstat").write_text("pgfault 12\n")
    assert not OomKills([tmp_path / "vmstat"]).claim(0.0)

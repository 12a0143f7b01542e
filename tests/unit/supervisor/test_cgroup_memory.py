"""Limits of control groups: those of all on the way up count, in either version."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.cgroup_memory import available_bytes

MB = 1024 * 1024
HYBRID = "9:name=systemd:/\n8:pids:/a/b\n4:cpu,memory:/a/b\n0::/a/b\n"


class Tree:
    """Groups below a mount point, by their paths."""

    def __init__(self, folder: Path) -> None:
        self.mount = folder / "cgroup"
        self.own = folder / "own"
        self.enter("0::/a/b\n")

    def enter(self, text: str) -> None:
        self.own.write_text(text)

    def group(self, path: str, limit: object, used: int, cached: int = 0) -> None:
        self._write(path, "memory.max", limit)
        self._write(path, "memory.current", used * MB)
        self._write(path, "memory.stat", f"anon 7\nactive_file {cached * MB}\ninactive_file 0")

    def group1(self, path: str, limit: object, used: int, cached: int = 0) -> None:
        path = f"memory/{path}"
        self._write(path, "memory.limit_in_bytes", limit)
        self._write(path, "memory.usage_in_bytes", used * MB)
        # Without those below it a group of the first version says little.
        stat = f"active_file 1\ntotal_active_file 0\ntotal_inactive_file {cached * MB}"
        self._write(path, "memory.stat", stat)

    def left(self) -> int | None:
        found = available_bytes(self.own, self.mount)
        return None if found is None else found // MB

    def _write(self, path: str, name: str, value: object) -> None:
        folder = self.mount / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{value}\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_without_a_limit_there_is_none(tree: Tree) -> None:
    assert tree.left() is None
    tree.group("a", "max", 10)
    tree.group("a/b", "max", 10)
    assert tree.left() is None


def test_ones_own_limit_counts_and_the_page_cache_is_free(tree: Tree) -> None:
    tree.group("a/b", 100 * MB, used=70, cached=20)
    assert tree.left() == 50


@pytest.mark.parametrize("own", ["max", 1000 * MB])
def test_so_does_that_of_a_group_above(tree: Tree, own: object) -> None:
    tree.group("a", 100 * MB, used=60)
    tree.group("a/b", own, used=10)
    assert tree.left() == 40


def test_it_is_what_is_left_that_counts_not_the_limit(tree: Tree) -> None:
    tree.group("a", 1000 * MB, used=990)
    tree.group("a/b", 100 * MB, used=10)
    assert tree.left() == 10
    tree.group("a", 1000 * MB, used=1010)
    assert tree.left() == 0


@pytest.mark.parametrize("path", ["/", "/nowhere/to/be/seen", "/../../above"])
def test_a_container_has_its_own_group_at_the_root(tree: Tree, path: str) -> None:
    tree.group("", 100 * MB, used=70)
    tree.enter(f"0::{path}\n")
    assert tree.left() == 30


def test_the_first_version_is_read_where_it_has_the_memory(tree: Tree) -> None:
    tree.enter(HYBRID)
    tree.group1("", 2**63 - 4096, used=500)
    tree.group1("a", 100 * MB, used=60, cached=5)
    tree.group1("a/b", 2**63 - 4096, used=10)
    assert tree.left() == 45
    # Another's limit is nobody's here.
    tree.group1("c", MB, used=0)
    assert tree.left() == 45


def test_nothing_is_known_where_nothing_is_told(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "none", tmp_path) is None

"""What the documents promise of clients is shown by tests that exist, and said once."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_tests_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text()))
    assert named
    defined = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert named <= defined, named - defined


def test_no_route_and_no_code_has_two_rows() -> None:
    rows = re.findall(r"^\| (`[^|]+) \|", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert {row for row in rows if rows.count(row) > 1} == set()

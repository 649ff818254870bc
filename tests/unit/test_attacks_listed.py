"""Each attack in the document has a test that shows what becomes of it, and the test exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
ROWS_MIN = 60
NAMED = re.compile(r"`([a-z]+/test_\w+\.py)::(test_\w+)`")


def rows() -> list[list[str]]:
    lines = (ROOT / "docs/attacks.md").read_text().splitlines()
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [row for row in cells if row[0] != "attack"]


@cache
def defined_in(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text())
    return frozenset(n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def test_there_are_enough() -> None:
    assert len(rows()) >= ROWS_MIN
    attacks = [row[0] for row in rows()]
    assert len(set(attacks)) == len(attacks), "one is there twice"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:60])
def test_each_has_a_test_that_exists(row: list[str]) -> None:
    assert len(row) == 3, row
    assert all(row), row
    named = NAMED.findall(row[2])
    assert named, f"no test is named: {row[2]}"
    rest = NAMED.sub("", row[2]).replace(",", "").strip()
    assert rest == "", f"not the name of a test: {rest}"
    for file, test in named:
        assert (TESTS / file).exists(), file
        assert test in defined_in(file), f"{file} has no {test}"


def test_every_test_of_attacks_is_listed() -> None:
    named = {found for row in rows() for found in NAMED.findall(row[2])}
    there = {(f"attacks/{path.name}", test) for path in (TESTS / "attacks").glob("test_*.py")
             for test in defined_in(f"attacks/{path.name}") if test.startswith("test_")}  # fmt: skip
    assert there <= named, sorted(there - named)

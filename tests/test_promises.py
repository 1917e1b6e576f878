"""The table of tests/README.md is true, and every trap has a test that bears its number."""

import ast
import re
from pathlib import Path

from tests import mutants

TESTS = Path(__file__).parent
TABLE = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", (TESTS / "README.md").read_text().split("| Promise |")[1])
FILES = {
    path.name: {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    for path in TESTS.glob("test_*.py")
}
TRAPS = {"a": 14, "b": 20, "c": 15, "d": 16}


def test_what_the_table_names_exists():
    for file, test in TABLE:
        assert file in FILES and (not test or test in FILES[file]), f"{file}::{test}"


def test_every_file_of_tests_is_in_the_table():
    assert {file for file, _ in TABLE} == FILES.keys()


def test_every_promise_has_an_owner():
    rows = (TESTS / "README.md").read_text().split("|---|---|\n")[1].splitlines()
    for row in rows:
        _, promise, owner, _ = row.split("|")
        assert promise.strip().startswith("**") or "`test_" in owner, row


def test_every_trap_has_a_test():
    tests = {name for names in FILES.values() for name in names}
    for letter, count in TRAPS.items():
        for number in range(1, count + 1):
            assert any(name.startswith(f"test_{letter}{number}_") for name in tests), f"{letter}{number}"


def test_every_mutant_can_be_made():
    """Its old text is there once, and its tests exist; whether they find it is for `python -m tests.mutants` to say."""
    for mutant in mutants.MUTANTS:
        assert (TESTS.parent / mutant.file).read_text().count(mutant.old) == 1, mutant
        assert mutant.old != mutant.new and mutant.tests
        for file, _, test in (name.partition("::") for name in mutant.tests):
            assert file in FILES and (not test or test in FILES[file]), mutant

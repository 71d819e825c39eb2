"""Test modules stand alone: what two of them need is in tests/support."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
MODULES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py"))


def imported(tree):
    """Yield the dotted names that a module imports: `from a import b` may import the module a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_shared(name):
    """Return whether test code may import this module: anything that is no part of tests/, and tests.support."""
    return name.partition(".")[0] != "tests" or name.startswith("tests.support.")


@pytest.mark.parametrize(
    "statement", ["import tests.unit.test_a", "from tests.unit import test_a", "from tests import x"]
)
def test_an_import_of_a_test_module_is_found(statement):
    assert not all(map(is_shared, imported(ast.parse(statement))))


def test_modules_below_tests_import_nothing_of_tests_but_support():
    found = {
        (module, name)
        for module in MODULES
        for name in imported(ast.parse((TESTS / module).read_text(encoding="utf-8")))
        if not is_shared(name)
    }
    assert len(MODULES) > 100
    assert found == set()


def test_builders_stand_in_support_alone():
    kinds = {module for module in MODULES if not Path(module).name.startswith(("test_", "conftest"))}
    assert {module for module in kinds if not module.startswith("support/")} == {"loaders/old_loader.py"}


def test_programs_that_tests_start_build_the_grammar_of_addresses_when_one_is_validated():
    program = (
        "import sys, jsonschema; print('lark' in sys.modules); checker = jsonschema.FormatChecker(); "
        "print([checker.conforms(text, 'iri-reference') for text in ('a b', 'b/\u00fc')], 'lark' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["False", "[False, True] True"]

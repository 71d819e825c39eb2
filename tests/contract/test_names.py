"""A name says one thing: no two modules and no two public classes of the package share one."""

import ast
from collections import Counter
from pathlib import Path

import ropeway

SOURCE = Path(ropeway.__file__).parent
MODULES = [path for path in SOURCE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]


def shared(names):
    return sorted(name for name, count in Counter(names).items() if count > 1)


def test_no_two_modules_share_a_name_but_the_stages_own():
    assert shared(path.name for path in MODULES if path.name != "stage.py") == []
    assert all(path.parent.parent.name == "stages" for path in MODULES if path.name == "stage.py")


def test_no_two_public_classes_share_a_name():
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in MODULES)
    classes = (node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert shared(name for name in classes if not name.startswith("_")) == []

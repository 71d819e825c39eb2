"""`python tools/list_messages.py`: every text that a user can read, with its place, to be read whole.

Exceptions, printed and logged lines, help texts, table heads and the text of templates. Values stand as `{}`.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOWN = {
    "print",
    "say",
    "log",
    "info",
    "warning",
    "error",
    "exception",
    "secho",
    "echo",
    "add_column",
    "Option",
    "Argument",
}
_TAGS = re.compile(r"\{[{%#].*?[}%#]\}|<[^>]*>", re.DOTALL)


def text_of(node: ast.expr) -> str:
    """Return an expression's constant text, `{}` for each value; empty where it has none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return ""


def python_messages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of what a module shows."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call = node.exc
        elif isinstance(node, ast.Call) and name_of(node.func) in SHOWN:
            call = node
        elif isinstance(node, ast.FunctionDef) and any("command" in ast.unparse(one) for one in node.decorator_list):
            yield node.lineno, ast.get_docstring(node) or ""
            continue
        else:
            continue
        values = [*call.args, *(word.value for word in call.keywords if word.arg in ("help", "description", "title"))]
        for text in filter(None, map(text_of, values)):
            yield node.lineno, text


def name_of(function: ast.expr) -> str:
    """Return the last name of what is called."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def main() -> None:
    """Print `file:line: text` of all."""
    named = subprocess.run(
        ["git", "ls-files", "src", "flows"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    count = 0
    for name in named:
        if name.endswith(".py"):
            lines = sorted(set(python_messages(ROOT / name)))
        elif name.endswith(".jinja"):
            plain = ((at, _TAGS.sub("{}", line)) for at, line in enumerate((ROOT / name).read_text().splitlines(), 1))
            lines = [(at, line) for at, line in plain if re.search(r"[A-Za-z]{3}", line)]
        else:
            continue
        for at, text in lines:
            count += 1
            print(f"{name}:{at}: {' '.join(text.split())}")
    print(f"{count} texts")


if __name__ == "__main__":
    main()

"""The code blocks of the documentation and how each one is checked; the convention is in the info string.

```` ```sh run ````              run by `make test-docs`, in the order of the site, in one workspace
```` ```python run ````          the same
```` ```sh not-run ````          not run; its first line is a comment `# not run here…` that says why
```` ```yaml profile ````        keys of a profile: laid over the profile `laptop` and validated
```` ```yaml profile apply ````  the same, and in effect for the later blocks of the page
```` ```text ````, json, toml    output and formats, not run

Any other block is a fault, also one made by indenting alone. Decisions, the lab log and the changelog are records of
their day and are left out.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

DOCS = Path(__file__).parents[2] / "docs"
RECORDS = ("decisions", "runs.md", "changelog.md")
RUN, NOT_RUN, PROFILE, APPLY = "run", "not-run", "profile", "apply"
_KNOWN = {
    "sh run", "python run", "sh not-run", "yaml profile", "yaml profile apply", "text", "json", "toml", "yaml",
}  # fmt: skip
_REASON = re.compile(r"# not run here\b.*\w")


@dataclass(frozen=True, slots=True)
class Block:
    """One code block: the page's path below docs, its first line there, the info string, and the code."""

    page: str
    line: int
    info: str
    code: str

    @property
    def place(self) -> str:
        """Return where it is, for messages."""
        return f"docs/{self.page}:{self.line}"


def find_pages(docs: Path = DOCS) -> list[Path]:
    """Return the pages whose blocks are checked, in the order of the site (the toctrees of index.md), then others."""
    order = [f"{name}.md" for name in re.findall(r"(?m)^([\w/-]+)$", (docs / "index.md").read_text(encoding="utf-8"))]
    pages = {path.relative_to(docs).as_posix(): path for path in sorted(docs.rglob("*.md"))}
    kept = [name for name in pages if not name.startswith(RECORDS)]
    return [pages[name] for name in sorted(kept, key=lambda one: (order.index(one) if one in order else -1, one))]


def find_blocks(path: Path, docs: Path = DOCS) -> Iterator[Block]:
    """Yield the code blocks of a page; directives (`{toctree}` …) are none."""
    text = path.read_text(encoding="utf-8")
    for token in MarkdownIt().parse(text):
        if token.type in ("fence", "code_block") and not token.info.strip().startswith("{"):
            line = (token.map or [0])[0] + 1
            yield Block(path.relative_to(docs).as_posix(), line, token.info.strip(), token.content)


def find_faults(block: Block) -> list[str]:
    """Return what is wrong with a block's mark; empty if it is one of the known ones."""
    if block.info not in _KNOWN:
        found = f"'{block.info}'" if block.info else "no info string"
        return [f"{block.place}: expected one of {', '.join(sorted(_KNOWN))}, found {found}"]
    if block.info == "sh not-run" and not _REASON.match(block.code):
        return [f"{block.place}: the first line of a block that is not run is `# not run here: REASON`"]
    return []

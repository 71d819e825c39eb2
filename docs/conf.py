"""Sphinx's configuration of the site; `make docs` builds it, offline, every warning an error."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tools.docs import reference  # noqa: E402 - after the path is set

project = "Ropeway"
author = "Ropeway"
project_copyright = "Apache License 2.0"
extensions = ["myst_parser"]
nitpicky = True
language = "en"
html_theme = "furo"
html_title = "Ropeway"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"source_directory": "docs/", "navigation_with_keys": True}
pygments_style = "tango"
pygments_dark_style = "monokai"
myst_enable_extensions = ["attrs_inline", "deflist"]
myst_heading_anchors = 4


def _fill(_app: object, _name: str, source: list[str]) -> None:
    """Put the generated text in place of the markers of a page."""
    source[0] = reference.fill(source[0])


def setup(app: object) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", _fill)  # type: ignore[attr-defined]
    return {"parallel_read_safe": True}

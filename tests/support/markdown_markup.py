"""What a CommonMark reader, with tables and with HTML allowed, takes from a page for markup of its own."""

from markdown_it import MarkdownIt

_READER = MarkdownIt("commonmark", {"html": True}).enable("table")


def find_markup(page):
    """Return the HTML in a page and the targets of its links and images that a text could use to act."""
    tokens = [inner for token in _READER.parse(page) for inner in (token, *(token.children or ()))]
    html = [token.content for token in tokens if token.type in ("html_block", "html_inline")]
    targets = [str(token.attrs.get("href") or token.attrs.get("src") or "") for token in tokens]
    return html + [one for one in targets if one and not one.startswith(("https://", "http://127.", "data:image/"))]

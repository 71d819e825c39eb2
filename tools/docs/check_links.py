"""`python -m tools.docs.check_links FOLDER`: checks every link and anchor of a built site; exits with 1 on a fault.

Sphinx checks the links that it resolves itself. This reads the HTML that a browser gets: links to files, anchors of
other pages, pictures, and whether a page loads anything from the network.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Elements whose address a browser loads by itself; `a` only when it is followed.
_LOADED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}


class _Page(HTMLParser):
    """The anchors and addresses of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what an element names."""
        values = dict(attrs)
        self.anchors.update(value for key in ("id", "name") if (value := values.get(key)))
        address = values.get(_LOADED.get(tag, ""))
        if tag == "link" and values.get("rel") not in ("stylesheet", "icon", "preload"):
            address = None
        if address:
            self.loaded.append(address)
        if tag == "a" and (target := values.get("href")):
            self.links.append(target)


def find_faults(site: Path) -> list[str]:
    """Return one line per broken link, missing anchor or address that a page loads from the network."""
    pages = {path.resolve(): _Page(path) for path in sorted(site.rglob("*.html"))}
    faults = []
    for path, page in pages.items():
        where = path.relative_to(site.resolve())
        faults += [f"{where}: loads {one} from the network" for one in page.loaded if urlsplit(one).netloc]
        for link in (*page.links, *page.loaded):
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            if not target.is_file():
                faults.append(f"{where}: {link}: no such file in the site")
            elif address.fragment and target in pages and unquote(address.fragment) not in pages[target].anchors:
                faults.append(f"{where}: {link}: no such anchor on that page")
    return faults


def main() -> None:
    """Check the site that is named."""
    site = Path(sys.argv[1])
    faults = find_faults(site)
    print("\n".join(faults) or f"{site}: {len(list(site.rglob('*.html')))} pages, every link and anchor resolves")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()

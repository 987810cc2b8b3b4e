"""Every link inside the built documentation leads somewhere: to a file, and in it to an anchor.

    python docs/check_links.py docs/_build/html

Sphinx checks the links that pages are written with; this reads what came out, pictures, styles and
the API reference included. Links to other hosts are ``make linkcheck``'s, which needs a network.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Sphinx's own pages; viewcode's link back by the name a thing has where it was written.
GENERATED = {"genindex.html", "search.html", "py-modindex.html", "_modules"}
ATTRIBUTES = {"a": "href", "link": "href", "img": "src", "script": "src"}


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("id", "name"):
                self.anchors.add(value)
            if value and name == ATTRIBUTES.get(tag):
                self.links.add(value)


def dead_links(root: Path) -> list[str]:
    """``page: link`` for every link inside the site that leads nowhere."""
    pages = {path: Page(path) for path in sorted(root.rglob("*.html")) if "_static" not in path.parts}
    dead = []
    for path, page in pages.items():
        if GENERATED & set(path.relative_to(root).parts):
            continue
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchors = pages[target].anchors if target in pages else None
            if not target.exists() or (
                parts.fragment and anchors and unquote(parts.fragment) not in anchors
            ):
                dead.append(f"{path.relative_to(root)}: {link}")
    return dead


if __name__ == "__main__":
    found = dead_links(Path(sys.argv[1]).resolve())
    print("\n".join(found) or "no dead link")
    sys.exit(bool(found))

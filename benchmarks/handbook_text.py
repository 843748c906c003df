"""The English text of the Debian Administrator's Handbook, for `micromix sweep --text`.

apt-get download debian-handbook && dpkg -x debian-handbook_*.deb handbook
python benchmarks/handbook_text.py handbook.txt --folder handbook
"""

from __future__ import annotations

import argparse
import re
from html.parser import HTMLParser
from pathlib import Path

_PARAGRAPHS = {"p", "h1", "h2", "h3", "h4", "li", "div", "pre", "tr"}
_SILENT = {"script", "style", "head", "title"}


class _Text(HTMLParser):
    """The text of a page, a line break around each paragraph."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.silent += tag in _SILENT
        if tag in _PARAGRAPHS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in _SILENT
        if tag in _PARAGRAPHS - {"li", "div", "tr"}:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data)


def page_text(html: str) -> str:
    """The text of one page, spaces and empty lines reduced."""
    parser = _Text()
    parser.feed(html)
    text = re.sub(r" ?\n ?", "\n", re.sub(r"[ \t]+", " ", "".join(parser.parts)))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--folder", type=Path, default=Path("handbook"), help="the unpacked package"
    )
    arguments = parser.parse_args()
    pages = sorted(arguments.folder.rglob("html/en-US/*.html"))
    pages = [page for page in pages if "index.html" not in page.name]
    if not pages:
        raise SystemExit(f"no page html/en-US/*.html below {arguments.folder}")
    texts = [page_text(page.read_text(encoding="utf-8")) for page in pages]
    arguments.output.write_text("\n\n".join(texts), encoding="utf-8")
    print(f"{arguments.output}: {len(pages)} pages, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main()

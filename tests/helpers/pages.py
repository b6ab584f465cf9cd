"""The pages of the documentation: their blocks, links, names and sentences."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from helpers.models import ROOT

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "weights/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
)

# Pages without blocks that a reader runs.
TEXTS = ("SECURITY.md", "CHANGELOG.md", "docs/tour.ipynb")

_BLOCK = re.compile(r"^```(\w*)(?: needs=(\S*))?[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its mark (the thing it needs, or ""), and its code."""

    language: str
    needs: str
    code: str


def read_page(page: str) -> str:
    """The Markdown of a page, or of the text cells of a notebook."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if not page.endswith(".ipynb"):
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def find_blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found = _BLOCK.finditer(read_page(page))
    return [Block(block[1], block[2] or "", block[3]) for block in found]


def find_links(page: str) -> list[str]:
    """The targets of all links and images of a page."""
    return _LINK.findall(_BLOCK.sub("", read_page(page)))


def find_anchors(path: Path) -> set[str]:
    """The anchors that a host makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", path.read_text(encoding="utf-8")), re.M)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in words}


def find_code_spans(page: str) -> list[str]:
    """The inline code of a page: `like this`."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", _BLOCK.sub("", read_page(page)))


def split_statements(code: str) -> list[str]:
    """The statements of a simple shell block: lines, with continued lines and here-documents
    joined. Comments and empty lines are left out."""
    statements: list[str] = []
    end = None  # the word that ends the present here-document
    for line in code.splitlines():
        if end is not None or (statements and statements[-1].endswith("\\")):
            statements[-1] += "\n" + line
            end = None if line == end else end
            continue
        if line.strip() and not line.startswith("#"):
            statements.append(line)
            here = re.search(r"<<'?(\w+)'?$", line)
            end = here[1] if here else None
    return statements


def count_words(page: str) -> list[tuple[int, str]]:
    """Each sentence of the prose of a page with its number of words. Code, tables, headings and
    images are left out; inline code counts as one word."""
    text = _BLOCK.sub("", read_page(page))
    for noise in (r"^:::.*$", r"^ {4,}.*$", r"^\|.*$", r"^#.*$", r"^!\[.*$", r"\*\*"):
        text = re.sub(noise, "", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "CODE", text)
    counted = []
    for paragraph in re.split(r"\n\s*\n|^\s*(?:[*-]|\d+\.)\s", text, flags=re.MULTILINE):
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
            number = len(re.findall(r"\w[\w'.,/-]*", sentence))
            if number > 1:
                counted.append((number, sentence))
    return counted

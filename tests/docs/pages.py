"""The pages of the documentation, and the blocks of code in them."""

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = {str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
"""The text of each page of the site, by its path in the repository."""
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_REASON = re.compile(r"<!-- not run: (.+?) -->\s*$", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        language: what stands behind the fence, such as ``python``.
        code: its lines.
        line: the number of its first line in the page.
        reason: why it is not run, from the comment in front of it; empty if it is.
        follows: the language of the block before it if nothing but blank lines stands in between.
    """

    language: str
    code: str
    line: int
    reason: str
    follows: str


def blocks(text: str) -> list[Block]:
    """Return the blocks of a page in their order."""
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(text):
        between = text[end : match.start()]
        reason = _REASON.search(between)
        adjacent = found[-1].language if found and not between.strip() else ""
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(match[1], match[2], line, reason[1] if reason else "", adjacent))
        end = match.end()
    return found


def prose(text: str) -> str:
    """Return a page without its blocks."""
    return _FENCE.sub("", text)

"""Markdown as a reader goes through it: fenced blocks, the lines of a shell in them, and code within sentences."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
MADE = {"_build", "_generated"}
DOCUMENTS = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "model_zoo/results/README.md"))]
PAGES = [*DOCUMENTS, *(page for page in sorted(DOCS.rglob("*.md")) if not MADE & set(page.parts))]
"""Every page that a person wrote."""

FENCE = re.compile(r"^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", flags=re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page, and the line that it begins on."""

    language: str
    code: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """All but the directives of Sphinx."""
    text = page.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        if not fence["language"].startswith("{"):
            yield Block(fence["language"], fence["code"], text.count("\n", 0, fence.start("code")))


def shell_lines(block: Block) -> list[str]:
    """Those that a backslash continues put together."""
    return re.sub(r"\\\n\s*", "", block.code).splitlines()


def code_in_sentences(page: Path) -> list[str]:
    """What stands between backticks, on one line each."""
    spans = re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))
    return [" ".join(span.split()) for span in spans]

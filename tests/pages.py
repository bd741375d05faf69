"""Fenced Python blocks of the README and of the documentation, to be run in order as a reader would."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

BLOCK = re.compile(
    r"^(?P<indent> *)(?:```python[^\n]*\n(?P<shown>.*?)^ *```|<!-- run:\n(?P<silent>.*?)^ *-->)",
    re.MULTILINE | re.DOTALL,
)
"""A fence of Python, or a comment ``<!-- run: ... -->`` with what a page takes for granted, such as a small model."""


@dataclass(frozen=True)
class Code:
    """Python of a page, and the line of the page that it starts in."""

    page: Path
    line: int
    text: str


def code_of(page: Path) -> list[Code]:
    """The Python of a page, shown or silent, in order."""
    text, found = page.read_text(), []
    for match in BLOCK.finditer(text):
        inside = "shown" if match["shown"] is not None else "silent"
        line = text.count("\n", 0, match.start(inside))
        indent = re.compile(f"^{match['indent']}", re.MULTILINE)
        found.append(Code(page, line, indent.sub("", match[inside])))
    return found


def run(page: Path) -> dict[str, Any]:
    """Runs a page's Python from top to bottom in one namespace. Errors show the page and its line."""
    names: dict[str, Any] = {"__name__": "__page__"}
    for code in code_of(page):
        exec(compile("\n" * code.line + code.text, str(page), "exec"), names)
    return names

"""One self-contained HTML page: figures and tables that open from disk, in dark and light, on a phone as well.

Everything is in the file: no script, no font, no image from elsewhere. A figure is drawn twice, for a light and for a
dark page, and the browser takes the one that fits. Wide tables and figures scroll in their own box, the page does not.
"""

from __future__ import annotations

import base64
import io
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.metadata import version
from typing import Any

import torch

from torch_depthmup.diagnostics.shared.extras import needs
from torch_depthmup.diagnostics.shared.style import DARK

__all__ = ["figure", "following", "heading", "listing", "named_table", "page", "paragraph", "table"]

LEAST = 0.75  # of its size: a figure on a narrower page scrolls
VERDICTS = {"holds": "good", "broken": "bad", "cannot tell": "open", "network": "open"}

CSS = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c1f26; --quiet: #5a6170; --line: #d5d9e2; --box: #f4f6fa;
  --good: #0a6b3d; --bad: #b3261e; --open: #7a5200; }
@media (prefers-color-scheme: dark) { :root { --page: #16181d; --text: #d8dce4; --quiet: #9aa3b5; --line: #363b47;
  --box: #1e2129; --good: #5fd39a; --bad: #ff8a80; --open: #f0c060; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.4rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
p.quiet, figcaption, footer { color: var(--quiet); font-size: 0.875rem; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.875em; }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; border: 1px solid var(--line); border-radius: 6px; }
figure { margin: 1rem 0; }
figure img { display: block; height: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: var(--box); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.open { color: var(--open); font-weight: 600; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 0.5rem; }
"""


def page(title: str, blocks: Iterable[str], *, command: str) -> str:
    """A whole page.

    Args:
        title: plain text.
        blocks: what the functions below return.
        command: the command that made it, shown at the foot with the versions that it ran on.

    Returns:
        HTML.
    """
    versions = (
        f"torch-depthmup {version('torch-depthmup')}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    body = "\n".join(blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}\n</main>\n"
        f"<footer><code>{escape(command)}</code><br>{escape(versions)}</footer>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, *, quiet: bool = False) -> str:
    """A paragraph; a quiet one is a remark."""
    return f"<p{' class=quiet' if quiet else ''}>{escape(text)}</p>"


def listing(items: Sequence[str]) -> str:
    """A list of sentences; nothing where there are none."""
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>" if items else ""


def following(*steps: str) -> str:
    """The last section of a page: what to do next."""
    return heading("Next") + listing(steps)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; verdicts are coloured, and names may break after their dots."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def named_table(header: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table whose rows are a name and its cells, as `printing` folds them."""
    return table(header, [(name, *cells) for name, cells in rows])


def _cell(text: str) -> str:
    kind = VERDICTS.get(text)
    return f"<td{f' class={kind}' if kind else ''}>{escape(text)}</td>"


def figure(draw: Callable[[], Any], caption: str) -> str:
    """A matplotlib figure.

    Args:
        draw: returns the figure; called twice, under settings for a light and for a dark page.
        caption: plain text, which also stands for the figure where it is not seen.

    Returns:
        HTML with both drawings as SVG.
    """
    light, dark = _svg(draw, {}), _svg(draw, DARK)
    return (
        '<figure><div class="scroll" tabindex="0" role="region" aria-label="figure"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
        f'<img src="{_data(light)}" alt="{escape(caption)}" style="min-width:{LEAST * _width(light):.0f}px">'
        "</picture></div>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _svg(draw: Callable[[], Any], settings: dict[str, Any]) -> str:
    matplotlib = needs("matplotlib")
    # The hash of names and the missing date make the same figure the same bytes.
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **settings, "svg.hashsalt": "torch_depthmup"}):
        buffer = io.StringIO()
        draw().savefig(buffer, format="svg", metadata={"Date": None})
    return re.sub(r"<!--.*?-->|\n\s*(?=<)", "", buffer.getvalue(), flags=re.DOTALL)


def _width(svg: str) -> float:
    """In CSS pixels; matplotlib writes points."""
    found = re.search(r'<svg[^>]* width="([\d.]+)pt"', svg)
    assert found is not None
    return float(found.group(1)) * 96 / 72


def _data(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()

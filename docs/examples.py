"""Tells mkdocstrings that ``>>>`` lines are examples: in the docstrings they stand without a heading."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)


class Examples(griffe.Extension):
    """Puts every block of ``>>>`` lines under ``Examples:``, which griffe reads as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(_headed, obj.docstring.value)


def _headed(found: re.Match[str]) -> str:
    return f"Examples:\n{textwrap.indent(found[0], '    ')}"

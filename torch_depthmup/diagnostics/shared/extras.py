"""Libraries that only the instruments use, imported where they are used."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

__all__ = ["frame", "needs"]


def needs(module: str) -> Any:
    """A module of the ``diagnostics`` extra.

    Raises:
        ImportError: it is not installed; the message says what to run.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.partition('.')[0]} is not installed. Run: pip install 'torch-depthmup[diagnostics]'"
        ) from error


def frame(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> pandas.DataFrame:
    """Rows as a pandas data frame with these columns, also when there are no rows yet.

    Raises:
        ImportError: pandas is missing.
    """
    return needs("pandas").DataFrame(list(rows), columns=list(columns))
